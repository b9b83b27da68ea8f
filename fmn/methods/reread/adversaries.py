"""The adversaries of a patch in training: words, or contexts, learned to summon the concept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ...models.interface import Text, TextEncoder, UNet, UNetModel
from ...training import textual_inversion
from .training_images import Scene

WORD_LR = 0.02
FREE, CONTEXT_LR = 3, 0.02  # tokens that a ``Context`` sets freely; its rate, in their spread


class Words:
    """An adversary that learns input embeddings of words, as textual inversion does.

    Args:
        prompts: with ``PLACEHOLDER`` in the concept's place.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str], generator: torch.Generator):
        self.encoder, self.prompts, self.generator, self.age = encoder, prompts, generator, 0
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        start = textual_inversion.initial_vectors(encoder, textual_inversion.Settings(seed=seed))
        self.learned = start.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.learned], lr=WORD_LR)

    def shortest_text(self) -> Text:
        """The first prompt, which says least beside the words, [1, 77, D]."""
        return self.text(0)

    def pick(self) -> int:
        """One of the prompts at random."""
        return int(torch.randint(len(self.prompts), (1,), generator=self.generator))

    def text(self, picked: int) -> Text:
        """The prompt of a ``pick``, [1, 77, D]."""
        return self.encoder.encode(self.prompts[picked], self.learned)[0]


class Context:
    """An adversary for models whose words cannot be learned: a few tokens of a context are free,
    and all behind them shift alike, as behind a learned word."""

    def __init__(self, scene: Scene, generator: torch.Generator, device: torch.device):
        i = int(torch.randint(len(scene.other.context), (1,), generator=generator))
        self.start, self.age = scene.other[i : i + 1], 0
        context = self.start.context.float().to(device)
        shifts = torch.zeros(FREE + 1, context.shape[-1], device=device)
        self.context, self.learned = context, shifts.requires_grad_()
        self.optimizer = torch.optim.Adam([self.learned], lr=CONTEXT_LR * float(context.std()))

    def shortest_text(self) -> Text:
        return self.text(0)

    def pick(self) -> int:
        """There is only one text."""
        return 0

    def text(self, picked: int) -> Text:
        """[1, 77, D], on the device of the scene's texts."""
        free, shift = self.learned[:FREE], self.learned[FREE:]
        behind = shift.expand(self.context.shape[1] - 1 - FREE, -1)
        context = self.context + torch.cat([torch.zeros_like(shift), free, behind])
        return Text(context.to(self.start.context), self.start.vectors)


Adversary = Words | Context
NewAdversary = Callable[[Scene, torch.Generator], Adversary]


@contextmanager
def adversaries(model: UNetModel, denoiser: UNet) -> Iterator[NewAdversary]:
    """Yields a function that makes a new adversary."""
    if len(model.family.texts) > 1:  # their words cannot be learned yet
        yield lambda scene, generator: Context(scene, generator, denoiser.device)
        return
    with model.borrow_text_encoder() as encoder:
        yield lambda scene, generator: Words(encoder, scene.blanks, generator)
