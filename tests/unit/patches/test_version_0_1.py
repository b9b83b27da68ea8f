"""Files of version 0.1 load, apply and merge as they did; see tests/data/v0.1/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmn.methods.describe import describe
from fmn.patches.checkpoint import merge_into_checkpoint
from fmn.patches.library import Library
from fmn.patches.merge import merge_patches
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.scores import tensor_hash

from ..tiny import metadata_of
from .test_checkpoint import DEMO_FILE

FOLDER = Path(__file__).parents[2] / "data" / "v0.1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text("utf-8"))
PATCHES = "reread", "uce", "hirm", "merged"


def load(name):
    return load_patch(FOLDER / f"{name}.safetensors")


def factors_hash(patch):
    parts = {
        f"{name}.{part}": factor
        for name, factors in patch.changes.items()
        for part, factor in zip(("up", "down"), factors)
    }
    return tensor_hash(parts)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_loads_bit_for_bit(name):
    patch, expected = load(name), EXPECTED[name]
    assert factors_hash(patch) == expected["factors"]
    assert patch.info == expected["info"]
    assert (patch.family.key, patch.ranks) == (expected["family"], expected["ranks"])
    assert len(patch.layers) == expected["layers"]
    assert patch.changes_text == (name in ("hirm", "merged"))
    text = describe(patch)
    assert "forgets: dog (object) -> cat; ink drawing (style) -> photo" in text
    assert "version 0.1.0" in text and ("scores: UA 50 %" in text) == (name == "uce")
    assert ("not checked" in text) == (name == "uce")  # it has no hash of its weights


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_saved_again_is_the_same_file(name, tmp_path):
    again = save_patch(load(name), tmp_path / "again.safetensors")
    assert factors_hash(load_patch(again)) == factors_hash(load(name))
    written = metadata_of(again)
    assert written.pop("modelspec.hash_sha256").startswith("0x")
    assert written == metadata_of(FOLDER / f"{name}.safetensors")


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_changes_the_same_weights_by_as_much(name, tmp_path):
    target = tmp_path / "merged.safetensors"
    merge_into_checkpoint(DEMO_FILE, [(load(name), 0.75)], target)
    before, after = load_file(DEMO_FILE), load_file(target)
    changes = {
        key: float((after[key].double() - weight.double()).norm())
        for key, weight in before.items()
        if not torch.equal(after[key], weight)
    }
    assert changes == pytest.approx(EXPECTED[name]["applied"], rel=1e-4)


def test_patches_add_up_bit_for_bit():
    sources = [(FOLDER / f"{name}.safetensors", s) for name, s in EXPECTED["sum"]["of"]]
    assert factors_hash(merge_patches(sources).patch) == EXPECTED["sum"]["factors"]


def test_patches_are_cut_alike():
    expected = EXPECTED["cut"]
    merged = merge_patches([(load("uce"), 1.0), (load("hirm"), 0.5)], expected["budget"])
    assert [len(down) for _, down in merged.patch.changes.values()] == expected["ranks"]
    assert merged.error == pytest.approx(expected["error"], rel=1e-4)


def test_an_embedding_holds_the_same():
    path, expected = FOLDER / "embedding.safetensors", EXPECTED["embedding"]
    assert tensor_hash(load_file(path)) == expected["vectors"]
    metadata = metadata_of(path)
    assert {key: json.loads(metadata[f"fmn.{key}"]) for key in expected["info"]} == expected["info"]


def test_the_library_lists_them():
    entries = {entry["name"]: entry for entry in Library([FOLDER]).entries()}
    assert entries.pop("embedding.safetensors")["problem"] == "foreign"
    assert [Path(name).stem for name in entries] == sorted(PATCHES)
    for entry in entries.values():
        assert "problem" not in entry and entry["family"] == "demo"
        assert entry["concepts"][0] == ["dog", "object", "cat", ""]
    assert entries["uce.safetensors"]["scores"] == {"UA": 0.5, "M-Score": 0.25}
