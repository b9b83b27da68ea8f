"""The plan of Re-read on a transformer against a run of it."""

import pytest
import torch

from .conftest import ROOT
from .others import Words, make


@pytest.mark.parametrize("name", ["Flux", "Lumina2"])
def test_a_plan_says_what_a_run_takes(pack, monkeypatch, name):
    """With fewer prompts than by default, and a rank that these few give."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import transformer_plan as program

    host = program.UnknownModel(make(name, {}), Words(name))
    changes = {"size": 64, "keep_prompts": 24, "transformer_prompts": 4, "rank": 2}
    settings = program.settings_of("reread", changes)

    def length(text):
        return 2 + len(text.split())  # as ``Words`` has it

    found, seen = program.plan(host.family, length, settings), []

    def hook(module, args):
        seen.append(len(args[0]))

    with torch.inference_mode(), host.patcher.model.diffusion_model.register_forward_pre_hook(hook):
        concept = program.Concept("dog", kind="object")
        patch = program.forget(host, [concept], settings)
    assert (found.forwards, found.samples) == (len(seen), sum(seen))
    assert found.file == pytest.approx(program.file_size(patch), abs=100)  # numbers in its header
    pairs = 4 * 2  # with each noise, recorded without the concept, and with it in either pass
    kept, expected = found.samples - 3 * pairs, 0
    for layer in host.family.listed:
        if reader := host.family.readers().get(layer.name):
            outputs, inputs = layer.shape
            inputs = outputs if reader.fused else inputs
            rows, rows_kept = settings.query_positions, program.recorded.KEPT_POSITIONS
            if reader.tokens == "pooled":
                rows = rows_kept = 1
            # At once: both sides of one pass, and the inputs of kept prompts.
            expected += 2 * (2 * pairs * rows * (inputs + outputs) + kept * rows_kept * inputs)
    assert found.rows == expected and found.solving > 0
