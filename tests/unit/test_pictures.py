"""Picture files as people have them: read as they are shown, or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fmn.errors import ForgetError
from fmn.images import picture_files, read_picture, thumbnail_of_file


def png16(values, colour_type=0):
    """A PNG of 16 bits a sample, in one row."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", len(values) // channels, 1, 16, colour_type, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def saved(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(transparent):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putdata([0, 1])
    return saved(picture, transparency=transparent)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    picture = Image.new("RGB", (1, 1), "red")
    wide = Image.new("RGB", (2, 1), "blue")
    wide.paste(picture)
    return saved(wide, exif=exif)


GOOD = {
    "grey 16": (png16([0, 257 * 128, 65535]), [[0, 0, 0], [128, 128, 128], [255, 255, 255]]),
    "grey 16, dark": (png16([256, 512, 600]), [[1, 1, 1], [2, 2, 2], [2, 2, 2]]),
    "grey 16 with alpha": (png16([0, 65535, 0, 0], 4), [[0, 0, 0], [255, 255, 255]]),
    "colour 16": (png16([65535, 257 * 10, 0], 2), [[255, 10, 0]]),
    "colour 16 with alpha": (png16([65535, 0, 0, 0, 0, 0, 65535, 65535], 6),
                             [[255, 255, 255], [0, 0, 255]]),
    "palette": (saved(Image.new("P", (1, 1))), [[0, 0, 0]]),
    "palette, one clear": (palette(0), [[255, 255, 255], [200, 100, 0]]),
    "palette, half clear": (palette(bytes([255, 0])), [[10, 20, 30], [255, 255, 255]]),
    "CMYK": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), [[255, 0, 0]]),
    "grey JPEG": (saved(Image.new("L", (8, 8), 77), "JPEG"), [[77, 77, 77]]),
    "black and white": (saved(Image.new("1", (1, 1), 1)), [[255, 255, 255]]),
    "clear": (saved(Image.new("RGBA", (1, 1), (9, 9, 9, 0))), [[255, 255, 255]]),
    "clear WebP": (saved(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "WEBP"), [[255, 255, 255]]),
    "turned": (turned(), [[255, 0, 0], [0, 0, 255]]),
}  # fmt: skip


@pytest.mark.parametrize("data, expected", GOOD.values(), ids=GOOD)
def test_a_picture_is_read_as_it_is_shown(tmp_path, data, expected):
    (tmp_path / "a.jpg").write_bytes(data)
    pixels = np.asarray(read_picture(tmp_path / "a.jpg")).reshape(-1, 3)[: len(expected)]
    assert np.abs(pixels.astype(int) - expected).max() <= (1 if data[:2] == b"\xff\xd8" else 0)


def test_a_square_is_cut_from_the_middle(tmp_path):
    wide = Image.new("RGB", (300, 100), "blue")
    wide.paste("red", (100, 0, 200, 100))
    for kind in ("PNG", "JPEG", "MPO"):
        (tmp_path / "a.jpg").write_bytes(saved(wide, kind))
        square = read_picture(tmp_path / "a.jpg", 20)
        assert square.size == (20, 20) and square.getpixel((10, 10))[0] > 250


MOVING = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
PHOTO = saved(Image.effect_noise((64, 64), 50), "JPEG")
BAD = {
    "animated WebP": (
        saved(MOVING[0], "WEBP", save_all=True, append_images=MOVING[1:]),
        "2 frames",
    ),
    "animated PNG": (saved(MOVING[0], save_all=True, append_images=MOVING[1:]), "2 frames"),
    "cut JPEG": (PHOTO[:-200], "truncated"),
    "cut PNG": (saved(Image.effect_noise((64, 64), 50))[:-500], "cannot be read"),
    "GIF": (saved(MOVING[0], "GIF"), "no PNG, JPEG or WebP"),
    "TIFF": (saved(MOVING[0], "TIFF"), "no PNG, JPEG or WebP"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no PNG, JPEG or WebP"),
    "AppleDouble": (b"\0\5\x16\7" + bytes(99), "no PNG, JPEG or WebP"),
    "empty": (b"", "no PNG, JPEG or WebP"),
    "web page": (b"<!doctype html>", "web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "huge": (
        saved(MOVING[0])[:16] + struct.pack(">II", 60000, 60000) + bytes(99),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_named(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ForgetError, match=f"a.png' .*{message}") as caught:
        read_picture(tmp_path / "a.png", 8)
    assert len(str(caught.value)) < 300 + len(str(tmp_path)) and "\n" not in str(caught.value)


def test_more_pixels_than_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ForgetError, match=r"a.png' cannot be read .Image size \(64 pixels"):
        read_picture(tmp_path / "a.png")


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "._a.jpg", ".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in picture_files(tmp_path)] == ["a.jpg", "b.PNG"]
    for folder in (tmp_path / "folder.png", tmp_path / "none"):
        with pytest.raises(ForgetError, match="There are no pictures"):
            picture_files(folder)


@pytest.mark.parametrize(
    "case, mean", [("grey 16", 128), ("turned", 85), ("palette, one clear", 175)]
)
def test_thumbnails_show_the_same(tmp_path, case, mean):
    (tmp_path / "a.png").write_bytes(GOOD[case][0])
    picture = Image.open(io.BytesIO(thumbnail_of_file(tmp_path / "a.png")))
    assert abs(np.asarray(picture).mean() - mean) < 12
    assert case != "turned" or picture.size == (1, 2)
