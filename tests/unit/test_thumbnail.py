"""Untrusted thumbnails: small JPEGs come out, or one sentence."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fmn import images
from fmn.errors import ForgetError
from fmn.patches.patch import load_patch, save_patch

from .tiny import make_patch, metadata_of


def encoded(kind="PNG", size=(64, 32), mode="RGB", colour=(200, 30, 40), **options):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(jpeg):
    picture = Image.open(io.BytesIO(jpeg))
    picture.load()
    assert picture.format == "JPEG" and picture.mode == "RGB"
    return picture


def uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width, height):
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_usual_pictures(kind):
    picture = opened(images.thumbnail_of_bytes(encoded(kind)))
    assert picture.size == (64, 32)
    assert np.abs(np.asarray(picture).astype(int).mean((0, 1)) - (200, 30, 40)).max() < 4


@pytest.mark.parametrize("size, small", [((2000, 1000), (512, 256)), ((300, 900), (85, 256))])
def test_large_pictures_become_small(size, small):
    assert opened(images.thumbnail_of_bytes(encoded(size=size))).size == small


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_other_modes(mode):
    colour = {"RGBA": (0, 0, 0, 0), "LA": (0, 0)}.get(mode, 1)
    opened(images.thumbnail_of_bytes(encoded(mode=mode, colour=colour)))


def test_what_is_transparent_shows_paper():
    picture = opened(images.thumbnail_of_bytes(encoded(mode="RGBA", colour=(0, 0, 0, 0))))
    assert np.asarray(picture).min() > 240


def test_metadata_does_not_go_on():
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    jpeg = images.thumbnail_of_bytes(encoded("JPEG", exif=exif, comment=b"<script>"))
    assert b"script" not in jpeg and b"Exif" not in jpeg


BAD = {
    "empty": b"",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "page": b"<!DOCTYPE html><script>alert(1)</script>",
    "gif": encoded("GIF", mode="P", colour=1),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "cut PNG": encoded()[:60],
    "cut JPEG": encoded("JPEG")[:100],
    "cut WebP": encoded("WEBP")[:30],
    "only a signature": b"\x89PNG\r\n\x1a\n",
    "too many pixels": png_that_claims(8192, 8192),
    "a bomb": png_that_claims(60_000, 60_000),
    "no pixels": png_that_claims(0, 0),
    "less than it claims": png_that_claims(64, 64),
    "too large": encoded() + bytes(images.MAX_BYTES),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_pictures_are_refused_in_one_sentence(data):
    with pytest.raises(ForgetError, match="^The thumbnail") as caught:
        images.thumbnail_of_bytes(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


BAD_URIS = {
    "empty": "",
    "address": "https://example.org/x.png",
    "script": "javascript:alert(1)",
    "SVG": uri(b"<svg/>", "svg+xml"),
    "other kind": uri(encoded("GIF", mode="P", colour=1), "gif"),
    "GIF called PNG": uri(encoded("GIF", mode="P", colour=1)),
    "no base64": "data:image/png;base64,!!!!",
    "half a letter": uri(encoded())[:-3],
    "not base64 at all": "data:image/png,xyz",
    "space before": " " + uri(encoded()),
    "too long": uri(encoded() + bytes(images.MAX_URI)),
    "other letters": "data:image/png;base64,ééé",
}


@pytest.mark.parametrize("text", BAD_URIS.values(), ids=BAD_URIS)
def test_bad_data_uris(text):
    with pytest.raises(ForgetError, match="^The thumbnail"):
        images.thumbnail_of_uri(text)


def test_missing_file(tmp_path):
    with pytest.raises(ForgetError, match="No such file"):
        images.thumbnail_of_file(tmp_path / "gone.png")


def test_pictures_of_a_patch_side_by_side():
    """Black before, white after: the left half is black, the right white."""
    pixels = torch.stack([torch.zeros(128, 128, 3), torch.ones(128, 128, 3)])
    uri = images.thumbnail_uri(pixels)
    picture = np.asarray(opened(images.thumbnail_of_uri(uri))).astype(int)
    assert picture.shape == (128, 256, 3)
    assert picture[:, :120].max() < 8 and picture[:, 136:].min() > 247


@pytest.mark.parametrize("shape", [(1, 1024, 1024, 3), (9, 512, 768, 4), (2, 8, 2000, 3)])
def test_thumbnails_are_small(shape):
    text = images.thumbnail_uri(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    assert len(text) < 200_000
    picture = opened(images.thumbnail_of_uri(text))
    assert picture.width <= 512 and picture.height <= 256


def test_saved_thumbnail_does_not_change_the_patch(tmp_path):
    picture = images.thumbnail_uri(torch.zeros(1, 8, 8, 3))
    plain = save_patch(make_patch(), tmp_path / "plain.safetensors")
    shown = save_patch(make_patch(), tmp_path / "shown.safetensors", picture)
    assert metadata_of(shown)["modelspec.thumbnail"] == picture
    first, second = load_patch(plain), load_patch(shown)
    assert all(
        up.equal(second.changes[name][0]) and down.equal(second.changes[name][1])
        for name, (up, down) in first.changes.items()
    )
