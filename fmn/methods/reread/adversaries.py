"""What attacks a patch while it is hardened: words, or contexts, learned to summon the concept."""

from contextlib import contextmanager

import torch

from ...models.interface import Text, rows
from ...training import textual_inversion
from ...training.textual_inversion import first_vectors

WORD_LR = 0.02
FREE, CONTEXT_LR = 3, 0.02  # tokens that a ``Context`` sets freely, and its rate by their spread


@contextmanager
def adversaries(model, denoiser):
    """Yields a function from a ``Scene`` and a generator to a fresh adversary."""
    if len(model.family.texts) > 1:  # their words cannot be learned yet
        yield lambda scene, generator: Context(scene, generator, denoiser.device)
        return
    with model.borrow_text_encoder() as encoder:
        yield lambda scene, generator: Words(encoder, scene.blanks, generator)


class Words:
    """An adversary: input words learned to summon the concept, as by textual inversion.

    Args:
        encoder: a ``TextEncoder``. prompts: with ``PLACEHOLDER`` in the concept's place.
    """

    def __init__(self, encoder, prompts, generator):
        self.encoder, self.prompts, self.generator, self.age = encoder, prompts, generator, 0
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        start = first_vectors(
            encoder, textual_inversion.Settings(seed=seed, templates=("a photo of {}",))
        )
        self.learned = start.clone().requires_grad_()
        self.optimiser = torch.optim.Adam([self.learned], lr=WORD_LR)

    def alone(self):
        """The first prompt, which says least beside the words, [1, 77, D]."""
        return self.encoder.encode(self.prompts[0], self.learned)[0]

    def pick(self):
        """One of the prompts, by chance."""
        return int(torch.randint(len(self.prompts), (1,), generator=self.generator))

    def text(self, picked):
        """The prompt of a ``pick``, [1, 77, D]."""
        return self.encoder.encode(self.prompts[picked], self.learned)[0]


class Context:
    """An adversary for models whose words cannot be learned: a few tokens of a context are free,
    and all behind them move alike, as behind a learned word.

    Args:
        scene: of the concept.
    """

    def __init__(self, scene, generator, device):
        i = int(torch.randint(len(scene.other.context), (1,), generator=generator))
        self.start, self.age = rows(scene.other, slice(i, i + 1)), 0
        context = self.start.context.float().to(device)
        moves = torch.zeros(FREE + 1, context.shape[-1], device=device)
        self.context, self.learned = context, moves.requires_grad_()
        self.optimiser = torch.optim.Adam([self.learned], lr=CONTEXT_LR * float(context.std()))

    def pick(self):
        """There is but one text."""

    def text(self, picked=None):
        """[1, 77, D], where the scene's texts are."""
        free, shift = self.learned[:FREE], self.learned[FREE:]
        behind = shift.expand(self.context.shape[1] - 1 - FREE, -1)
        context = self.context + torch.cat([torch.zeros_like(shift), free, behind])
        # As all texts of the host are, which may be on the CPU.
        return Text(context.to(self.start.context), self.start.vectors)

    alone = text
