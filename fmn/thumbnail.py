"""Thumbnails of patches: made when a patch is saved, and taken from strangers' files.

A stranger's picture is decoded here, within bounds, and only what Pillow drew of it goes on, as a
small JPEG without metadata.
"""

import base64
import io
import re
import struct

from PIL import Image

from .errors import ForgetError
from .pictures import PAPER, beside, to_image

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
