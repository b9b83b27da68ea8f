"""M-Score, by our own definition: do words learned from a concept's pictures still mean its name?

The Forget-Me-Not paper (Zhang et al. 2023, arXiv 2303.17591) names a Memorization Score, but its
formula could not be read in public. Ours, see ``docs/mscore.md``::

    M = mean over templates of cos(pooled(template with learned tokens),
                                   pooled(template with the concept's name))

The tokens are learned by textual inversion on the model under test, from pictures of the concept.
The text encoder that makes both texts is the model's own, and the same before and after.
"""

from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw, ImageFont

from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..images import ACCENT, INK, PALE, PAPER
from ..training.textual_inversion import Settings, check_templates, invert

TEMPLATES = ("a photo of {}",)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Score:
    """One inversion, measured.

    Attributes:
        value: M of the learned tokens, -1 to 1.
        start: M of the tokens before they were learned.
        others: other phrase -> M of the learned tokens against it.
        vectors: the learned tokens [k, width].
    """

    value: float
    start: float
    others: dict[str, float]
    vectors: torch.Tensor


def m_score(
    model,
    denoiser,
    images,
    phrase,
    templates=TEMPLATES,
    seeds=SEEDS,
    settings=Settings(),
    others=(),
    on_step=lambda step: None,
):
    """M of a model as it is now, one ``Score`` a seed.

    Args:
        model: a ``Model``; denoiser: its ``Denoiser``, which may wear patches.
        images: pictures of the concept, [N, H, W, 3] in 0..1.
        phrase: how prompts name the concept, e.g. "a dog".
        templates: to learn and to compare in, {} for the phrase.
        seeds: one inversion each.
        settings: how to invert; its seed and templates are replaced.
        others: phrases of other concepts, to compare with.
        on_step: gets a ``StepProgress`` after each step of each inversion; may raise to cancel.
    """
    check(phrase, templates, seeds)
    found = []
    for seed in seeds:
        chosen = replace(settings, seed=seed, templates=tuple(templates))
        found.append(invert(model, denoiser, images, chosen, on_step))
    with model.borrow_text_encoder() as encoder, torch.no_grad():
        known = {name: pooled(encoder, templates, name) for name in (phrase, *others)}
        return [_score(encoder, templates, tokens, known, phrase, others) for tokens in found]


def _score(encoder, templates, tokens, known, phrase, others):
    start = pooled(encoder, templates, PLACEHOLDER, tokens.start)
    learned = pooled(encoder, templates, PLACEHOLDER, tokens.vectors)
    return Score(
        cosine(learned, known[phrase]),
        cosine(start, known[phrase]),
        {name: cosine(learned, known[name]) for name in others},
        tokens.vectors,
    )


def measure(
    sampler, phrase, images, templates=TEMPLATES, seeds=SEEDS, settings=Settings(), **options
):
    """M of the untouched model and of the model with the patches that the sampler wears.

    Args:
        images: the same pictures for both.
        options: ``others`` and ``on_step`` of ``m_score``.

    Returns:
        "before" and "after": M, one a seed; "start": M of the random tokens, one a seed; "others":
        phrase -> M of the learned tokens against it, {"before": ..., "after": ...};
        "between": phrase -> M of the concept's name against it.
    """
    given = sampler.model, sampler.denoiser, images, phrase, templates, seeds, settings
    with sampler.unpatched():
        before = m_score(*given, **options)
    return summary(sampler.model, before, m_score(*given, **options), phrase, templates)


def summary(model, before, after, phrase, templates):
    """Scores of ``m_score`` before and after as plain data, as ``measure`` returns it."""
    others = list(before[0].others)
    with model.borrow_text_encoder() as encoder, torch.no_grad():
        named = pooled(encoder, templates, phrase)
        between = {name: cosine(named, pooled(encoder, templates, name)) for name in others}
    return {
        "before": [score.value for score in before],
        "after": [score.value for score in after],
        "start": [score.start for score in before],
        "others": {
            name: {
                "before": [score.others[name] for score in before],
                "after": [score.others[name] for score in after],
            }
            for name in others
        },
        "between": between,
    }


def check(phrase, templates, seeds):
    """Raise a ``ForgetError`` for what cannot be measured."""
    if not phrase.strip():
        raise ForgetError("The phrase that names the concept is empty: write it, e.g. 'a dog'.")
    if not seeds:
        raise ForgetError(
            "There is no seed to invert with: give at least one, three to see a spread."
        )
    check_templates(templates)


def pooled(encoder, templates, phrase, vectors=None):
    """Pooled text of each template with the phrase in it, [templates, D]."""
    return torch.cat([encoder.encode(fill(template, phrase), vectors)[1] for template in templates])


def cosine(first, second):
    """Mean cosine of rows."""
    return float(torch.nn.functional.cosine_similarity(first, second).mean())


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
