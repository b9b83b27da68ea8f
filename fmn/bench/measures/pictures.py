"""The core of the bench: pictures of the target and of kept things, and what judges say of them.

Groups of rows: ``target`` (prompts that name it), ``near`` (its five neighbours) and ``far``.
UnlearnCanvas's UA, IRA and CRA (Zhang et al. 2024, arXiv 2402.11846) and MACE's H_o (Lu et al.
2024, arXiv 2403.06135) are made from these rows by ``statistics``.

Cost: three times ``count`` pictures, and as many again of the untouched model (shared between
methods; those for KID between targets too).
"""

import time

import torch

from ...errors import ForgetError
from ...images import png_text, to_image
from ...metrics.kid import kid

SHOWN = 6  # pairs of pictures in a report's grid


def pictures(trial):
    """Draw all groups and judge them.

    Returns:
        rows: one a picture: group, names asked for, seed, what the judge ``said``, ``distance``
            (root mean square difference from the untouched model's picture at the same seed, in
            0..1), on the target's ``coherence`` (probability of any thing of its kind) and with a
            CLIP its score.
        kid: of kept pictures against the untouched model's at other seeds, and ``kid_untouched``,
            the same of its own: what no change at all gives.
        seconds_a_picture: with the patch worn.
        agreement: share of pictures on which a second judge says the same, or None.
        grid: the first target and kept pictures, before and after, as base64 of PNG.
    """
    target, kept = trial.target_asks(), kept_asks(trial)
    asks = target + [ask for group in kept.values() for ask in group]
    groups = ["target"] * len(target) + [name for name in kept for _ in kept[name]]
    start = time.monotonic()
    images = trial.draw(asks)
    seconds = (time.monotonic() - start) / len(asks)
    before = trial.untouched(asks)
    rows = trial.rows(asks, images, None)
    for row, group, after_one, before_one in zip(rows, groups, images, before):
        row["group"] = group
        row["distance"] = float((after_one - before_one).square().mean().sqrt())
    for row, value in zip(rows, coherence(trial, images[: len(target)])):
        row["coherence"] = value
    if trial.clip is not None:
        for row, score in zip(rows, trial.clip.score(images, [ask.prompt for ask in asks])):
            row["clip"] = float(score)
    first = slice(len(target), None)
    return {
        "rows": rows,
        "agreement": agreement(trial, images),
        "seconds_a_picture": seconds,
        "grid": _grid(trial, asks, len(target), before, images),
        **_distribution(trial, asks[first], images[first], before[first]),
    }


def kept_asks(trial):
    """What must stay, by group: asks for near and far members of the target's domain."""
    suite, target, count = trial.suite, trial.target, trial.count
    far = [name for name in suite.far if name not in (*target.near, target.name)]
    if target.domain == "style":
        near = list(target.near)
        others = [style for style in suite.styles if style not in (*near, target.name)]
        groups = {"near": (far, near), "far": (far, others or near)}
    else:
        styles = list(suite.styles)
        groups = {"near": (list(target.near), styles), "far": (far, styles)}
    # Targets share many of these asks and their seeds: the untouched model draws them once.
    return {name: trial.pairs(*lists, count) for name, lists in groups.items() if all(lists)}


def coherence(trial, images):
    """The judge's probability that a picture shows any thing of the target's kind, [N].

    For an identity any identity, for an object any object; for a style and unsafe content any
    concept at all. A judge's label "nothing" never counts.
    """
    labels = trial.judge.labels.get("concept")
    if labels is None:
        return [None] * len(images)
    kinds, kind = trial.suite.kinds, trial.target.kind
    wanted = [
        name != "nothing" and (kind not in ("identity", "object") or kinds.get(name) == kind)
        for name in labels
    ]
    if not any(wanted):
        raise ForgetError(
            f"The judge '{trial.judge.name}' knows no {kind}: use a judge that knows the suite's "
            "concepts."
        )
    probabilities = trial.judge.probabilities(images, "concept")
    return probabilities[:, torch.tensor(wanted)].sum(1).tolist()


def agreement(trial, images):
    """Share of pictures on which both judges say the same, by domain."""
    if trial.check is None:
        return None
    first, second = trial.said(images), trial.said(images, trial.check)
    shared = [domain for domain in first if domain in second]
    return {
        domain: sum(a == b for a, b in zip(first[domain], second[domain])) / len(images)
        for domain in shared
    }


def _distribution(trial, asks, images, before):
    """KID against other pictures of the same prompts: equal seeds would not be independent."""
    others = [trial.ask(ask.prompt, f"other {i}") for i, ask in enumerate(asks)]
    reference = trial.judge.features(trial.untouched(others))
    return {
        "kid": kid(trial.judge.features(images), reference),
        "kid_untouched": kid(trial.judge.features(before), reference),
    }


def _grid(trial, asks, targets, before, after):
    """Label and [before, after] of the first pictures of the target and of kept things."""
    shown = [*range(min(SHOWN, targets)), *range(targets, min(targets + SHOWN, len(asks)))]
    return [
        {
            "label": asks[i].prompt,
            "pictures": [png_text(to_image(images[i])) for images in (before, after)],
        }
        for i in shown
    ]
