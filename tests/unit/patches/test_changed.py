"""Another program changed a patch's weights and kept its record: who shows it says so."""

import json

import pytest
import torch

from fmn.cli.main import main
from fmn.errors import ForgetError
from fmn.methods.describe import describe
from fmn.patches.library import Library
from fmn.patches.merge import merge_patches
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.scores import write_scores

from ..tiny import make_patch, metadata_of, rewrite
from .test_scores import MEASURED, SCORES


@pytest.fixture
def path(tmp_path):
    path = save_patch(make_patch(rank=4), tmp_path / "dog.safetensors")
    write_scores(load_patch(path).source, SCORES, MEASURED)
    return path


def resized(tensors, metadata):
    """kohya's resize: two of four directions, its alpha, and all of the metadata."""
    for key in list(tensors):
        down = key.endswith("lora_down.weight")
        tensors[key] = (tensors[key][:2] if down else tensors[key][:, :2]).contiguous()
        tensors[f"{key.partition('.')[0]}.alpha"] = torch.tensor(2.0).half()
    metadata |= {"ss_network_dim": "2", "sshs_model_hash": "0" * 64}


def resized_without_hash(tensors, metadata):
    del metadata["modelspec.hash_sha256"]
    resized(tensors, metadata)


def scaled(tensors, metadata):
    for key in tensors:
        tensors[key] *= 1.5


def one_number(tensors, metadata):
    next(iter(tensors.values())).view(-1)[0] += 1


@pytest.mark.parametrize("change", [resized, resized_without_hash, scaled, one_number])
def test_record_and_scores_of_other_weights(path, change, capsys):
    patch = load_patch(rewrite(path, change))
    assert patch.info["changed"] and not {"scores", "measured"} & set(patch.info)
    assert "changed: the weights are not those" in describe(patch) and "98 %" not in describe(patch)
    assert Library([path.parent]).is_changed(0, path.name) is True
    merged = merge_patches([(patch, 1.0)])
    assert "another program changed the file" in merged.notes[0]
    again = save_patch(patch, path.with_stem("again"))
    assert load_patch(again).info["changed"]  # saving does not make the record true
    assert Library([path.parent]).is_changed(0, again.name) is True
    assert main(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["info"]
    assert shown["changed"] and "scores" not in shown


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: None,
        lambda tensors, metadata: metadata.update({"modelspec.title": "mine"}),
        lambda tensors, metadata: metadata.update(
            {"modelspec.hash_sha256": metadata["modelspec.hash_sha256"][2:].upper()}
        ),
    ],
)
def test_the_same_weights(path, change):
    patch = load_patch(rewrite(path, change))
    assert "changed" not in patch.info and patch.info["scores"] == SCORES
    assert "not checked" not in describe(patch)
    assert Library([path.parent]).is_changed(0, path.name) is False


def test_an_older_file_without_a_hash(path):
    rewrite(path, lambda tensors, metadata: metadata.pop("modelspec.hash_sha256"))
    patch = load_patch(path)
    assert "changed" not in patch.info and "not checked" in describe(patch)
    assert Library([path.parent]).is_changed(0, path.name) is None
    write_scores(patch.source, {"UA": 0.5}, MEASURED)  # of these very weights
    assert "modelspec.hash_sha256" in metadata_of(path)
    assert "not checked" not in describe(load_patch(path))


def test_the_list_reads_no_weights(path, monkeypatch):
    monkeypatch.setattr(
        "fmn.patches.library_entry.data_hash", lambda file: pytest.fail("read whole")
    )
    (entry,) = Library([path.parent]).entries()
    assert entry["scores"] == SCORES


def test_nothing_that_is_no_patch_is_checked(path):
    path.write_bytes(b"nothing")
    with pytest.raises(ForgetError, match="damaged"):
        Library([path.parent]).is_changed(0, path.name)
