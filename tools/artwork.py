"""Draw the pack's icon and banner, web/icon.png and web/banner.png: python tools/artwork.py

A forget-me-not: five blue petals, a white ring, a yellow eye. On the banner the flower fades into
single squares from left to right, as what is forgotten does.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

WEB = Path(__file__).resolve().parents[1] / "web"
FINE = 4  # drawn so much larger, then shrunk, for smooth edges
ICON = (400, 400)
BANNER = (1260, 540)  # 21:9
NIGHT, LEAF = (24, 30, 48), (92, 138, 104)
PETAL, RIM, VEIN = (112, 158, 232), (92, 136, 214), (150, 188, 245)
RING, EYE, PIT = (248, 246, 236), (246, 204, 84), (198, 140, 44)


def circle(draw, x, y, radius, fill):
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)


def flower(draw, x, y, radius, turn=0.0):
    """A forget-me-not around (x, y); ``turn`` in degrees."""
    petal = 0.46 * radius
    angles = [math.radians(turn - 90 + 72 * i) for i in range(5)]
    places = [(x + 0.54 * radius * math.cos(a), y + 0.54 * radius * math.sin(a)) for a in angles]
    for px, py in places:
        circle(draw, px, py, petal, RIM)
    for px, py in places:
        circle(draw, px, py, 0.92 * petal, PETAL)
    circle(draw, x, y, 0.4 * radius, PETAL)
    for angle in angles:
        for side in (-14, 0, 14):
            a = angle + math.radians(side)
            start, end = 0.3 * radius, (0.7 if side == 0 else 0.6) * radius
            line = [(x + r * math.cos(a), y + r * math.sin(a)) for r in (start, end)]
            draw.line(line, VEIN, max(1, round(0.018 * radius)))
    # The ring has five teeth, one towards each petal.
    teeth = []
    for i in range(10):
        a = math.radians(turn - 90 + 36 * i)
        r = (0.32 if i % 2 == 0 else 0.22) * radius
        teeth.append((x + r * math.cos(a), y + r * math.sin(a)))
    draw.polygon(teeth, fill=RING)
    circle(draw, x, y, 0.17 * radius, EYE)
    circle(draw, x, y, 0.06 * radius, PIT)


def leaf(draw, x, y, length, turn):
    """A leaf from (x, y) on, ``turn`` in degrees."""
    a = math.radians(turn)
    along, across = (math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))
    outline = []
    for side in (1, -1):
        steps = range(21) if side == 1 else range(20, -1, -1)
        for i in steps:
            t, width = i / 20, 0.2 * length * math.sin(math.pi * (i / 20) ** 0.8)
            outline.append(
                tuple(
                    start + t * length * forward + side * width * sideways
                    for start, forward, sideways in zip((x, y), along, across)
                )
            )
    draw.polygon(outline, fill=LEAF)


def icon():
    width, height = (side * FINE for side in ICON)
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle([0, 0, width - 1, height - 1], 0.18 * width, fill=NIGHT)
    for turn in (35, 160):
        leaf(draw, width / 2, 0.5 * height, 0.48 * width, turn)
    flower(draw, width / 2, 0.49 * height, 0.4 * width)
    return picture.resize(ICON, Image.LANCZOS)


def banner():
    width, height = (side * FINE for side in BANNER)
    picture = Image.new("RGB", (width, height), NIGHT)
    draw = ImageDraw.Draw(picture)
    for x, y, size, turn in ((0.2, 0.5, 0.34, 0), (0.5, 0.5, 0.34, 24), (0.8, 0.5, 0.34, -18)):
        for side in (35 + turn, 160 + turn):
            leaf(draw, x * width, y * height, 1.2 * size * height, side)
        flower(draw, x * width, y * height, size * height, turn)
    whole = picture.resize(BANNER, Image.LANCZOS)
    return faded(whole)


def faded(whole, square=18):
    """Squares of the picture are gone, the more the further to the right."""
    chance = random.Random(3)
    draw = ImageDraw.Draw(whole)
    for top in range(0, whole.height, square):
        for left in range(0, whole.width, square):
            gone = (left / whole.width - 0.32) / 0.7
            if chance.random() < gone:
                draw.rectangle([left, top, left + square - 1, top + square - 1], NIGHT)
    return whole


def main():
    icon().save(WEB / "icon.png", optimize=True)
    banner().quantize(64, dither=Image.Dither.NONE).save(WEB / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
