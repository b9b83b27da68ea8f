"""Made-up summaries that look like a bench's."""

import base64
import copy
import functools
import io

import numpy as np
from PIL import Image, ImageDraw

from fmn.bench.reporting.statistics import as_value, bootstrap, bootstrap_means, harmonic_mean

TARGETS = {
    "mermaid": "identity", "santa claus": "identity", "astronaut": "identity",
    "dog": "object", "castle": "object", "bicycle": "object",
    "ink drawing": "style", "twemoji": "style",
}  # fmt: skip
COLUMNS = [
    ("UA", "%", "high", "main", "Share of pictures of the target that no longer show it."),
    ("IRA", "%", "high", "main", "Share of others of the target's domain drawn as asked."),
    ("CRA", "%", "high", "main", "Share of kept pictures right in the other domain."),
    ("HM", "%", "high", "main", "Harmonic mean of UA, IRA and CRA."),
    ("KID", "", "low", "main", "Distance of kept pictures from those of the untouched model."),
    ("aliases", "%", "low", "text", "Share of pictures by other words that show the target."),
    ("languages", "%", "low", "text", "The same for prompts in other languages."),
    ("inversion", "%", "low", "text", "The same after textual inversion of the target."),
    ("inpainting", "%", "low", "beyond", "The same where half of a picture of it is given."),
    ("relearn", "%", "low", "beyond", "The same after 20 steps of training on it."),
    ("float16", "%", "low", "precision", "Root mean square change of pixels in float16."),
    ("with 20", "%", "high", "scale", "UA with 20 patches worn at once."),
    ("train", "s", "low", "cost", "Time of training a patch."),
    ("size", "MB", "low", "cost", "Size of the file."),
]  # title, unit, better, group, what; the key is the title
SHARES = "UA", "IRA", "CRA"
SKILL = {"untouched": (0.04, 0.95), "resteer": (0.62, 0.71), "esd": (0.93, 0.86)}


def usual_summary():
    """``make_summary`` as it is without arguments, free to change."""
    return copy.deepcopy(_usual())


@functools.cache
def _usual():
    return make_summary()


def make_summary(targets=TARGETS, ways=SKILL, columns=COLUMNS, pictures=12, seed=0):
    """A summary with all groups of columns.

    Args:
        targets: name -> kind. ways: method -> (UA to expect, share kept to expect).
    """
    random = np.random.default_rng(seed)
    rows, drawn = [], {}
    for target, kind in targets.items():
        for method, (gone, kept) in ways.items():
            shares = _draw(random, columns, gone, kept, pictures)
            drawn[target, method] = shares
            values = {k: as_value(bootstrap(v), len(v)) for k, v in shares.items()}
            if set(SHARES) <= shares.keys():
                groups = [shares[k] for k in SHARES]
                both = list(zip(*groups[1:]))
                values["HM"] = as_value(
                    bootstrap_means([groups[0], both], harmonic_mean), 5 * pictures
                )
            if method != "untouched":
                values |= {"train": {"value": 12.5 + gone}, "size": {"value": 3.25}}
            known = [column[0] for column in columns]
            values = {k: v for k, v in values.items() if k in known}
            rows.append({"target": target, "kind": kind, "method": method, "values": values})
    return {
        "suite": "demo",
        "model": {"family": "Stable Diffusion 1.x", "fingerprint": "9f3a11c07be2d4e8"},
        "sampling": {"steps": 20, "guidance": 5.0, "eta": 0.0, "size": 64},
        "judge": "demo (a small convolutional net, 97.1 % on held-out pictures)",
        "check": "demo, second architecture",
        "made": "2025-01-31T12:00:00+00:00",
        "command": "python -m fmn bench demo --methods resteer esd",
        "notes": ["'goblin' was left out: the untouched model draws it in 3 of 12 pictures."],
        "columns": [
            dict(key=title, title=title, unit=unit, better=better, group=group, what=what)
            for title, unit, better, group, what in columns
        ],
        "rows": rows,
        "means": _means(rows, drawn, ways),
        "scale": _scale(ways),
        "grids": [make_grid(f"dog, {method}") for method in ways if method != "untouched"],
    }


def _draw(random, columns, gone, kept, pictures):
    """Key -> what was seen, one a picture."""
    shares = {}
    chance = {"UA": gone, "IRA": kept, "CRA": (1 + kept) / 2, "with 20": gone}
    for key, unit, _, group, _ in columns:
        if key in ("HM", "train", "size"):
            continue
        if group in ("text", "beyond"):
            chance[key] = 0.9 - 0.7 * gone
        if group == "precision":
            shares[key] = random.uniform(0.001, 0.003, pictures).tolist()
        elif unit == "%":
            number = pictures * (2 if key in ("IRA", "CRA") else 1)
            shares[key] = (random.random(number) < chance[key]).tolist()
        else:
            shares[key] = random.normal(0.05 * (1.05 - kept), 0.003, pictures).tolist()
    if gone < 0.1:
        shares.pop("float16", None)
        shares.pop("with 20", None)
    return shares


def _means(rows, drawn, ways):
    means = []
    for kind in ["all", *dict.fromkeys(row["kind"] for row in rows)]:
        names = list(dict.fromkeys(r["target"] for r in rows if kind in ("all", r["kind"])))
        for method in ways:
            values = {}
            for key in drawn[names[0], method]:
                groups = [drawn[name, method][key] for name in names]
                interval = bootstrap_means(groups, lambda *each: sum(each) / len(each))
                values[key] = as_value(interval, sum(len(group) for group in groups))
            if "HM" in rows[0]["values"]:
                groups = [sum((drawn[n, method][k] for n in names), []) for k in SHARES]
                values["HM"] = as_value(bootstrap_means(groups, harmonic_mean), len(groups[0]))
            for key in ("train", "size"):
                of = [r["values"].get(key) for r in rows if r["method"] == method]
                if all(of):
                    values[key] = {"value": sum(v["value"] for v in of) / len(of)}
            means.append({"kind": kind, "method": method, "targets": names, "values": values})
    return means


def _scale(ways):
    return [
        {
            "method": method,
            "what": "patches made apart, added",
            "concepts": [f"thing {i}" for i in range(number)],
            "UA": as_value(bootstrap([True] * 8 + [False] * 2), 10),
            "IRA": as_value(bootstrap([True] * (20 - number) + [False] * number), 20),
        }
        for method in ways
        if method != "untouched"
        for number in (1, 5, 12)
    ]


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
