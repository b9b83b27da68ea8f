"""Small pictures with PIL: what training shows while it runs, and grids of results."""

import base64
import io
import re
import struct

import torch
from PIL import Image, ImageDraw, ImageFont

from .errors import ForgetError

INK, PALE, ACCENT, PAPER = (40, 44, 52), (205, 209, 216), (214, 69, 65), (250, 250, 248)


def maps_picture(before, now):
    """Where a concept's attention was and is, 448 x 248 pixels.

    Args:
        before, now: ``probe.Attention``.
    """
    picture = Image.new("RGB", (448, 248), PAPER)
    draw = ImageDraw.Draw(picture)
    brightest = max(float(before.map.max()), 1e-9)
    for left, name, attention in ((12, "before", before), (236, "now", now)):
        picture.paste(heat_map(attention.map / brightest, 200), (left, 40))
        draw.text((left, 4), f"{name}: {attention.share:.2%}", INK, font=_font(15))
        draw.text((left, 22), "of attention on the concept", INK, font=_font(12))
    return picture


def loss_picture(losses, total):
    """The loss so far, 448 x 160 pixels."""
    picture = Image.new("RGB", (448, 160), PAPER)
    draw = ImageDraw.Draw(picture)
    _curve(draw, (12, 28, 436, 148), losses, total)
    draw.text((12, 8), f"loss {losses[-1]:.4g}", INK, font=_font(13))
    return picture


def _curve(draw, box, losses, total):
    left, top, right, bottom = box
    draw.rectangle(box, outline=PALE)
    high = max(losses) or 1.0
    points = [
        (
            left + (right - left) * (i + 1) / total,
            bottom - (bottom - top - 4) * value / high,
        )
        for i, value in enumerate(losses)
    ]
    if len(points) > 1:
        draw.line(points, fill=ACCENT, width=2)
    else:
        x, y = points[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ACCENT)


def heat_map(values, side):
    """A [h, w] tensor of 0..1 as a picture: dark blue, over red, to pale yellow."""
    stops = ((0.0, (12, 16, 60)), (0.5, (200, 50, 60)), (1.0, (255, 240, 150)))
    image = Image.new("RGB", (values.shape[1], values.shape[0]))
    image.putdata([_between(stops, value) for value in values.clamp(0, 1).flatten().tolist()])
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _between(stops, value):
    for (low, first), (high, second) in zip(stops, stops[1:]):
        if value <= high:
            part = (value - low) / (high - low)
            return tuple(round(a + (b - a) * part) for a, b in zip(first, second))
    return stops[-1][1]


def to_image(pixels):
    """A PIL picture from floats [H, W, 3] in 0..1."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def png_text(picture):
    """A PIL picture as base64 of a PNG, for JSON and HTML."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def jpeg_text(picture, side):
    """A PIL picture of at most ``side`` pixels a side as base64 of a JPEG."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def labelled_grid(rows, columns, side=128):
    """A grid with a title over each column and a label beside each row.

    Args:
        rows: list of (label, [PIL pictures]). columns: titles, one a picture of a row.
    """
    font, label_width, head, gap = _font(13), 250, 26, 6
    width = label_width + len(columns) * (side + gap)
    grid = Image.new("RGB", (width, head + len(rows) * (side + gap)), PAPER)
    draw = ImageDraw.Draw(grid)
    for i, title in enumerate(columns):
        draw.text((label_width + i * (side + gap), 6), title, INK, font=font)
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (side + gap)
        draw.text((10, top + side // 2 - 8), label, INK, font=font)
        for i, picture in enumerate(pictures):
            grid.paste(picture.resize((side, side)), (label_width + i * (side + gap), top))
    return grid


def beside(pictures):
    """Pictures side by side."""
    size = sum(picture.width for picture in pictures), max(p.height for p in pictures)
    row, left = Image.new("RGB", size, PAPER), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def square(images, size):
    """Pictures [N, H, W, 3] -> [N, 3, size, size]: shorter side to ``size``, centre cut out."""
    images = images[..., :3].movedim(-1, 1)  # an alpha channel is dropped
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    images = torch.nn.functional.interpolate(
        images, size=shape, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images[..., top : top + size, left : left + size].clamp(0, 1)


def _font(size):
    return ImageFont.load_default(size)


pass

SIZE = 512, 256  # pixels that a thumbnail has at most
MOST = 4  # pictures in a row
MAX_BYTES = 8 << 20  # of a picture's file
MAX_URI = 1 << 20  # letters of a picture in a header
MAX_PIXELS = 1 << 25
FORMATS = "JPEG", "PNG", "WEBP"
URI = re.compile(r"data:image/(?:jpeg|png|webp);base64,", re.ASCII)


def data_uri(images):
    """The first pictures of [N, H, W, C] in 0..1, side by side, as a data URI of a small JPEG."""
    pictures = []
    for pixels in images[:MOST]:
        picture = to_image(pixels[..., :3])
        picture.thumbnail((SIZE[0], SIZE[1]))
        pictures.append(picture)
    jpeg = _jpeg(beside(pictures))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def of_uri(text):
    """A small JPEG of a data URI.

    Raises:
        ForgetError: it is too long, of another kind, or no picture.
    """
    head = URI.match(text)
    if len(text) > MAX_URI or not head:
        raise ForgetError(
            f"The thumbnail in the patch is no picture we show: it has to be a JPEG, PNG or WebP "
            f"as a data URI of at most {MAX_URI} letters; save the patch with another."
        )
    try:
        data = base64.b64decode(text[head.end() :], validate=True)
    except ValueError as error:
        raise _broken(error) from error
    return of_bytes(data)


def of_file(path):
    """A small JPEG of a picture's file.

    Raises:
        ForgetError: it is too large, gone, or no picture.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _broken(error.strerror) from error
    return of_bytes(data)


def of_bytes(data):
    """A small JPEG of a JPEG, PNG or WebP.

    Raises:
        ForgetError: it is too large or no picture.
    """
    if len(data) > MAX_BYTES:
        raise ForgetError(
            f"The thumbnail has more than {MAX_BYTES >> 20} MiB: use a smaller picture."
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ForgetError(
                    f"The thumbnail has {picture.width} x {picture.height} pixels: use a picture "
                    f"of at most {MAX_PIXELS} pixels."
                )
            picture.draft("RGB", (2 * SIZE[0], 2 * SIZE[1]))  # large JPEGs decode faster so
            return _jpeg(picture)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise _broken(error) from error


def _jpeg(picture):
    picture = picture.convert("RGBA") if picture.mode in ("P", "LA", "PA") else picture
    picture.thumbnail(SIZE)
    mask = picture.getchannel("A") if picture.mode == "RGBA" else None
    # A new picture, as a copy would take comments and profiles along.
    drawn = Image.new("RGB", picture.size, PAPER)
    drawn.paste(picture.convert("RGB"), mask=mask)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _broken(reason):
    return ForgetError(
        f"The thumbnail is no JPEG, PNG or WebP that can be read ({reason!s:.120}): "
        "use another picture."
    )
