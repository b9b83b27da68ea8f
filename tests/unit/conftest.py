"""A sampler over the tiny model, which draws as the little suite says; folders with patches."""

import pytest
import torch

from fmn.images import thumbnail_uri
from fmn.models.image_sampler import open_sampler
from fmn.patches.library import Library
from fmn.patches.patch import save_patch

from .tiny import TinyModel, make_patch
from .worlds import SUITE

PICTURE = thumbnail_uri(torch.zeros(1, 8, 8, 3))


@pytest.fixture
def sampler():
    with open_sampler(TinyModel(), SUITE.sampling, batch=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a patch; its date is in May 2026."""
    patch = make_patch(rank=1)
    patch.info |= {"date": "2026-05-04T03:02:01+00:00", "scores": {"UA": 0.97}}
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    return save_patch(patch, path, PICTURE).read_bytes()


@pytest.fixture
def folders(tmp_path, whole):
    """models/ with dog, and output/ with deep/er/cat; dog has all that may lie beside it."""
    models, output = tmp_path / "models", tmp_path / "output"
    (output / "deep" / "er").mkdir(parents=True)
    models.mkdir()
    (models / "dog.safetensors").write_bytes(whole)
    (models / "dog.png").write_bytes(b"no picture")
    (models / "dog.fmn.json").write_text('{"notes": "works"}')
    (models / "dog.fmn-train").write_bytes(whole)
    (models / "dog.txt").write_text("not ours")
    (output / "deep" / "er" / "cat.safetensors").write_bytes(whole)
    return models, output


@pytest.fixture
def shelf(folders):
    return Library(folders)
