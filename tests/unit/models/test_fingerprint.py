"""What tells one base from another, and a copy in another precision from both."""

import json

import pytest
import torch

from fmn.errors import ForgetError
from fmn.models.families import DEMO, SD1, SDXL, layers
from fmn.models.interface import SKETCHED, fingerprint
from fmn.patches.merge import merge_patches
from fmn.patches.metadata import OTHER, PRECISION, base_info, other_base
from fmn.patches.patch import load_patch, save_patch

from ..tiny import make_patch, metadata_of


def weights(family, seed=0, scale=0.03):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: scale * torch.randn(4, layer.shape[1], generator=generator)
        for layer in layers(family)
        if layer.is_key_or_value
    }


def record(of, change=lambda weight: weight, family=DEMO):
    return base_info(fingerprint(family, lambda layer: change(of[layer.name])))


def scaled(weight):
    """As 8-bit files with a scale beside each weight hold it."""
    return (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn)


def moved(share):
    generator = torch.Generator().manual_seed(7)

    def move(weight):
        noise = torch.randn(weight.shape, generator=generator)
        return weight + share * noise * weight.norm() / noise.norm()

    return move


NEAR = "near relative"
COPIES = {
    "float16": (torch.Tensor.half, ""),
    "bfloat16": (torch.Tensor.bfloat16, PRECISION),
    "e4m3": (lambda weight: weight.to(torch.float8_e4m3fn), NEAR),
    "e5m2": (lambda weight: weight.to(torch.float8_e5m2), NEAR),
    "e4m3 and scales": (scaled, NEAR),
    "bfloat16 of float16": (lambda weight: weight.half().bfloat16(), PRECISION),
    "float32 of 8 bits": (lambda weight: weight.to(torch.float8_e4m3fn).float(), NEAR),
    "an eraser's": (moved(0.0075), NEAR),
    "a fine-tune": (moved(0.15), OTHER),
}


@pytest.mark.parametrize("family", [DEMO, SD1, SDXL], ids=lambda family: family.key)
@pytest.mark.parametrize("change, words", COPIES.values(), ids=COPIES)
def test_copies_are_no_other_base(change, words, family):
    of = weights(family)
    found = other_base(record(of, family=family), record(of, change, family))
    assert words in found and bool(words) == bool(found)


def test_another_model_is_another_base():
    assert other_base(record(weights(DEMO)), record(weights(DEMO, seed=1))) == OTHER
    assert len(record(weights(SDXL), family=SDXL)["base.sketch"]) <= SKETCHED


def test_records_without_a_sketch_are_compared_by_fingerprint():
    new = record(weights(DEMO))
    old = {"base.fingerprint": new["base.fingerprint"]}
    assert other_base(old, new) == other_base(new, old) == ""
    assert "or a copy in another precision" in other_base({"base.fingerprint": "0" * 32}, new)
    assert other_base({}, new) == "an unknown base"


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_weights_without_a_direction(value):
    of = {name: torch.full_like(weight, value) for name, weight in weights(DEMO).items()}
    assert record(of)["base.sketch"] == [0.0] * 14


def test_a_sketch_goes_through_files_and_merges(tmp_path):
    of, patches = weights(DEMO), [make_patch(seed=seed) for seed in range(3)]
    for patch, change in zip(patches, (torch.Tensor.half, torch.Tensor.bfloat16, moved(0.3))):
        patch.info |= record(of, change)
    first, copy, other = [load_patch(save_patch(p, tmp_path / f"{i}.safetensors"))
                          for i, p in enumerate(patches)]  # fmt: skip
    assert first.info["base.sketch"] == record(of, torch.Tensor.half)["base.sketch"]
    assert merge_patches([(first, 1.0)]).patch.info["base.sketch"] == first.info["base.sketch"]
    both = merge_patches([(first, 1.0), (copy, 1.0)])
    assert not any("different bases" in note for note in both.notes)
    assert "base.sketch" not in both.patch.info
    assert "different bases" in merge_patches([(first, 1.0), (other, 1.0)]).notes[0]


@pytest.mark.parametrize("sketch", ["[1, null]", '"text"', "[[]]", "[NaN]"])
def test_an_untrusted_sketch_is_checked(tmp_path, sketch):
    path = save_patch(make_patch(), tmp_path / "a.safetensors")
    from safetensors.torch import load_file, save_file

    metadata = metadata_of(path) | {"fmn.base.sketch": sketch}
    assert json.loads(sketch) is not None
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ForgetError, match="wrong type|damaged"):
        load_patch(path)
