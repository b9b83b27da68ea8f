import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fmn.images import (
    ACCENT,
    PAPER,
    heat_map,
    jpeg_text,
    labelled_grid,
    loss_picture,
    maps_picture,
    side_by_side,
    square,
    to_image,
)
from fmn.models.attention_maps import Attention

DARK, MIDDLE, BRIGHT = (12, 16, 60), (200, 50, 60), (255, 240, 150)


def plain(colour, side=8):
    return Image.new("RGB", (side, side), colour)


def colours(picture):
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


def accent_places(picture):
    """(row, column) of every pixel of the curve."""
    return np.argwhere((np.asarray(picture) == ACCENT).all(-1))


def look(share, value):
    return Attention(share, torch.full((32, 32), value), torch.zeros(0, 32, 32))


def maps(before=0.5, now=0.0):
    return maps_picture(look(before, before), look(now, now))


def draw(losses, total=4):
    return loss_picture(losses, total)


@pytest.mark.parametrize(
    "value, colour",
    [(0.0, DARK), (0.5, MIDDLE), (1.0, BRIGHT), (-3.0, DARK), (7.0, BRIGHT), (0.25, (106, 33, 60))],
)
def test_heat_map_of_one_value(value, colour):
    picture = heat_map(torch.full((4, 4), value), 16)
    assert picture.size == (16, 16) and colours(picture) == {colour}


def test_heat_map_keeps_places():
    picture = heat_map(torch.tensor([[0.0, 1.0], [0.5, 0.0]]), 2)
    assert [picture.getpixel(place) for place in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        DARK, BRIGHT, MIDDLE, DARK,
    ]  # fmt: skip


def test_heat_map_of_a_wide_tensor():
    picture = heat_map(torch.tensor([[0.0, 1.0]]), 2)
    assert [picture.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [DARK, BRIGHT] * 2


def test_to_image_rounds_and_clamps():
    pixels = torch.tensor([[[0.0, 0.5, 1.0], [-1.0, 2.0, 0.0019]], [[1.0, 1.0, 1.0]] * 2])
    picture = to_image(pixels)
    assert picture.size == (2, 2) and picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (0, 128, 255)
    assert picture.getpixel((1, 0)) == (0, 255, 0)


def test_grid_places_its_pictures():
    rows = [("a dog", [plain("red"), plain("lime")]), ("a cat", [plain("blue"), plain("white")])]
    grid = labelled_grid(rows, ["before", "after"], side=32)
    assert grid.size == (250 + 2 * 38, 26 + 2 * 38)
    for row, top in enumerate((26, 64)):
        for column, left in enumerate((250, 288)):
            cell = grid.crop((left, top, left + 32, top + 32))
            assert colours(cell) == colours(rows[row][1][column])
    assert colours(grid.crop((250, 58, 326, 64))) == {PAPER}  # between the rows


def test_grid_writes_labels_and_titles():
    blank = labelled_grid([("", [plain("red")])], [""], side=32)
    labelled = labelled_grid([("a dog", [plain("red")])], [""], side=32)
    titled = labelled_grid([("", [plain("red")])], ["before"], side=32)
    for picture, box in ((labelled, (0, 26, 250, 58)), (titled, (250, 0, 288, 26))):
        assert colours(blank.crop(box)) == {PAPER}
        assert len(colours(picture.crop(box))) > 1


def test_side_by_side():
    sizes = ((3, 5), "red"), ((4, 2), "blue"), ((1, 4), "lime")
    row = side_by_side([Image.new("RGB", size, colour) for size, colour in sizes])
    assert row.size == (8, 5)
    assert colours(row.crop((0, 0, 3, 5))) == {(255, 0, 0)}
    assert colours(row.crop((3, 0, 7, 2))) == {(0, 0, 255)}
    assert colours(row.crop((7, 0, 8, 4))) == {(0, 255, 0)}
    assert colours(row.crop((3, 2, 7, 5))) == {PAPER}


def test_maps_are_side_by_side():
    picture = maps(before=0.5, now=0.25)
    assert picture.size == (448, 248)
    # Both are scaled by the brightest place before training.
    assert colours(picture.crop((12, 40, 212, 240))) == {BRIGHT}
    assert colours(picture.crop((236, 40, 436, 240))) == {MIDDLE}


def test_maps_without_any_attention():
    assert colours(maps(before=0.0, now=0.0).crop((12, 40, 212, 240))) == {DARK}


def test_shares_are_written():
    box = 0, 0, 448, 22
    pictures = [maps(), maps(before=0.4), maps(now=0.1)]
    assert len({picture.crop(box).tobytes() for picture in pictures}) == 3


def test_jpeg_text():
    data = base64.b64decode(jpeg_text(plain("red", 64), 16))
    small = Image.open(io.BytesIO(data))
    assert small.format == "JPEG" and small.size == (16, 16)
    assert np.abs(np.asarray(small).mean((0, 1)) - (255, 0, 0)).max() < 6
    assert Image.open(io.BytesIO(base64.b64decode(jpeg_text(plain("red"), 16)))).size == (8, 8)


def test_curve_falls_with_the_loss():
    places = accent_places(draw([4.0, 2.0, 1.0, 0.0]))
    assert places[:, 1].min() >= 12 and places[:, 1].max() <= 437
    rows = [places[places[:, 1] == column][:, 0].mean() for column in (124, 220, 325, 425)]
    assert rows == sorted(rows) and rows[0] < 45 and rows[-1] > 130


def test_curve_grows_with_the_steps():
    half, whole = (accent_places(draw([1.0] * n, total=10)) for n in (5, 10))
    assert abs(half[:, 1].max() - 224) <= 2 and abs(whole[:, 1].max() - 436) <= 2
    assert half[:, 0].min() == whole[:, 0].min()


def test_first_step_is_a_dot():
    places = accent_places(draw([3.0], total=4))
    assert np.abs(places - (32, 118)).max() <= 2 and len(places) > 4


def test_losses_of_zero_lie_on_the_ground():
    assert np.abs(accent_places(draw([0.0, 0.0]))[:, 0] - 148).max() <= 2


def test_the_loss_is_written():
    box = 0, 0, 448, 26
    assert draw([1.0]).crop(box).tobytes() != draw([2.0]).crop(box).tobytes()


def columns(height, width):
    """A picture whose red is its column and green its row, over 100."""
    picture = torch.zeros(1, height, width, 3)
    picture[..., 0] = torch.arange(width) / 100
    picture[..., 1] = torch.arange(height)[:, None] / 100
    return picture


@pytest.mark.parametrize(
    "height, width, left, top", [(4, 8, 2, 0), (8, 4, 0, 2), (4, 4, 0, 0), (4, 7, 1, 0)]
)
def test_square_cuts_out_the_centre(height, width, left, top):
    cut = square(columns(height, width), 4)
    expected = columns(height, width)[:, top : top + 4, left : left + 4].movedim(-1, 1)
    torch.testing.assert_close(cut, expected)


def test_square_averages_when_it_shrinks():
    stripes = torch.zeros(1, 64, 64, 3)
    stripes[:, :, 0::8] = stripes[:, :, 1::8] = 1  # a quarter is white
    small = square(stripes, 8)
    assert small.shape == (1, 3, 8, 8)
    inner = small[..., 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), atol=1e-3, rtol=0)


@pytest.mark.parametrize("height, width", [(3, 5), (513, 512), (512, 511), (100, 999), (7, 1)])
def test_square_always_fits(height, width):
    made = square(torch.full((2, height, width, 3), 0.25), 64)
    assert made.shape == (2, 3, 64, 64)
    torch.testing.assert_close(made, torch.full_like(made, 0.25))


def test_square_clamps():
    assert square(torch.full((1, 4, 4, 3), 1.5), 4).max() == 1
