"""Did it work? What a patch leaves of a concept, and what it does to the words nearest to it.

Both are read off the model's first predictions, which decide what a picture shows, so no picture is
drawn. ``docs/training.md`` says what the numbers mean, and how well unknown words are recognised.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..concepts.concept import Concept, Prompt
from ..concepts.prompt_templates import sentences
from ..models.adapters import attached, fixed_adapters
from ..models.image_sampler import ImageSampler, open_sampler
from ..models.interface import Model, Text, TransformerModel, UNetModel
from ..models.sampling import DRAWN_AT_ONCE, Sampling, seeded_noise, trailing_timesteps
from ..models.unknown_family import UnknownFamily
from ..patches.patch import ForgetPatch
from ..sequences import evenly
from .neighbours import MOST, Neighbours

SMALLEST = 128  # pixels a side
WATCHED = 384  # pixels a side, of transformers
STEPS, FIRST = 4, 2  # of a drawing in so many steps, the first ones count
GUIDANCE = 7.0
ROUNDING = 0.01  # of the concept's effect: smaller changes count as this
# A word that models know, and the share of its effect below which another may be unknown. Styles
# are not compared: on the demo model, known and unknown ones do not differ.
KNOWN_WORD, KNOWN = "cat", 0.7


def share_left(now: Tensor, effect: Tensor) -> float:
    """How far a patched prediction still goes the way that the concept's words led.

    Args:
        now: e'(c) - e(o), with e the frozen model's prediction, e' the patched one's, c a prompt
            with the concept and o the same without it. effect: e(c) - e(o), of the same shape.
    """
    return float((now * effect).sum() / effect.square().sum())


class Outcome(NamedTuple):
    """What a patch does to one concept."""

    concept: str
    left: float | None  # share of its effect, below 0 beyond none; None: it is not finite
    kept: dict[str, float]  # nearest words -> their change over the concept's
    strength: float  # of the word in the unpatched model; 1 is that of ``KNOWN_WORD``

    def __str__(self) -> str:
        if self.left is None:
            return f"{self.concept}: not measured, as predictions are not finite numbers."
        name = f"{self.concept:.40}"
        text = f"{name}: {100 * max(self.left, 0):.0f} % of its effect is left."
        if self.kept:
            parts = [f"{word} by {100 * change:.0f} %" for word, change in self.kept.items()]
            text += f" Nearest: {', '.join(parts)}.".replace(" by", " changed by", 1)
        if self.strength < KNOWN:
            return (
                f"The model may not know '{name}': the word changes its predictions only "
                f"{100 * self.strength:.0f} % as much as '{KNOWN_WORD}' does. {text}"
            )
        return text


def in_words(found: Sequence[Outcome], concepts: Sequence[Concept]) -> list[str]:
    """A line for each, and one more if not all concepts were measured; none if none was."""
    lines = list(map(str, found))
    if found and len(found) < len(concepts):
        lines.append(f"Only these {len(found)} of {len(concepts)} concepts were measured.")
    return lines


def outcomes(
    model: Model, patch: ForgetPatch, concepts: Sequence[Concept], near: Sequence[Neighbours] = ()
) -> list[Outcome]:
    """What a patch does to its concepts, to ``MOST`` of them if they are more.

    It takes 12 forwards of one prompt for each, 13 with an anchor, of pictures of half the size
    that the model was trained at, or of the patch's training if that was smaller. For a
    transformer 3 forwards at pure noise, which give what is left and nothing else. Empty for other
    models.

    Args:
        near: of ``neighbours``: the words whose change is measured.
    """
    concepts = evenly(concepts, min(MOST, len(concepts)))
    if isinstance(model.family, UnknownFamily):
        known = model.family.entry is not None and not patch.changes_text
        return _left_in_transformer(cast(TransformerModel, model), patch, concepts) if known else []
    unet = cast(UNetModel, model)
    words = {each.concept: list(each.near) for each in near}
    half = unet.family.resolution // 2
    trained = patch.info.get("settings", {}).get("size") or half
    size = max(SMALLEST, min(half, trained))
    with open_sampler(unet, Sampling(STEPS, GUIDANCE, size)) as sampler:
        return [_outcome(sampler, patch, each, words.get(each.name, [])) for each in concepts]


def _left_in_transformer(
    model: TransformerModel, patch: ForgetPatch, concepts: Sequence[Concept]
) -> list[Outcome]:
    pairs = [sentences(concept, 1)[0] for concept in concepts]
    texts = [[model.encode(Prompt(text, "")) for text in pair] for pair in pairs]
    side = min(WATCHED, model.family.resolution) // model.family.latent_factor
    x = seeded_noise([0], side, model.family.latent_channels)
    with model.watch(1, side) as watched:
        pure = len(watched.schedule) - 1

        def predict(text: Text) -> Tensor:
            return watched.predict_each(x, pure, [text]).float()

        frozen = [[predict(text) for text in pair] for pair in texts]
        with attached(fixed_adapters(patch.changes, watched.device), watched.module):
            now = [predict(text) for text, _ in texts]
    shares = [
        share_left(after - without, text - without) for after, (text, without) in zip(now, frozen)
    ]
    return [
        Outcome(concept.name, share if math.isfinite(share) else None, {}, 1.0)
        for concept, share in zip(concepts, shares)
    ]


def _outcome(
    sampler: ImageSampler, patch: ForgetPatch, concept: Concept, words: Sequence[str]
) -> Outcome:
    text, without = sentences(concept, 1)[0]
    frame = text.removesuffix(concept.subjects[0])
    kept = {word: frame + word for word in words}
    blank, common = frame.strip(), frame + KNOWN_WORD
    schedule = sampler.denoiser.schedule
    first, second = trailing_timesteps(len(schedule), STEPS)[:FIRST]
    x = sampler.noise([0]).to(sampler.denoiser.device)
    frozen = _predictions(sampler, x, first, [text, without, blank, common, *kept.values()])
    effect = frozen[text] - frozen[without]
    drawn = frozen[without] + GUIDANCE * effect
    later = schedule.partial_sample(lambda x, t: drawn, x, STEPS, 1)
    frozen_later = _predictions(sampler, later, second, [text, without])
    with sampler.applying([(patch, 1.0)]):
        now = _predictions(sampler, x, first, [text, *kept.values()])
        now_later = _predictions(sampler, later, second, [text])
    shares = [
        share_left(after[text] - before[without], before[text] - before[without])
        for before, after in ((frozen, now), (frozen_later, now_later))
    ]
    left = sum(shares) / FIRST
    changes = {prompt: float((now[prompt] - frozen[prompt]).norm()) for prompt in now}
    strength, usual = (float((frozen[each] - frozen[blank]).norm()) for each in (text, common))
    # Of an empty patch both changes are rounding, and their ratio would mean nothing.
    changed = max(changes[text], ROUNDING * float(effect.norm())) or 1.0
    return Outcome(
        concept.name,
        left if math.isfinite(left) else None,
        {word: changes[prompt] / changed for word, prompt in kept.items()},
        1.0 if concept.kind == "style" else strength / (usual or 1),
    )


def _predictions(
    sampler: ImageSampler, x: Tensor, t: int, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Predictions [1, C, h, w] at one point, [1, C, h, w], by prompt."""
    found: dict[str, Tensor] = {}
    prompts = list(dict.fromkeys(prompts))
    for i in range(0, len(prompts), DRAWN_AT_ONCE):
        some = prompts[i : i + DRAWN_AT_ONCE]
        many, steps = x.expand(len(some), -1, -1, -1), torch.full((len(some),), t)
        noise = sampler.denoiser.predict_noise(many, steps, sampler.texts(some)).float()
        found |= dict(zip(some, noise.split(1)))
    return found
