"""Patches of one transformer family merged into one, against both of them applied."""

import pytest
import torch

from .others import CONFIGS
from .test_transformer_table import encoded, latents, predictions


def random_patch(pack, host, layers, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    changes = {
        layer.name: (
            0.1 * torch.randn(layer.shape[0], rank, generator=generator),
            torch.randn(rank, layer.shape[1], generator=generator),
        )
        for layer in layers
    }
    record = {"name": f"concept {seed}", "kind": "object", "aliases": [], "prompts": []}
    info = {"concepts": [record], "base.prediction": "flow"}
    return pack("fmn.patches.patch").ForgetPatch(host.family, changes, info)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_patches_do_what_both_do(pack, other_host, tmp_path, name):
    patches, merging = pack("fmn.patches.patch"), pack("fmn.patches.merge")
    host = other_host(name)
    readers = {**host.family.readers(), **host.family.text_readers()}
    layers = [layer for layer in host.family.listed if layer.name in readers]
    pair = [
        (random_patch(pack, host, layers, 2, 1), 1.0),
        (random_patch(pack, host, layers[1:], 1, 2), -0.5),
    ]
    both = host
    for patch, strength in pair:
        both = type(host)(both.patched(patch, strength))
    whole = merging.merge_patches(pair)
    path = patches.save_patch(whole.patch, tmp_path / "merged.safetensors")
    loaded = patches.load_patch(path)
    assert whole.error == 0 and loaded.family.entry is host.family.entry
    assert loaded.concepts == ["concept 1", "concept 2"] and loaded.ranks == [2, 3]
    x, texts = latents(host, 1), encoded(pack, host, "a cat")
    plain, wanted, found = (
        predictions(each, x, texts) for each in (host, both, type(host)(host.patched(loaded, 1.0)))
    )
    assert (found - wanted).norm() < 5e-3 * (wanted - plain).norm()

    budget = path.stat().st_size - 200
    cut = merging.merge_patches(pair, budget)
    assert patches.save_patch(cut.patch, tmp_path / "cut.safetensors").stat().st_size <= budget
    lost = total = 0.0
    for layer in layers:
        change = whole.patch.change_of(layer.name)
        kept = cut.patch.change_of(layer.name) if layer.name in cut.patch.changes else 0 * change
        lost, total = lost + (change - kept).square().sum(), total + change.square().sum()
    assert cut.error == pytest.approx(float(lost / total) ** 0.5, abs=1e-4) and 0 < cut.error < 1
