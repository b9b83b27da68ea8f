"""Pictures with PIL: conversions, drawings of a training, grids, and thumbnails of patches."""

import base64
import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .downloads import AnyPath, first_bytes
from .errors import ForgetError
from .files import PICTURES
from .progress import ConceptAttention

INK, PALE, ACCENT, PAPER = (40, 44, 52), (205, 209, 216), (214, 69, 65), (250, 250, 248)
WHITE = (255, 255, 255)
HEAT = (0.0, 0.5, 1.0), ((12, 16, 60), (200, 50, 60), (255, 240, 150))  # values, their colours
THUMBNAIL_SIZE = 512, 256  # pixels at most
MOST_PICTURES = 4  # of a thumbnail
MAX_BYTES = 8 << 20  # of a picture's file
MAX_URI = 1 << 20  # letters of a picture in a header
MAX_PIXELS = 1 << 25
FORMATS = "JPEG", "PNG", "WEBP"
# What PIL raises for files that are not what they claim to be.
BROKEN = OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error
URI = re.compile(r"data:image/(?:jpeg|png|webp);base64,", re.ASCII)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """A PIL picture from floats [H, W, 3] in 0..1."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def picture_files(folder: AnyPath) -> list[Path]:
    """The PNG, JPEG and WebP files of a folder, by name, without the hidden ones that other systems
    leave there, such as ``._a.jpg``.

    Raises:
        ForgetError: there are none.
    """
    files = [
        file
        for file in sorted(Path(folder).glob("*"))
        if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise ForgetError(f"There are no pictures (PNG, JPEG, WebP) in '{folder}'.")
    return files


def read_picture(path: AnyPath, side: int | None = None) -> Image.Image:
    """An untrusted picture file, ``plain``; with ``side``, its centred square of so many pixels.

    Raises:
        ForgetError: it cannot be read, moves, or has too many pixels.
    """
    path = Path(path)
    first_bytes(path)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            # Cameras add further pictures to a JPEG, which is no animation.
            frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
            if frames > 1:
                raise ForgetError(
                    f"The picture '{path}' is animated, with {frames} frames: save the frame you "
                    "mean as a picture of its own."
                )
            if not side:
                return plain(picture)
            picture.draft("RGB", (2 * side, 2 * side))  # large JPEGs decode faster
            return ImageOps.fit(plain(picture), (side, side))
    except (*BROKEN, Image.DecompressionBombError) as error:
        reason = (
            "it is no PNG, JPEG or WebP" if isinstance(error, UnidentifiedImageError) else error
        )
        raise ForgetError(
            f"The picture '{path}' cannot be read ({reason!s:.120}): save it again, or take it out."
        ) from error


def plain(picture: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A picture as it is meant to be seen: RGB of 8 bits, upright, what is transparent in the
    colour of the background."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey: PIL's own conversion cuts at 255
        picture = picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    bare = Image.new("RGB", picture.size, background)  # and without the file's comments
    bare.paste(picture, mask=picture if picture.mode == "RGBA" else None)
    return bare


def square(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures [N, H, W, C] -> the centres [N, 3, size, size], shorter side scaled to ``size``."""
    images = images[..., :3].movedim(-1, 1)  # an alpha channel is dropped
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    images = torch.nn.functional.interpolate(
        images, size=shape, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images[..., top : top + size, left : left + size].clamp(0, 1)


def png_text(picture: Image.Image) -> str:
    """A picture as base64 of a PNG, for JSON and HTML."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def jpeg_text(picture: Image.Image, side: int) -> str:
    """A picture of at most ``side`` pixels a side as base64 of a JPEG."""
    return base64.b64encode(_jpeg(picture.copy(), (side, side))).decode()


def _jpeg(picture: Image.Image, size: tuple[int, int] = THUMBNAIL_SIZE) -> bytes:
    """The picture as a small JPEG, without the comments and profiles it came with."""
    picture = plain(picture, PAPER)
    picture.thumbnail(size)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def heat_map(values: torch.Tensor, side: int) -> Image.Image:
    """Values [h, w] in 0..1 as a picture: dark blue, over red, to pale yellow."""
    levels, colours = HEAT
    channels = [np.interp(values.clamp(0, 1), levels, channel) for channel in zip(*colours)]
    image = Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def maps_picture(before: ConceptAttention, now: ConceptAttention) -> Image.Image:
    """A concept's attention maps before training and now, 448 x 248 pixels."""
    picture = Image.new("RGB", (448, 248), PAPER)
    draw = ImageDraw.Draw(picture)
    brightest = max(float(before.map.max()), 1e-9)
    for left, name, attention in ((12, "before", before), (236, "now", now)):
        picture.paste(heat_map(attention.map / brightest, 200), (left, 40))
        draw.text((left, 4), f"{name}: {attention.share:.2%}", INK, font=ImageFont.load_default(15))
        draw.text((left, 22), "of attention on the concept", INK, font=ImageFont.load_default(12))
    return picture


def loss_picture(losses: Sequence[float], total: int) -> Image.Image:
    """The losses of the steps so far, of ``total`` steps, 448 x 160 pixels."""
    picture = Image.new("RGB", (448, 160), PAPER)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = box = 12, 28, 436, 148
    draw.rectangle(box, outline=PALE)
    highest = max(losses) or 1.0
    points = [
        (left + (right - left) * step / total, bottom - (bottom - top - 4) * loss / highest)
        for step, loss in enumerate(losses, 1)
    ]
    if len(points) > 1:
        draw.line(points, fill=ACCENT, width=2)
    else:
        x, y = points[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ACCENT)
    draw.text((12, 8), f"loss {losses[-1]:.4g}", INK, font=ImageFont.load_default(13))
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    size = sum(picture.width for picture in pictures), max(p.height for p in pictures)
    row, left = Image.new("RGB", size, PAPER), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], side: int = 128
) -> Image.Image:
    """A grid with a title over each column and a label beside each row.

    Args:
        rows: (label, pictures) of each row. columns: titles, one a picture of a row.
        side: pixels of a picture.
    """
    font, label_width, head, gap = ImageFont.load_default(13), 250, 26, 6
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


def thumbnail_uri(images: torch.Tensor) -> str:
    """The first pictures of [N, H, W, C] in 0..1, side by side, as a data URI of a small JPEG."""
    pictures = [to_image(pixels[..., :3]) for pixels in images[:MOST_PICTURES]]
    for picture in pictures:
        picture.thumbnail(THUMBNAIL_SIZE)
    jpeg = _jpeg(side_by_side(pictures))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def thumbnail_of_uri(text: str) -> bytes:
    """A small JPEG from an untrusted data URI.

    Raises:
        ForgetError: the URI is too long, of another kind, or holds no picture.
    """
    head = URI.match(text)
    if len(text) > MAX_URI or not head:
        raise ForgetError(
            "The thumbnail in the patch cannot be shown: it has to be a JPEG, PNG or WebP as a "
            f"data URI of at most {MAX_URI} letters; save the patch with another."
        )
    try:
        data = base64.b64decode(text[head.end() :], validate=True)
    except ValueError as error:
        raise _unreadable(error) from error
    return thumbnail_of_bytes(data)


def thumbnail_of_file(path: AnyPath) -> bytes:
    """A small JPEG from an untrusted picture file.

    Raises:
        ForgetError: the file is too large, missing, or no picture.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(error.strerror) from error
    return thumbnail_of_bytes(data)


def thumbnail_of_bytes(data: bytes) -> bytes:
    """A small JPEG from the bytes of an untrusted JPEG, PNG or WebP.

    Raises:
        ForgetError: the picture is too large, or it is none.
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
            # Large JPEGs decode faster at a fraction of their size.
            picture.draft("RGB", (2 * THUMBNAIL_SIZE[0], 2 * THUMBNAIL_SIZE[1]))
            return _jpeg(picture)
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(error) from error


def _unreadable(reason: object) -> ForgetError:
    return ForgetError(
        f"The thumbnail is no readable JPEG, PNG or WebP ({reason!s:.120}): use another picture."
    )
