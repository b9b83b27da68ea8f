"""How much of a concept a patched model still predicts, without drawing a picture.

The first steps decide what a picture shows. So the frozen model begins to draw the concept, and
there the patched model's prediction is compared: how far it still goes the way that the concept's
words led, the share of e(c) - e(o) in e'(c) - e(o), with e the frozen model's prediction, e' the
patched one's, c a sentence with the concept and o the same without it.
"""

import torch
from torch import Tensor

from ...closed_form.input_edit import Changes
from ...metrics.outcome import FIRST, STEPS, share_left
from ...models.adapters import attached, fixed_adapters
from ...models.interface import Text
from ...models.sampling import ddim, guided
from ...sequences import evenly
from .regression_data import QuerySampler, SentencePairs

TEXTS = 8


class Residual:
    """The share of one concept that a change leaves, as a function of the change; 1 is all."""

    def __init__(self, sampler: QuerySampler, pairs: SentencePairs):
        self.denoiser = sampler.denoiser
        chosen = evenly(pairs, min(TEXTS, len(pairs)))
        self.text, without = (
            Text.cat([sampler.encode(text) for text in side]) for side in zip(*chosen)
        )
        self.points: list[tuple[Tensor, int]] = []  # x_t, t
        predict = guided(self.denoiser, self.text, sampler.empty, sampler.settings.guidance)

        def watched(x: Tensor, t: int) -> Tensor:
            self.points.append((x, t))
            return predict(x, t)

        noise = sampler.noise(len(chosen)).to(self.denoiser.device)
        ddim(watched, noise, self.denoiser.alphas_cumprod, STEPS, last=FIRST)
        self.without = [self._predict(x, t, without) for x, t in self.points]  # e(o)
        self.effects = [  # e(c) - e(o)
            self._predict(x, t, self.text) - other
            for (x, t), other in zip(self.points, self.without)
        ]

    @torch.no_grad()
    def __call__(self, changes: Changes) -> float:
        adapters = fixed_adapters(changes, self.denoiser.device)
        shares = []
        with attached(adapters, self.denoiser.module):
            for (x, t), without, effect in zip(self.points, self.without, self.effects):
                now = self._predict(x, t, self.text) - without  # e'(c) - e(o)
                shares.append(share_left(now, effect))
        return sum(shares) / len(shares)

    def _predict(self, x: Tensor, t: int, text: Text) -> Tensor:
        return self.denoiser.predict_noise(x, torch.full((len(x),), t), text).float()
