"""Cross-attention steering (CASteer, ICLR 2026, arXiv 2503.09630), baked into weights.

What the concept adds to the output of each cross-attention is measured over pairs of prompts, and
projected out of its last layer. See ``docs/methods/casteer.md`` for what a patch cannot hold.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..closed_form.input_edit import finished
from ..closed_form.output_edit import Progress, proper_span, reflection
from ..concepts.concept import Prompt
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..models.families import layers
from ..models.interface import Text
from ..models.sampling import ddim, guided
from ..models.token_positions import CHUNK
from ..settings import Settings as Base
from ..settings import seed, setting, size
from ..text import with_article
from ..training.fit_adapters import autograd

TITLE = "CASteer"
ABOUT = (
    "Cross-attention steering (CASteer, arXiv 2503.09630) baked into weights: measures what the "
    "concept adds to cross-attention's output, and projects it out."
)
FORMS = {"style": "{}, {}", "unsafe": "{}, {}"}
OTHER_FORM = "{} with {}"
WORDS = {"unsafe": "people"}
OTHER_WORDS = "common"


@dataclass(frozen=True)
class Settings(Base, method="casteer"):
    strength: float = setting(
        1.0,
        "0: nothing happens. 1: nothing is left along the concept's direction. 2: what was there "
        "becomes its opposite; the paper does so only where the concept shows, a patch everywhere.",
        low=0.0,
        high=4.0,
        step=0.01,
    )
    pairs: int = setting(
        50,
        "Prompt pairs for each concept, with it and without it. More: a steadier direction, and "
        "more time.",
        low=1,
        high=10_000,
    )
    sampling_steps: int = setting(
        10, "Steps in which each pair is drawn. Takes time in proportion.", low=1, high=1000
    )
    end: float = setting(
        1.0,
        "How far each pair is drawn. 1: to the end. 0.5: the first half of the steps, in which "
        "shapes are made; the rest is neither drawn nor measured.",
        low=0.01,
        high=1.0,
        step=0.01,
    )
    guidance: float = setting(
        7.0,
        "Guidance scale while drawing. 1: none, which takes half the time.",
        low=1.0,
        high=100.0,
        step=0.1,
    )
    batch: int = setting(
        1, "Pairs drawn at once. More: faster on a GPU, and more memory.", low=1, high=64
    )
    size: int = size()
    seed: int = seed()


PRESETS = {
    "casteer": Settings(),
    "casteer-reflection": Settings(strength=2.0),
}


class Pair(NamedTuple):
    """A prompt with the concept, and the same without."""

    concept: Prompt
    other: Prompt


def prompt_pairs(concept, words, count):
    """Pairs in which names and words take turns; the concept's own prompts come first.

    Own prompts take part only if there is an anchor: without one there is no such prompt without
    the concept.

    Args:
        words: what the concept is put beside, from the shipped lists.
    """
    pairs = []
    if concept.anchor:
        own = concept.bare_prompts()[len(concept.subjects) :]
        pairs = [Pair(p, Prompt(text, concept.anchor, p.plain)) for p, text in own][:count]
    form, names = FORMS.get(concept.kind, OTHER_FORM), concept.subjects
    for i in range(count - len(pairs)):
        word, name = with_article(words[i % len(words)]), names[i % len(names)]
        other = form.format(word, concept.anchor) if concept.anchor else word
        pairs.append(Pair(Prompt(form.format(word, name), name), Prompt(other, other)))
    return pairs


@autograd()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Measure directions and project them out; see ``methods.forget``.

    The losses of the record are how long the concept's mean difference is, over the layers, after
    each batch of pairs. Nothing is done for what is to be kept, so ``keep`` is always empty.
    """
    base = model.fingerprint()
    names = [layer.name for layer in layers(model.family) if layer.name.endswith("attn2.to_out.0")]
    batches = -(-settings.pairs // settings.batch)
    with torch.no_grad(), model.borrow() as borrowed:
        progress = Progress(on_step, batches * len(concepts))
        empty = _encoded(model, Prompt("", ""))
        found = []
        for concept in concepts:
            pairs = prompt_pairs(concept, _words(concepts, concept, settings), settings.pairs)
            steered = Directions(model, borrowed, names, settings, empty)
            found.append(steered.measure(pairs, progress))
        changes = {}
        for i, name in enumerate(names):
            columns = torch.stack([directions[i] for directions in found], 1)
            weight = borrowed.module(name).weight.detach().to("cpu", torch.float64)
            up, down = reflection(weight, proper_span(columns, name), settings.strength)
            if up.shape[1]:
                changes[name] = up.float(), down.float()
    return finished(model, base, concepts, settings, changes, progress.values)


def _words(concepts, concept, settings):
    """The shipped words in an order that the seed fixes."""
    words = keep_for(concepts, (), WORDS.get(concept.kind, OTHER_WORDS))
    generator = torch.Generator().manual_seed(settings.seed)
    return [words[i] for i in torch.randperm(len(words), generator=generator).tolist()]


class Directions:
    """Measures what a concept adds to the output of some layers while pairs are drawn.

    Args:
        names: the layers. empty: the empty prompt, for guidance.
    """

    def __init__(self, model, borrowed, names, settings, empty):
        self.model, self.borrowed, self.names = model, borrowed, names
        self.settings, self.empty = settings, empty
        self.last = max(1, round(settings.end * settings.sampling_steps))
        # Sums over pairs of the difference of pixel means: a layer [steps, C].
        self.sums = [0.0] * len(names)

    def measure(self, pairs, progress):
        """s of each layer, [C] in float64: the mean over steps of unit mean differences.

        Raises:
            ForgetError: there is no difference, or the model gives no finite numbers.
        """
        batch = self.settings.batch
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            added = self._draw(part, range(start, start + len(part)))
            self.sums = [total + each for total, each in zip(self.sums, added)]
            done = start + len(part)
            length = sum(float(total.norm(dim=1).mean()) for total in self.sums) / done
            if not math.isfinite(length):
                raise ForgetError(
                    "Cross-attention gave numbers that are not finite while pairs were drawn: "
                    "load the model in float32 or bfloat16."
                )
            progress(length / len(self.names))
        if not any(total.any() for total in self.sums):
            raise ForgetError(
                f"'{pairs[0].concept.subject}' makes no difference to cross-attention: check how "
                "it is spelled, and that its anchor is something else."
            )
        return [torch.nn.functional.normalize(total, dim=1).mean(0) for total in self.sums]

    def _draw(self, pairs, numbers):
        """Sum over the pairs of what the concept adds: a layer [steps, C]."""
        settings, borrowed = self.settings, self.borrowed
        prompts = [pair.concept for pair in pairs] + [pair.other for pair in pairs]
        text = Text.cat([_encoded(self.model, prompt) for prompt in prompts])
        signs = torch.ones(len(prompts), dtype=torch.float64)
        signs[len(pairs) :] = -1
        side = (settings.size or self.model.family.resolution) // 8
        # Both prompts of a pair start from the same noise, as in the paper.
        noise = torch.cat([_noise(settings.seed + number, side) for number in numbers]).repeat(
            2, 1, 1, 1
        )
        predict = guided(borrowed, text, self.empty, settings.guidance)
        steps = []
        with pixel_means(borrowed, self.names) as means:

            def probe_inputs(x, t):
                predicted = predict(x, t)
                # With guidance the prompts' own rows come first.
                steps.append([signs @ means[name][: len(signs)] for name in self.names])
                return predicted

            ddim(
                probe_inputs,
                noise.to(borrowed.device),
                borrowed.alphas_cumprod,
                settings.sampling_steps,
                last=self.last,
            )
        return [torch.stack(rows) for rows in zip(*steps)]


@contextmanager
def pixel_means(borrowed, names):
    """Yields a dict that holds what each layer last gave, mean over pixels: float64 [B, C]."""
    means = {}
    with ExitStack() as hooks:
        for name in names:

            def hook(module, args, output, name=name):
                means[name] = output.float().mean(1).cpu().double()

            hooks.enter_context(borrowed.module(name).register_forward_hook(hook))
        yield means


def _noise(number, side):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, 4, side, side, generator=generator)


def _encoded(model, prompt):
    text = model.encode(prompt)
    if text.context.shape[1] != CHUNK:
        raise ForgetError(f"'{prompt.text:.60}...' is too long: shorten it to 75 tokens.")
    return text
