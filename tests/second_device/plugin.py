"""A pytest plugin: models that tests load are on the second device, in both hosts.

    python -m pytest -p second_device.plugin FILES

``SECOND_DEVICE`` names the library that ``second_device.build`` made.
"""

import os

import pytest

from . import NAME, load

MEMORY = 8 << 30  # bytes, as ComfyUI is told
CARD = load(os.environ["SECOND_DEVICE"])


@pytest.fixture(autouse=True)
def on_the_second_device(request, monkeypatch):
    if "pack" in request.fixturenames:
        request.getfixturevalue("pack")
        from comfy import model_management

        _use(model_management, monkeypatch)
    else:
        from fmn.hosts.diffusers.model import DiffusersModel

        load_on = DiffusersModel.load

        def load_on_card(path, device=None, **how):
            return load_on(path, device or CARD, **how)

        monkeypatch.setattr(DiffusersModel, "load", load_on_card)


def _use(management, monkeypatch):
    """What ComfyUI finds out of a GPU by itself."""

    def memory_of(function):
        def found(device=None, *given, **named):
            if device is not None and device.type != NAME:
                return function(device, *given, **named)
            return (MEMORY, MEMORY) if given or named else MEMORY

        return found

    told = {
        "cpu_state": management.CPUState.GPU,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "get_torch_device": lambda: CARD,
        "get_free_memory": memory_of(management.get_free_memory),
        "get_total_memory": memory_of(management.get_total_memory),
        "should_use_fp16": lambda *given, **more: False,
        "should_use_bf16": lambda *given, **more: False,
        "supports_fp8_compute": lambda *given: False,
        "is_nvidia": lambda: False,
    }
    for name, value in told.items():
        monkeypatch.setattr(management, name, value)
