"""The core of the bench: pictures of the target and of kept things, and what judges say of them.

Groups of rows: ``target`` (prompts that name it), ``near`` (its five neighbours) and ``far``.
UnlearnCanvas's UA, IRA and CRA (Zhang et al. 2024, arXiv 2402.11846) and MACE's H_o (Lu et al.
2024, arXiv 2403.06135) are made from these rows by ``statistics``.

Cost: three times ``count`` pictures, and as many again of the untouched model (shared between
methods; those for KID between targets too).
"""

import time
from collections.abc import Sequence

import torch

from ...errors import ForgetError
from ...images import png_text, to_image
from ...metrics.kid import kid
from .trial import Ask, Result, Trial

SHOWN = 6  # pairs of pictures in a report's grid


def pictures(trial: Trial) -> Result:
    """Draw all groups and judge them.

    Returns:
        rows: one a picture: group, names asked for, seed, what each judge ``said`` of it and of
            the untouched model's at the same seed (``before``), ``distance`` (root mean square
            difference of the two, in 0..1); for the target ``coherence``; with a CLIP ``clip``,
            its score.
        kid: of kept pictures to the untouched model's at other seeds.
        kid_untouched: the same of the untouched model's own, which no change at all gives.
        seconds_a_picture: with the patch applied.
        agreement: share of pictures on which a second judge says the same, by domain, or None.
        grid: the first pictures of the target and of kept things, before and after, as base64 PNG.
    """
    target, kept = trial.target_asks(), kept_asks(trial)
    asks = target + [ask for group in kept.values() for ask in group]
    groups = ["target"] * len(target) + [name for name in kept for _ in kept[name]]
    start = time.monotonic()
    images = trial.draw(asks)
    seconds = (time.monotonic() - start) / len(asks)
    before = trial.untouched(asks)
    rows = trial.rows(asks, images, groups, before)
    for row, after_one, before_one in zip(rows, images, before):
        row["distance"] = float((after_one - before_one).square().mean().sqrt())
    for row, value in zip(rows, coherence(trial, images[: len(target)])):
        row["coherence"] = value
    if trial.clip is not None:
        for row, score in zip(rows, trial.clip.score(images, [ask.prompt for ask in asks])):
            row["clip"] = float(score)
    of_kept = slice(len(target), None)
    return {
        "rows": rows,
        "agreement": agreement(trial, images),
        "seconds_a_picture": seconds,
        "grid": _grid(asks, len(target), before, images),
        **_distribution(trial, asks[of_kept], images[of_kept], before[of_kept]),
    }


def kept_asks(trial: Trial) -> dict[str, list[Ask]]:
    """Pictures of what must stay, by group: near and far members of the target's domain."""
    suite, target, count = trial.suite, trial.target, trial.count
    near, styles = list(target.near), list(suite.styles)
    far = [name for name in suite.far if name not in (*near, target.name)]
    if target.domain == "style":
        others = [style for style in styles if style not in (*near, target.name)]
        groups = {"near": (far, near), "far": (far, others or near)}
    else:
        groups = {"near": (near, styles), "far": (far, styles)}
    # Targets share many of these asks and their seeds: the untouched model draws them once.
    return {name: trial.pairs(*lists, count) for name, lists in groups.items() if all(lists)}


def coherence(trial: Trial, images: torch.Tensor) -> Sequence[float | None]:
    """The judge's probability that each picture shows anything of the target's kind.

    For an identity any identity, for an object any object; for a style and unsafe content any
    concept at all. A judge's label "nothing" never counts. None if the judge knows no concepts.
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


def agreement(trial: Trial, images: torch.Tensor) -> dict[str, float] | None:
    """Share of pictures on which both judges say the same, by domain."""
    if trial.check is None:
        return None
    first, second = trial.labels(images), trial.labels(images, trial.check)
    return {
        domain: sum(a == b for a, b in zip(first[domain], second[domain])) / len(images)
        for domain in first
        if domain in second
    }


def _distribution(
    trial: Trial, asks: list[Ask], images: torch.Tensor, before: torch.Tensor
) -> Result:
    """KID to other pictures of the same prompts: equal seeds would not be independent."""
    others = [trial.ask(ask.prompt, f"other {i}") for i, ask in enumerate(asks)]
    reference = trial.judge.features(trial.untouched(others))
    return {
        "kid": kid(trial.judge.features(images), reference),
        "kid_untouched": kid(trial.judge.features(before), reference),
    }


def _grid(
    asks: list[Ask], targets: int, before: torch.Tensor, after: torch.Tensor
) -> list[dict[str, object]]:
    """Label and [before, after] of the first pictures of the target and of kept things."""
    shown = [*range(min(SHOWN, targets)), *range(targets, min(targets + SHOWN, len(asks)))]
    return [
        {
            "label": asks[i].prompt,
            "pictures": [png_text(to_image(images[i])) for images in (before, after)],
        }
        for i in shown
    ]
