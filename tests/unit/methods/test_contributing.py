"""The method that CONTRIBUTING.md shows is added as it says, and works."""

import importlib.util
import re
import sys
from pathlib import Path

import torch

import fmn.methods as methods
from fmn.concepts.concept import Concept
from fmn.linalg import full_change

from ..tiny import TinyModel

TEXT = (Path(__file__).resolve().parents[3] / "CONTRIBUTING.md").read_text()


def test_a_method_is_a_file_and_a_line(tmp_path, monkeypatch):
    source, line = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[:2]
    (tmp_path / "shrink.py").write_text(source)
    listed = dict(methods.METHODS) | eval("{" + line + "}")  # noqa: S307 - our own text
    monkeypatch.setattr(methods, "METHODS", listed)
    monkeypatch.setattr(
        methods, "PRESETS", {preset: name for name, own in listed.items() for preset in own}
    )
    place = importlib.util.spec_from_file_location("fmn.methods.shrink", tmp_path / "shrink.py")
    module = importlib.util.module_from_spec(place)
    monkeypatch.setitem(sys.modules, "fmn.methods.shrink", module)
    place.loader.exec_module(module)

    model = TinyModel()
    patch = methods.forget(model, [Concept("dog")], methods.settings_of("shrink-all", {}))
    token = model.encode_all(["dog"])[0, 1]
    for name, factors in patch.changes.items():
        weight = model.unet.get_submodule(name).weight
        assert torch.allclose((weight + full_change(*factors)) @ token, torch.zeros(1), atol=1e-4)
    assert patch.info["method"] == "shrink" and patch.ranks == [1]
