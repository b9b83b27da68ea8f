"""Draw icons at 128 x 128 pixels, and derive three styles from the drawings.

Nothing here depends on the machine: shapes are filled by resvg, blurs and scaling are PIL's, which
count in integers, and the rest is plain arithmetic per pixel.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

SIDE, LONGER = 128, 114
CELL = 8  # pixels; the autoencoder's patch, so that a cell survives it
PAPER_BLUE, INK_WHITE = (22, 66, 152), (244, 248, 255)
NIGHT, ICE = (10, 6, 20), (150, 215, 255)


def draw_svg(body, width, height):
    """An icon's inner SVG with its view box's size, as RGBA [128, 128, 4], fitted and centred."""
    scale = SIDE / max(width, height)
    box = _alpha_box(_render(body, width, height, 0, 0, scale))
    scale_to = scale * LONGER / max(box[2] - box[0], box[3] - box[1])
    ratio = scale_to / scale
    left = SIDE / 2 - ratio * (box[0] + box[2]) / 2
    top = SIDE / 2 - ratio * (box[1] + box[3]) / 2
    return _render(body, width, height, left, top, scale_to)


def _render(body, width, height, left, top, scale):
    """The inner svg element keeps the clipping of the icon's own view box."""
    import resvg  # only drawing needs it, and not every machine that trains has it

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}"><svg x="{left:.4f}" y="{top:.4f}" '
        f'width="{width * scale:.4f}" height="{height * scale:.4f}" '
        f'viewBox="0 0 {width} {height}">{body}</svg></svg>'
    )
    tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
    # resvg reads the two rows of a 2 x 3 matrix; the usual order (1, 0, 0, 1, 0, 0) draws nothing
    png = bytes(resvg.render(tree, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _alpha_box(picture):
    rows, columns = np.nonzero(picture[..., 3] > 8)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def draw_bitmap(data):
    """An encoded RGBA picture (bytes), cut to what is visible, as RGBA [128, 128, 4]."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = picture.crop(_alpha_box(np.asarray(picture)))
    scale = LONGER / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    small = picture.resize(size, Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    paper.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(paper)


def on_white(rgba):
    """RGB [H, W, 3] of an RGBA picture laid on white."""
    colour, alpha = rgba[..., :3].astype(np.int32), rgba[..., 3:].astype(np.int32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def blueprint(ink):
    """White lines on blue from a drawing in ink: RGBA [H, W, 4] to RGB [H, W, 3]."""
    return _mix(PAPER_BLUE, INK_WHITE, outlines(ink).astype(np.int32)[..., None])


def outlines(ink):
    """How much a pixel is line [H, W], 0 to 255: filled areas of a drawing become hollow."""
    cover = ink[..., 3].astype(np.int32)
    inside = np.asarray(
        Image.fromarray(np.ascontiguousarray(ink[..., 3])).filter(ImageFilter.MinFilter(9)),
        np.int32,
    )
    return (cover - inside).astype(np.uint8)


def _mix(low, high, part):
    """From ``low`` to ``high``, colours [..., 3], as ``part`` goes from 0 to 255."""
    low, high = np.asarray(low, np.int32), np.asarray(high, np.int32)
    return ((low * (255 - part) + high * part + 127) // 255).astype(np.uint8)


def pixel_art(flat, colours=10):
    """Cells of 8 x 8 pixels in few colours, from a flat drawing: RGBA [H, W, 4] to RGB [H, W, 3].

    A cell gets the colour that fills most of it; rare colours count for more, or eyes would go.
    """
    palette, index = _palette(flat, colours)
    cells = index.reshape(index.shape[0] // CELL, CELL, index.shape[1] // CELL, CELL)
    cells = cells.transpose(0, 2, 1, 3).reshape(cells.shape[0], cells.shape[2], CELL * CELL)
    counts = (cells[..., None] == np.arange(len(palette))).sum(2)
    totals = np.maximum(np.bincount(index.ravel(), minlength=len(palette)), 1)
    # Squares, to stay within integers: a colour's weight falls with the root of its whole area.
    score = counts.astype(np.int64) ** 2 * 1_000_000 // totals
    score[..., 0] = np.where(2 * counts[..., 0] > CELL * CELL, 1 << 60, 0)
    chosen = palette[score.argmax(-1)]
    return np.repeat(np.repeat(chosen, CELL, 0), CELL, 1)


def _palette(flat, colours):
    """White and the most frequent solid colours [n, 3], and the nearest one's index [H, W]."""
    solid, picture = flat[..., 3] > 127, flat[..., :3].astype(np.int32)
    found, counts = np.unique(picture[flat[..., 3] == 255], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = []
    for candidate in found[order]:
        if len(kept) < colours - 1 and all(((candidate - k) ** 2).sum() > 900 for k in kept):
            kept.append(candidate)
    palette = np.asarray([(255, 255, 255), *kept], np.int32)
    distance = ((picture[:, :, None] - palette[1:]) ** 2).sum(-1)
    return palette.astype(np.uint8), np.where(solid, distance.argmin(-1) + 1, 0)


def neon_sign(ink, coloured):
    """Glowing lines on a dark ground: lines of one drawing, hues of another, RGBA to RGB."""
    colour = _hues(coloured)
    cover = outlines(ink)
    lines = Image.fromarray(cover)
    near = np.asarray(lines.filter(ImageFilter.GaussianBlur(3)), np.int32)
    far = np.asarray(lines.filter(ImageFilter.GaussianBlur(9)), np.int32)
    glow = np.minimum((near + 2 * far) * 5 // 10, 255)[..., None]
    picture = _mix(NIGHT, colour, glow)
    core = (colour * 2 + 255) // 3
    return _mix(picture, core, cover.astype(np.int32)[..., None])


def _hues(rgba):
    """A smooth field of bright, saturated colours [H, W, 3] from where a drawing has colour."""
    rgb = rgba[..., :3].astype(np.int32)
    chroma = (rgb.max(-1) - rgb.min(-1)) * (rgba[..., 3] > 127)
    weight = np.where(chroma > 40, chroma, 0)[..., None]
    parts = [_blurred(rgb[..., i : i + 1] * weight // 255) for i in range(3)]
    total = _blurred(weight)
    field = np.stack(parts, -1)
    low, high = field.min(-1, keepdims=True), field.max(-1, keepdims=True)
    spread = np.maximum(high - low, 1)
    # The least channel falls to 40 and the greatest rises to 255: hue without grey.
    vivid = 40 + (field - low) * 215 // spread
    return np.where((total[..., None] > 6) & (high - low > 1), vivid, np.asarray(ICE))


def _blurred(values):
    image = Image.fromarray(values[..., 0].clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(6)), np.int32)
