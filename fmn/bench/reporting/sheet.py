"""What plots are drawn with: a sheet, letters, colours, axes and legends, with PIL alone.

Sizes are in logical pixels; pictures have twice as many each way. Colours are those of Okabe and
Ito (2008), which colour-blind readers can tell apart, on a light ground.
"""

import math
import unicodedata
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ...errors import ForgetError
from ..names import UNTOUCHED

INK, SOFT, PALE, STRIPE = (31, 35, 40), (101, 109, 118), (222, 224, 227), (246, 247, 248)
PAPER, GREY = (255, 255, 255), (150, 155, 161)
PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0),
    (204, 121, 167), (86, 180, 233), (148, 130, 20), (60, 60, 60),
)  # fmt: skip
FINE = 4  # drawn this much larger, then halved: PIL draws lines without smoothing
MARKS = {  # name -> corners, angle of the first, radius for a half width of 1
    "circle": (48, 0, 1.0), "square": (4, 45, 1.25), "diamond": (4, 0, 1.35),
    "triangle": (3, -90, 1.4), "wedge": (3, 90, 1.4), "pentagon": (5, -90, 1.2),
}  # fmt: skip


def is_measured(value):
    """Whether a summary's entry holds a value."""
    return value is not None and value.get("value") is not None


class Sheet:
    """A picture to draw on in logical pixels."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (round(width * FINE), round(height * FINE)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour, width=1.0):
        points = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(points, colour, max(1, round(width * FINE)), joint="curve")

    def box(self, left, top, right, bottom, colour):
        self.draw.rectangle([left * FINE, top * FINE, right * FINE - 1, bottom * FINE - 1], colour)

    def mark(self, name, x, y, size, colour, outline=PAPER):
        """One of ``MARKS``; ``size`` is half its width."""
        count, start, grow = MARKS[name]
        turns = [math.radians(start + 360 * i / count) for i in range(count)]
        radius = size * grow * FINE
        points = [(x * FINE + radius * math.cos(t), y * FINE + radius * math.sin(t)) for t in turns]
        self.draw.polygon(points, colour)
        self.draw.line([*points, *points[:2]], outline, FINE, joint="curve")

    def text(self, x, y, text, size=12, colour=INK, anchor="lm", bold=False, halo=False):
        """One line, on an edge of paper colour if ``halo``. PIL's font has no bold face; a thin
        stroke stands in."""
        place, font = (x * FINE, y * FINE), _font(size)
        if halo:
            self.draw.text(place, text, PAPER, font, anchor, stroke_width=2 * FINE)
        self.draw.text(place, text, colour, font, anchor, stroke_width=int(bold))

    def text_upwards(self, x, y, text, size):
        """Bold text around a middle, read from below to above."""
        strip = Image.new("RGB", (round(text_width(text, size) + 8) * FINE, 2 * size * FINE), PAPER)
        middle = strip.width // 2, strip.height // 2
        ImageDraw.Draw(strip).text(middle, text, INK, _font(size), "mm", stroke_width=1)
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        corner = round(x * FINE - strip.width / 2), round(y * FINE - strip.height / 2)
        self.image.paste(strip, corner)

    def finished(self):
        """The PIL picture, smoothed."""
        return self.image.reduce(FINE // 2)


@cache
def _font(size):
    return ImageFont.load_default(size * FINE)


def text_width(text, size):
    """In logical pixels."""
    return _font(size).getlength(text) / FINE


def legible(text, size, room):
    """``text`` in the letters that PIL's font has, cut to ``room`` pixels; "?" for others."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in plain[:200])
    if text_width(plain, size) <= room:
        return plain
    while plain and text_width(plain + "...", size) > room:
        plain = plain[:-1]
    return plain.rstrip() + "..."


def colour_of(names, name):
    """Grey for the untouched model; beyond the palette, paler turns of it."""
    if name == UNTOUCHED:
        return GREY
    turn, place = divmod([n for n in names if n != UNTOUCHED].index(name), len(PALETTE))
    return mix(PALETTE[place], 0.6**turn)


def mix(colour, part):
    """``part`` of a colour on paper."""
    return tuple(round(part * c + (1 - part) * p) for c, p in zip(colour, PAPER))


@dataclass(frozen=True)
class Axis:
    """From values to pixels: values times ``factor`` from ``low`` to ``high``."""

    low: float
    high: float
    step: float
    factor: float
    start: float
    end: float

    def at(self, value):
        """The pixel of a value; one outside goes to the axis' end."""
        part = (value * self.factor - self.low) / (self.high - self.low)
        return self.start + min(max(part, 0), 1) * (self.end - self.start)

    def ticks(self):
        """Pairs of a round value and its label."""
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        digits = max(0, -math.floor(math.log10(self.step)))
        return [
            (i * self.step / self.factor, f"{i * self.step:.{digits}f}")
            for i in range(first, last + 1)
        ]


def axis_for(values, unit, start, end):
    """An axis that holds all values, and 0: shares go from 0 to 100."""
    if unit == "%":
        return Axis(0, 100, 25, 100, start, end)
    ends = [0.0] + [end for value in values if is_measured(value) for end in ends_of(value)]
    low, high = min(ends), max(ends)
    high = high if high > low else low + 1
    step = _step((high - low) / 4)
    return Axis(step * math.floor(low / step), step * math.ceil(high / step), step, 1, start, end)


def _step(rough):
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10 ** math.floor(math.log10(rough))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))


def ends_of(value):
    """The value and the ends of its interval, those that are there."""
    ends = [value[k] for k in ("value", "low", "high") if value.get(k) is not None]
    if not all(math.isfinite(end) for end in ends):
        raise ForgetError(
            f"A value to plot is {ends}, finite numbers were expected: measure it again."
        )
    return ends


def legend(names, room):
    """Where the names of methods go in lines of ``room`` pixels: lists of (x, name, colour)."""
    lines, x = [[]], 0
    for name in names:
        text = legible(name, 12, 220)
        width = 18 + text_width(text, 12) + 20
        if lines[-1] and x + width > room:
            lines.append([])
            x = 0
        lines[-1].append((x, text, colour_of(names, name)))
        x += width
    return lines


def draw_legend(sheet, lines, left, top):
    """Draw ``legend``'s lines, 20 pixels each."""
    for i, line in enumerate(lines):
        y = top + 20 * i
        for x, text, colour in line:
            sheet.box(left + x, y - 6, left + x + 12, y + 6, colour)
            sheet.text(left + x + 18, y, text)


def side_by_side(places, gap=11, room=44):
    """Points (x, y), those at the same pixel moved apart along x, within ``room`` pixels."""
    groups = {}
    for i, (x, y) in enumerate(places):
        groups.setdefault((round(x), round(y)), []).append(i)
    moved = list(places)
    for same in groups.values():
        step = min(gap, room / max(1, len(same) - 1))
        for k, i in enumerate(same):
            moved[i] = places[i][0] + step * (k - (len(same) - 1) / 2), places[i][1]
    return moved


def place_labels(points, bounds, size=10):
    """Corners for labels such that none covers another or a mark; None where no place is free.

    Args:
        points: (x, y, text), with a mark at each. bounds: left, top, right, bottom.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    corners = []
    for x, y, text in points:
        width, height = text_width(text, size), size * 1.2
        for corner in _around(x, y, width, height):
            box = *corner, corner[0] + width, corner[1] + height
            if _inside(box, bounds) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                corners.append(corner)
                break
        else:
            corners.append(None)
    return corners


def _around(x, y, width, height):
    """Upper left corners of a box beside a mark: near ones first, right before left."""
    for gap in (8, 14):
        middle = y - height / 2
        yield x + gap, middle
        yield x - gap - width, middle
        yield x - width / 2, y - gap - height
        yield x - width / 2, y + gap
        for across in (x + gap * 0.6, x - gap * 0.6 - width):
            yield across, y - gap * 0.6 - height
            yield across, y + gap * 0.6


def _inside(box, bounds):
    return (
        box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
    )


def _overlap(one, two):
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
