"""M-Score, by our own definition: do words learned from a concept's pictures still mean its name?

The Forget-Me-Not paper (Zhang et al. 2023, arXiv 2303.17591) names a Memorization Score, but its
formula could not be read in public. Ours, see ``docs/mscore.md``::

    M = mean over templates of cos(pooled(template with learned tokens),
                                   pooled(template with the concept's name))

The tokens are learned by textual inversion on the model under test, from pictures of the concept.
The text encoder that makes both texts is the model's own, and the same before and after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import TypedDict

import torch
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default

from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..images import ACCENT, INK, PALE, PAPER
from ..models.interface import TextEncoder, UNet, UNetModel
from ..progress import OnStep, ignore
from ..training.textual_inversion import Settings, check_templates, invert

TEMPLATES = ("a photo of {}",)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Score:
    """One inversion, measured."""

    value: float  # M of the learned tokens, -1 to 1
    start: float  # M of the tokens before they were learned
    others: dict[str, float]  # other phrase -> M of the learned tokens against it
    vectors: torch.Tensor  # the learned tokens [k, width]


class Summary(TypedDict):
    """Scores of a concept on two models, as plain data: lists hold one value a seed."""

    before: list[float]  # M on the untouched model
    after: list[float]
    start: list[float]  # M of the random tokens
    others: dict[str, dict[str, list[float]]]  # phrase -> before and after, M against it
    between: dict[str, float]  # phrase -> M of the concept's name against it


def m_score(
    model: UNetModel,
    denoiser: UNet,
    images: torch.Tensor,
    phrase: str,
    templates: Sequence[str] = TEMPLATES,
    seeds: Sequence[int] = SEEDS,
    settings: Settings = Settings(),
    others: Sequence[str] = (),
    on_step: OnStep = ignore,
) -> list[Score]:
    """M of a model as it is now, one ``Score`` a seed.

    Args:
        denoiser: the model's; patches may be applied to it.
        images: pictures of the concept, [N, H, W, 3] in 0..1.
        phrase: how prompts name the concept, e.g. "a dog"; ``others`` those of other concepts.
        templates: to learn and to compare in, {} for the phrase.
        settings: how to invert; its seed and templates are replaced.
        on_step: called after each step of each inversion; may raise to cancel.
    """
    check(phrase, templates, seeds)
    inverted = []
    for seed in seeds:
        chosen = replace(settings, seed=seed, templates=tuple(templates))
        inverted.append(invert(model, denoiser, images, chosen, on_step))
    scores = []
    with model.borrow_text_encoder() as encoder, torch.no_grad():
        name, *named = (pooled(encoder, templates, words) for words in (phrase, *others))
        for tokens in inverted:
            start = pooled(encoder, templates, PLACEHOLDER, tokens.start)
            learned = pooled(encoder, templates, PLACEHOLDER, tokens.vectors)
            against = {o: cosine(learned, text) for o, text in zip(others, named) if o != phrase}
            score = cosine(learned, name), cosine(start, name), against, tokens.vectors
            scores.append(Score(*score))
    return scores


def summary(
    model: UNetModel,
    before: Sequence[Score],
    after: Sequence[Score],
    phrase: str,
    templates: Sequence[str],
) -> Summary:
    """Scores of ``m_score`` on the untouched and on another model as plain data."""
    others = list(before[0].others)
    with model.borrow_text_encoder() as encoder, torch.no_grad():
        named = pooled(encoder, templates, phrase)
        between = {name: cosine(named, pooled(encoder, templates, name)) for name in others}
    both = {"before": before, "after": after}
    return {
        "before": [score.value for score in before],
        "after": [score.value for score in after],
        "start": [score.start for score in before],
        "others": {
            name: {when: [s.others[name] for s in scores] for when, scores in both.items()}
            for name in others
        },
        "between": between,
    }


def check(phrase: str, templates: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise a ``ForgetError`` for what cannot be measured."""
    if not phrase.strip():
        raise ForgetError("The phrase that names the concept is empty: write it, e.g. 'a dog'.")
    if not seeds:
        raise ForgetError(
            "There is no seed to invert with: give at least one, three to see a spread."
        )
    check_templates(templates)


def pooled(
    encoder: TextEncoder,
    templates: Sequence[str],
    phrase: str,
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pooled text of each template with the phrase in it, [templates, D]."""
    return torch.cat([encoder.encode(fill(each, phrase), vectors)[1] for each in templates])


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean cosine of rows."""
    return float(torch.nn.functional.cosine_similarity(first, second).mean())


BEFORE, AFTER = (70, 110, 170), ACCENT
WIDTH, LEFT, ROW, HEAD, MARGIN = 640, 190, 64, 34, 24


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as text; one value has no spread."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def report(name: str, scores: Summary, compared: bool) -> str:
    """Lines on one concept.

    Args:
        compared: whether "before" is another model than "after".
    """
    lines = [f"M-Score of {name}: words learned from pictures against the name, cosine"]
    if compared:
        difference = mean(scores["after"]) - mean(scores["before"])
        lines += [
            f"untouched   {spread(scores['before'])}",
            f"this model  {spread(scores['after'])}   difference {difference:+.3f}",
        ]
    else:
        lines.append(f"this model  {spread(scores['after'])}")
    lines.append(f"random words, before learning  {spread(scores['start'])}")
    lines += [
        f"name of '{other}'  {value:.3f}; learned words against it  "
        f"{spread(scores['others'][other]['after'])}"
        for other, value in scores["between"].items()
    ]
    seeds = len(scores["after"])
    lines.append(
        f"± is the standard deviation over {seeds} inversions"
        if seeds > 1
        else "one inversion: no spread is known; use three seeds or more"
    )
    return "\n".join(lines)


def plot(results: Mapping[str, Summary], compared: bool) -> Image.Image:
    """One row a concept, by its name: a dot a seed, a line at the mean; from 0 to 1."""
    bottom = HEAD + ROW * len(results)
    picture = Image.new("RGB", (WIDTH, bottom + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for tick in range(6):
        x = _x(tick / 5)
        draw.line((x, HEAD, x, bottom), fill=PALE)
        draw.text((x - 8, bottom + 4), f"{tick / 5:.1f}", INK, font=load_default(11))
    kinds = [("start", "random", PALE), ("before", "untouched", BEFORE)][: 2 if compared else 1]
    kinds.append(("after", "this model", AFTER))
    for i, (_, title, colour) in enumerate(kinds):
        left = LEFT + 110 * i
        draw.ellipse((left, 12, left + 8, 20), fill=colour, outline=INK)
        draw.text((left + 13, 9), title, INK, font=load_default(12))
    for row, (name, scores) in enumerate(results.items()):
        top = HEAD + row * ROW
        draw.text((10, top + ROW // 2 - 8), name[:24], INK, font=load_default(13))
        for i, (key, _, colour) in enumerate(kinds, 1):
            _dots(draw, scores[key], top + ROW * i // (len(kinds) + 1), colour)  # type: ignore[literal-required]
    return picture


def _dots(draw: ImageDraw.ImageDraw, values: Sequence[float], y: int, colour: tuple) -> None:
    x = _x(mean(values))
    draw.line((x, y - 8, x, y + 8), fill=INK, width=2)
    for x in map(_x, values):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline=INK)


def _x(value: float) -> float:
    return LEFT + (WIDTH - LEFT - MARGIN) * min(max(value, 0.0), 1.0)
