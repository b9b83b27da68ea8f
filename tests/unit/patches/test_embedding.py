"""The file of learned tokens: what is in it, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn.errors import ForgetError
from fmn.patches.embedding_file import (
    MAX_BYTES,
    MAX_TOKENS,
    Embedding,
    load_embedding,
    recorded,
    save_embedding,
)
from fmn.patches.patch import load_patch
from fmn.training.textual_inversion import Inverted, Settings

from ..tiny import TINY, TinyModel, metadata_of

WIDTH = 12
SETTINGS = Settings(steps=2, start="big dog", templates=("a photo of {}", "{} here"))


def vectors(tokens=3, width=WIDTH):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))


def learned(what="my dog", tokens=3):
    found = Inverted(vectors(tokens), torch.zeros(tokens, WIDTH), [0.5, 0.25])
    return recorded(found, TinyModel(), "f" * 32, "textual inversion", SETTINGS, what)


def saved(tmp_path, **options):
    return save_embedding(learned(**options), tmp_path / "new" / "dog.safetensors", TINY)


def raw(tmp_path, tensors=None, metadata=None):
    path = tmp_path / "raw.safetensors"
    save_file({"emb_params": vectors()} if tensors is None else tensors, path, metadata)
    return path


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, tokens):
    embedding = learned(tokens=tokens)
    path = save_embedding(embedding, tmp_path / "dog.safetensors", TINY)
    found = load_embedding(path, WIDTH)
    assert torch.equal(found.vectors, embedding.vectors) and found.vectors.dtype == torch.float32
    assert found.info == json.loads(json.dumps(embedding.info))


def test_the_record(tmp_path):
    info = load_embedding(saved(tmp_path), WIDTH).info
    settings = asdict(SETTINGS) | {"templates": ["a photo of {}", "{} here"]}
    assert info.pop("date").endswith("+00:00") and info.pop("version")
    assert info == {
        "what": "my dog", "method": "textual inversion", "settings": settings,
        "base.family": "tiny", "base.fingerprint": "f" * 32,
        "loss": {"first": 0.5, "last": 0.25, "steps": 2},
    }  # fmt: skip


def test_the_file_is_one_float32_tensor_as_other_programs_read_it(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    assert list(tensors) == ["emb_params"]
    assert tensors["emb_params"].dtype == torch.float32 and tensors["emb_params"].shape == (3, 12)
    metadata = metadata_of(path)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert metadata["modelspec.title"] == "my dog" and metadata["fmn.embedding"] == "1"
    assert [file.name for file in path.parent.iterdir()] == ["dog.safetensors"]


def test_text_that_is_no_unicode_is_kept_out_of_the_title(tmp_path):
    path = saved(tmp_path, what="dog \udcff")
    assert metadata_of(path)["modelspec.title"] == "dog ?"
    assert load_embedding(path, WIDTH).info["what"] == "dog \udcff"


def test_a_file_that_is_there_stays_as_it_is(tmp_path):
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"somebody's work")
    with pytest.raises(ForgetError, match="exists already"):
        save_embedding(learned(), path, TINY)
    assert path.read_bytes() == b"somebody's work"


def test_what_is_not_finite_is_not_saved(tmp_path):
    embedding = Embedding(torch.full((1, WIDTH), torch.nan))
    with pytest.raises(ForgetError, match="not finite"):
        save_embedding(embedding, tmp_path / "dog.safetensors", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(ForgetError, match="could not be saved"):
        save_embedding(learned(), blocked / "dog.safetensors", TINY)
    assert [file.name for file in tmp_path.iterdir()] == ["blocked"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["emb_params", "clip_l", "clip_h", "<my-dog>"])
def test_files_of_other_programs_are_read(tmp_path, dtype, name):
    path = raw(tmp_path, {name: vectors().to(dtype)}, {"format": "pt"})
    found = load_embedding(path, WIDTH)
    assert torch.equal(found.vectors, vectors().to(dtype).float()) and found.info == {}


def test_a_single_token_may_lack_its_first_dimension(tmp_path):
    """As diffusers' trainer writes it."""
    found = load_embedding(raw(tmp_path, {"<dog>": vectors(1)[0]}), WIDTH)
    assert torch.equal(found.vectors, vectors(1))


BAD = {
    "no tensor": ({}, "holds 0 tensors"),
    "two encoders": ({"clip_l": vectors(), "clip_g": vectors(width=20)}, "holds 2 tensors"),
    "other width": ({"emb_params": vectors(width=13)}, r"shape \[3, 13\].*width 12"),
    "no tokens": ({"emb_params": vectors(0)}, r"shape \[0, 12\]"),
    "too many": ({"emb_params": vectors(MAX_TOKENS + 1)}, r"shape \[65, 12\]"),
    "three dimensions": ({"emb_params": vectors()[None]}, r"shape \[1, 3, 12\]"),
    "scalar": ({"emb_params": torch.tensor(1.0)}, r"shape \[\]"),
    "integers": ({"emb_params": vectors().int()}, "as I32"),
    "float64": ({"emb_params": vectors().double()}, "as F64"),
    "NaN": ({"emb_params": vectors() * torch.nan}, "NaN or infinite"),
    "infinite": ({"emb_params": vectors() / 0}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_tensors_are_refused(tmp_path, case):
    tensors, message = BAD[case]
    with pytest.raises(ForgetError, match=message):
        load_embedding(raw(tmp_path, tensors), WIDTH)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "damaged or not a safetensors"),
        (b"\xff" * 20, "damaged or not a safetensors"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged or not a safetensors"),
        (b"\x80\x02}q\x00.", "damaged or not a safetensors"),  # a pickle
        (bytes(MAX_BYTES + 1), "we read embeddings of at most"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    path = tmp_path / "dog.safetensors"
    path.write_bytes(data)
    with pytest.raises(ForgetError, match=message):
        load_embedding(path, WIDTH)


def test_a_cut_file_is_refused(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ForgetError, match="damaged"):
        load_embedding(path, WIDTH)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ForgetError, match="No such file"):
        load_embedding(tmp_path / "none.safetensors", WIDTH)
    with pytest.raises(ForgetError, match="Is a directory"):
        load_embedding(tmp_path, WIDTH)


@pytest.mark.parametrize(
    "metadata",
    [
        {"fmn.what": "no json"},
        {"fmn.what": "3"},
        {"fmn.settings": "[]"},
        {"fmn.loss": "[" * 100_000},
    ],
)
def test_damaged_metadata_is_refused(tmp_path, metadata):
    with pytest.raises(ForgetError, match="metadata of 'raw.safetensors' is damaged"):
        load_embedding(raw(tmp_path, metadata=metadata), WIDTH)


def test_unknown_metadata_is_ignored(tmp_path):
    assert load_embedding(raw(tmp_path, metadata={"fmn.new": "x", "a": "b"}), WIDTH).info == {}


def test_an_embedding_is_not_taken_for_a_patch(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ForgetError, match="is not a forget patch"):
        load_patch(path)
    with safe_open(path, framework="pt") as file:
        assert "fmn.format" not in file.metadata()
