"""Made-up summaries that look like a bench's."""

import base64
import copy
import functools
import io

import numpy as np
from PIL import Image, ImageDraw

from fmn.bench.reporting.columns import COLUMNS
from fmn.bench.reporting.statistics import bootstrap, unlearn_canvas

TARGETS = {
    "mermaid": "identity", "santa claus": "identity", "astronaut": "identity",
    "dog": "object", "castle": "object", "bicycle": "object",
    "ink drawing": "style", "twemoji": "style",
}  # fmt: skip
ACCURACIES = "UA", "IRA", "CRA", "HM", "kept"
KEYS = (
    *ACCURACIES, "KID", "aliases", "languages", "inversion", "inpainting", "relearn", "near",
    "seconds", "size",
)  # fmt: skip
SKILL = {"untouched": (0.04, 0.95), "resteer": (0.62, 0.71), "esd": (0.93, 0.86)}


def usual_summary():
    """``make_summary`` as it is without arguments, free to change."""
    return copy.deepcopy(_usual())


@functools.cache
def _usual():
    return make_summary()


def make_summary(targets=TARGETS, methods=SKILL, keys=KEYS, pictures=12, seed=0):
    """A summary with all groups of columns.

    Args:
        targets: name -> kind. methods: name -> (UA to expect, share kept to expect).
        keys: of columns.
    """
    random = np.random.default_rng(seed)
    rows, judged = [], {}
    for target, kind in targets.items():
        for method, (gone, kept) in methods.items():
            pictures_of = judged[target, method] = _judged(random, gone, kept, pictures)
            values = _values(random, [pictures_of], method, gone, keys)
            rows.append({"target": target, "kind": kind, "method": method, "values": values})
    means = []
    for kind in ["all", *dict.fromkeys(targets.values())]:
        names = [name for name in targets if kind in ("all", targets[name])]
        for method, (gone, _) in methods.items():
            rows_of = [judged[name, method] for name in names]
            values = _values(random, rows_of, method, gone, keys)
            means.append({"kind": kind, "method": method, "targets": names, "values": values})
    patched = [method for method in methods if method != "untouched"]
    return {
        "suite": "demo",
        "model": {"family": "Stable Diffusion 1.x", "fingerprint": "9f3a11c07be2d4e8"},
        "sampling": {"steps": 20, "guidance": 5.0, "eta": 0.0, "size": 64},
        "judge": "demo (a small convolutional net, 97.1 % on held-out pictures)",
        "check": "demo, second architecture",
        "made": "2025-01-31T12:00:00+00:00",
        "version": "1.2.3",
        "command": "python -m fmn bench demo --methods resteer esd",
        "notes": ["'goblin' was left out: the untouched model draws it in 3 of 12 pictures."],
        "columns": [dict(column) for column, _ in COLUMNS if column["key"] in keys],
        "rows": rows,
        "means": means,
        "scale": [_stage(method, number) for method in patched for number in (1, 5, 12)],
        "grids": [make_grid(f"dog, {method}") for method in patched],
    }


def _judged(random, gone, kept, pictures):
    """Judged pictures of a target named dog, and twice as many of kept concepts."""
    rows = []
    for group, concept, right in (
        ("target", "dog", 1 - gone), ("near", "cat", kept), ("far", "car", kept),
    ):  # fmt: skip
        for seed in range(pictures):
            said = {
                "concept": concept if random.random() < right else "nothing",
                "style": "ink" if random.random() < (1 + kept) / 2 else "oil",
            }
            row = {"group": group, "concept": concept, "style": "ink", "said": said, "seed": seed}
            rows.append(row)
    return rows


def _values(random, targets, method, gone, keys):
    """Key -> value, over the judged pictures of some targets."""
    values = unlearn_canvas((rows, "concept") for rows in targets)
    for column, _ in COLUMNS:
        if column["group"] in ("text", "beyond", "precision"):
            draws = random.random(sum(map(len, targets)) // 3)
            values[column["key"]] = bootstrap((draws < 0.9 - 0.7 * gone).tolist())
    values["KID"] = {"value": 0.05 - 0.04 * gone, "n": len(targets)}
    if method != "untouched":
        values |= {"seconds": {"value": 12.5 + gone, "n": 1}, "size": {"value": 3.25, "n": 1}}
    return {key: value for key, value in values.items() if key in keys and value is not None}


def _stage(method, number):
    return {
        "method": method,
        "what": "patches trained alone, added",
        "concepts": number,
        "UA": bootstrap([True] * 8 + [False] * 2),
        "IRA": bootstrap([True] * (20 - number) + [False] * number),
    }


def make_grid(title):
    """Six frames of small pictures before and after."""
    rows = [
        {"label": f"a dog, style {row}", "pictures": [png(row, 0), png(row, 1)]} for row in range(6)
    ]
    return {"title": title, "columns": ["before", "after"], "rows": rows}


def png(row, column):
    """A small picture as base64."""
    picture = Image.new("RGB", (64, 64), (235, 225 - 30 * column, 200 + 8 * row))
    ImageDraw.Draw(picture).ellipse([12, 6 + 2 * row, 50, 52], (90 + 60 * column, 120, 60))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
