"""Cross-attention steering (CASteer, ICLR 2026, arXiv 2503.09630), baked into weights.

What the concept adds to the output of each cross-attention is measured over pairs of prompts, and
projected out of its last layer. ``docs/methods/casteer.md`` says what a patch cannot hold.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..closed_form.input_edit import Changes, weight_of
from ..closed_form.output_edit import PartProgress, proper_span, reflection
from ..closed_form.text_embeddings import encode_chunk
from ..concepts.concept import Concept, Prompt
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..models.families import layers
from ..models.interface import Text, UNet, UNetModel
from ..models.sampling import ddim, guided, seeded_noise
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..text import with_article
from . import shared_settings as shared

TITLE = "CASteer"
REVISION = 1
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
        limits=(0.0, 4.0, 0.01),
    )
    pairs: int = setting(
        50,
        "Prompt pairs for each concept, with it and without it. More: a steadier direction, and "
        "more time.",
        limits=(1, 10_000),
    )
    sampling_steps: int = setting(
        10, "Steps in which each pair is drawn. Takes time in proportion.", limits=(1, 1000)
    )
    end: float = advanced(
        1.0,
        "How far each pair is drawn. 1: to the end. 0.5: the first half of the steps, in which "
        "shapes are made; the rest is neither drawn nor measured.",
        limits=(0.01, 1.0, 0.01),
    )
    guidance: float = setting(
        7.0,
        "Guidance scale while drawing. 1: none, which takes half the time.",
        limits=(1.0, 100.0, 0.1),
    )
    batch: int = advanced(
        1, "Pairs drawn at once. More: faster on a GPU, and more memory.", limits=(1, 64)
    )
    size: int = shared.size()
    seed: int = shared.seed()


PRESETS = {"casteer": Settings(), "casteer-reflection": Settings(strength=2.0)}


class Pair(NamedTuple):
    """A prompt with the concept, and the same without."""

    concept: Prompt
    other: Prompt


def prompt_pairs(concept: Concept, words: Sequence[str], count: int) -> list[Pair]:
    """Pairs in which names and words take turns; the concept's own prompts come first.

    Own prompts take part only if there is an anchor, which makes the prompt without the concept.

    Args:
        words: from the shipped lists; each pair puts the concept beside one.
    """
    pairs = []
    if concept.anchor:
        own = concept.own_prompts()[:count]
        pairs = [Pair(p, Prompt(text, concept.anchor, p.plain)) for p, text in own]
    form, names = FORMS.get(concept.kind, OTHER_FORM), concept.subjects
    for i in range(count - len(pairs)):
        word, name = with_article(words[i % len(words)]), names[i % len(names)]
        other = form.format(word, concept.anchor) if concept.anchor else word
        pairs.append(Pair(Prompt(form.format(word, name), name), Prompt(other, other)))
    return pairs


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Measure directions and project them out; see ``methods.forget``.

    The losses of the record are the length of the concept's mean difference, over the layers,
    after each batch of pairs. Nothing protects kept words, so ``keep`` is always empty.
    """
    model, concepts, settings = task.model, task.concepts, task.settings
    names = [layer.name for layer in layers(model.family) if layer.name.endswith("attn2.to_out.0")]
    batches = -(-settings.pairs // settings.batch)
    progress = PartProgress(task.on_step, batches * len(concepts))
    changes: Changes = {}
    with model.watch(4 * settings.batch, _side(model, settings)) as denoiser:
        measured = []
        for concept in concepts:
            pairs = prompt_pairs(concept, _words(concepts, concept, settings), settings.pairs)
            directions = Directions(model, denoiser, names, settings)
            measured.append(directions.measure(pairs, progress))
        for name, *columns in zip(names, *measured):
            basis = proper_span(torch.stack(columns, 1), name)
            weight = weight_of(denoiser, name).cpu()
            up, down = reflection(weight, basis, settings.strength)
            if up.shape[1]:
                changes[name] = up.float(), down.float()
    return task.patch(changes, progress.values)


def _side(model: UNetModel, settings: Settings) -> int:
    return (settings.size or model.family.resolution) // 8


def _words(concepts: Sequence[Concept], concept: Concept, settings: Settings) -> list[str]:
    """The shipped words in an order that the seed fixes."""
    words = keep_for(concepts, (), WORDS.get(concept.kind, OTHER_WORDS))
    generator = torch.Generator().manual_seed(settings.seed)
    return [words[i] for i in torch.randperm(len(words), generator=generator).tolist()]


class Directions:
    """Measures what a concept adds to the output of some layers, by name, while pairs are drawn."""

    def __init__(self, model: UNetModel, denoiser: UNet, names: Sequence[str], settings: Settings):
        self.model, self.denoiser, self.names = model, denoiser, names
        self.settings, self.empty = settings, encode_chunk(model, "")
        self.last = max(1, round(settings.end * settings.sampling_steps))
        # Sums over pairs of the difference of pixel means: for each layer [steps, C].
        self.sums = [torch.zeros(1, dtype=torch.float64)] * len(names)

    def measure(self, pairs: Sequence[Pair], progress: Callable[[float], None]) -> list[Tensor]:
        """s of each layer, [C] in float64: the mean over steps of unit mean differences.

        Raises:
            ForgetError: there is no difference, or the model gives no finite numbers.
        """
        batch = self.settings.batch
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            added = self._draw(part, range(start, start + len(part)))
            self.sums = [total + difference for total, difference in zip(self.sums, added)]
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

    def _draw(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> list[Tensor]:
        """Sum over the pairs of what the concept adds: for each layer [steps, C]."""
        settings, denoiser = self.settings, self.denoiser
        text = Text.cat(
            [encode_chunk(self.model, prompt) for side in zip(*pairs) for prompt in side]
        )
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(pairs))
        side = _side(self.model, settings)
        # Both prompts of a pair start from the same noise, as in the paper.
        noise = seeded_noise([settings.seed + number for number in numbers], side)
        noise = noise.repeat(2, 1, 1, 1).to(denoiser.device)
        predict = guided(denoiser, text, self.empty, settings.guidance)
        steps = []
        with pixel_means(denoiser, self.names) as means:

            def probed(x: Tensor, t: int) -> Tensor:
                predicted = predict(x, t)
                # With guidance the prompts' own rows come first.
                steps.append([signs @ means[name][: len(signs)] for name in self.names])
                return predicted

            alphas = denoiser.alphas_cumprod
            ddim(probed, noise, alphas, settings.sampling_steps, last=self.last)
        return [torch.stack(rows) for rows in zip(*steps)]


@contextmanager
def pixel_means(denoiser: UNet, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the last output of each layer, its mean over pixels: name -> float64 [B, C]."""
    means: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:

            def hook(module: object, args: object, output: Tensor, name: str = name) -> None:
                means[name] = output.float().mean(1).cpu().double()

            hooks.enter_context(denoiser.module(name).register_forward_hook(hook))
        yield means
