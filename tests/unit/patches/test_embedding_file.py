"""The file of learned tokens: what is in it, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fmn.errors import ForgetError
from fmn.patches.embedding_file import (
    Embedding,
    embedding_of,
    save_embedding,
)
from fmn.patches.patch import load_patch
from fmn.training.textual_inversion import Settings

from ..tiny import TINY, metadata_of, same_tensors

WIDTH = 12
SETTINGS = Settings(steps=2, start="big dog", templates=("a photo of {}", "{} here"))


def vectors(tokens=3, width=WIDTH):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))


def learned(what="my dog", tokens=3):
    record = TINY, "f" * 32, "textual inversion", asdict(SETTINGS), what
    return embedding_of(vectors(tokens), [0.5, 0.25], *record)


def saved(tmp_path, **options):
    return save_embedding(learned(**options), tmp_path / "new" / "dog.safetensors", TINY)


def info_of(path):
    metadata = metadata_of(path).items()
    return {key[4:]: json.loads(value) for key, value in metadata if key.startswith("fmn.")}


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, tokens):
    embedding = learned(tokens=tokens)
    path = save_embedding(embedding, tmp_path / "dog.safetensors", TINY)
    assert same_tensors(load_file(path), {"emb_params": embedding.vectors})


def test_the_record(tmp_path):
    info = info_of(saved(tmp_path))
    settings = asdict(SETTINGS) | {"templates": ["a photo of {}", "{} here"]}
    assert info.pop("date").endswith("+00:00") and info.pop("version")
    assert info == {
        "embedding": 1,
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
    assert info_of(path)["what"] == "dog \udcff"


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


def test_an_embedding_is_not_taken_for_a_patch(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ForgetError, match="is not a forget patch"):
        load_patch(path)
    with safe_open(path, framework="pt") as file:
        assert "fmn.format" not in file.metadata()
