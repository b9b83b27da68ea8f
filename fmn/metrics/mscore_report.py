"""What an M-Score says, as text and as a picture."""

from statistics import mean, stdev

from PIL import Image, ImageDraw, ImageFont

from ..pictures import ACCENT, INK, PALE, PAPER

BEFORE, AFTER = (70, 110, 170), ACCENT
WIDTH, LEFT, ROW, HEAD, MARGIN = 640, 190, 64, 34, 24


def spread(values):
    """Mean and standard deviation as text; one value has no spread."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def report(name, found, compared):
    """Lines on one concept.

    Args:
        found: what ``mscore.summary`` returns.
        compared: whether "before" is another model than "after".
    """
    lines = [f"M-Score of {name}: words learned from pictures against the name, cosine"]
    if compared:
        difference = mean(found["after"]) - mean(found["before"])
        lines += [
            f"untouched   {spread(found['before'])}",
            f"this model  {spread(found['after'])}   difference {difference:+.3f}",
        ]
    else:
        lines.append(f"this model  {spread(found['after'])}")
    lines.append(f"random words, before learning  {spread(found['start'])}")
    lines += [
        f"name of '{other}'  {value:.3f}; learned words against it  "
        f"{spread(found['others'][other]['after'])}"
        for other, value in found["between"].items()
    ]
    seeds = len(found["after"])
    lines.append(
        f"± is the standard deviation over {seeds} inversions"
        if seeds > 1
        else "one inversion: no spread is known; use three seeds or more"
    )
    return "\n".join(lines)


def plot(results, compared):
    """One row a concept, a dot a seed, a line at the mean; from 0 to 1.

    Args:
        results: concept's name -> what ``mscore.summary`` returns.
    """
    picture = Image.new("RGB", (WIDTH, HEAD + ROW * len(results) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    bottom = HEAD + ROW * len(results)
    for tick in range(6):
        x = _x(tick / 5)
        draw.line((x, HEAD, x, bottom), fill=PALE)
        draw.text((x - 8, bottom + 4), f"{tick / 5:.1f}", INK, font=_font(11))
    kinds = {
        "start": ("random", PALE),
        "before": ("untouched", BEFORE),
        "after": ("this model", AFTER),
    }
    if not compared:
        del kinds["before"]
    left = LEFT
    for title, colour in kinds.values():
        draw.ellipse((left, 12, left + 8, 20), fill=colour, outline=INK)
        draw.text((left + 13, 9), title, INK, font=_font(12))
        left += 110
    for row, (name, found) in enumerate(results.items()):
        top = HEAD + row * ROW
        draw.text((10, top + ROW // 2 - 8), name[:24], INK, font=_font(13))
        for i, (kind, (_, colour)) in enumerate(kinds.items()):
            _dots(draw, found[kind], top + ROW * (i + 1) // (len(kinds) + 1), colour)
    return picture


def _dots(draw, values, y, colour):
    x = _x(mean(values))
    draw.line((x, y - 8, x, y + 8), fill=INK, width=2)
    for value in values:
        x = _x(value)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline=INK)


def _x(value):
    return LEFT + (WIDTH - LEFT - MARGIN) * min(max(value, 0.0), 1.0)


def _font(size):
    return ImageFont.load_default(size)
