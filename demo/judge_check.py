"""How well a demo model draws, by the demo's judges: the command ``demo/judges.py check``."""

import json
import sys
from collections import defaultdict
from random import Random

from demo import pictures
from fmn.errors import ForgetError
from fmn.files import write_whole
from fmn.hosts.diffusers.open import open_model
from fmn.metrics.demo_judge import ARCHITECTURES, FILE, DemoJudge
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling

SEED = 0


def wanted_pairs(styles, count=None):
    """Pairs (concept, style) that the sets have: all, or ``count`` by chance, always the same."""
    pairs = [
        (concept.concept, style)
        for concept in pictures.concepts()
        for style in styles
        if not lacking(concept, style)
    ]
    if count is None:
        return pairs
    if not 1 <= count <= len(pairs):
        raise ForgetError(f"There are {len(pairs)} pairs and {count} are to be drawn: use fewer.")
    return Random(SEED).sample(pairs, count)


def lacking(concept, style):
    """Whether no set draws this ``pictures.Concept`` in this style."""
    sets = pictures.STYLES[style]
    no_ink = concept.concept == pictures.SAME_GLYPH and "inkline" in sets
    return no_ink or ("blob" in sets and not concept.blob)


def draw(path, pairs, seeds, sampling):
    """Pictures [pairs * seeds, H, W, 3] of each pair, each with its own seeds; a row for each."""
    if seeds < 1:
        raise ForgetError(f"{seeds} pictures a pair are to be drawn: use 1 or more seeds.")
    rows = [
        {"concept": concept, "style": style, "seed": seed + i}
        for i, (concept, style) in enumerate(pairs)
        for seed in range(0, seeds * len(pairs), len(pairs))
    ]
    done = 0

    def show(count):
        nonlocal done
        done += count
        print(f"\r{done} of {len(rows)} pictures", end="", file=sys.stderr, flush=True)

    with open_sampler(open_model(path), sampling, on_pictures=show) as sampler:
        prompts = [f"a {row['concept']}, {row['style']}" for row in rows]
        images = sampler.draw(prompts, [row["seed"] for row in rows])
    print(file=sys.stderr)
    return images, rows


def judge_rows(images, rows, path=FILE):
    """Add to each row what each judge said: {"said": {judge: {domain: label}}}."""
    for row in rows:
        row["said"] = {}
    for name in ARCHITECTURES:
        judge = DemoJudge(name, path)
        for domain, labels in judge.labels.items():
            best = judge.probabilities(images, domain).argmax(-1).tolist()
            for row, i in zip(rows, best):
                row["said"].setdefault(name, {})[domain] = labels[i]


def summary(rows):
    """Shares of rows judged right: per judge all, by style, by concept and held out; agreement."""
    judges = list(rows[0]["said"])
    found = {name: _by_judge(rows, name) for name in judges}
    first, second = judges
    same = {
        domain: _mean([row["said"][first][domain] == row["said"][second][domain] for row in rows])
        for domain in ("concept", "style")
    }
    return {"pictures": len(rows), "judges": found, "agreement": same}


def _by_judge(rows, name):
    groups = {"all": rows}
    held = [row for row in rows if pictures.held_out(row["concept"], row["style"])]
    if held:
        groups["held out"] = held
    by_style, by_concept = defaultdict(list), defaultdict(list)
    for row in rows:
        by_style[row["style"]].append(row)
        by_concept[row["concept"]].append(row)
    return {
        **{group: _right(found, name) for group, found in groups.items()},
        "by style": {style: _right(found, name) for style, found in by_style.items()},
        "by concept": {concept: _right(found, name) for concept, found in by_concept.items()},
    }


def _right(rows, name):
    hits = [{d: row["said"][name][d] == row[d] for d in ("concept", "style")} for row in rows]
    return {
        "pictures": len(rows),
        "concept": _mean([hit["concept"] for hit in hits]),
        "style": _mean([hit["style"] for hit in hits]),
        "both": _mean([hit["concept"] and hit["style"] for hit in hits]),
    }


def _mean(values):
    return round(sum(values) / len(values), 4)


def as_text(found):
    """The summary as a table for each judge; concepts only where a picture was misjudged."""
    lines = [f"{found['pictures']} pictures"]
    for name, judged in found["judges"].items():
        lines += ["", f"judge {name:<23}{'n':>6}{'concept':>10}{'style':>10}{'both':>10}"]
        groups = {"all": judged["all"], "held out": judged.get("held out"), **judged["by style"]}
        lines += [_line(group, right) for group, right in groups.items() if right]
        weak = [(c, right) for c, right in judged["by concept"].items() if right["concept"] < 1]
        weak.sort(key=lambda pair: pair[1]["concept"])
        lines += [f"concepts misjudged at times: {len(weak)} of {len(judged['by concept'])}"]
        lines += [_line(concept, right) for concept, right in weak[:20]]
    same = found["agreement"]
    lines += ["", f"judges agree: concept {same['concept']:.1%}, style {same['style']:.1%}"]
    return "\n".join(lines)


def _line(name, right):
    shares = "".join(f"{right[key]:>10.1%}" for key in ("concept", "style", "both"))
    return f"  {name:<27}{right['pictures']:>6}{shares}"


def check(given):
    """Draw, judge and print; the same as JSON, with every row, goes to ``given.json``."""
    pairs = wanted_pairs(given.style or list(pictures.STYLES), given.pairs)
    sampling = Sampling(given.sampling_steps, given.guidance)
    images, rows = draw(given.model, pairs, given.seeds, sampling)
    judge_rows(images, rows, given.judges)
    found = summary(rows)
    print(as_text(found))
    if given.json:
        record = {"model": given.model, "sampling": vars(sampling), **found, "rows": rows}
        write_whole(given.json, lambda path: path.write_text(json.dumps(record, indent=1), "utf-8"))
