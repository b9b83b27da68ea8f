"""How much of a concept is left in what a patched model predicts, without drawing a picture.

What a picture will show is decided in its first steps. So the frozen model begins to draw the
concept, and at these points it is asked how far the patched model's prediction still goes the way
that the concept's words led: the share of e(c) - e(o) in e'(c) - e(o), with e the frozen model's
prediction, e' the patched one's, c a sentence with the concept and o the same without it.
"""

import torch

from ...models.adapters import FixedAdapter, attached
from ...models.interface import Text
from ...models.sampling import ddim, guided

STEPS, FIRST = 4, 2  # of a drawing in so many steps, the first ones count
TEXTS = 8


class Remaining:
    """The share of one concept that a change leaves, as a function of the change; 1 is all.

    Args:
        draw: a ``readings.Drawings``. pairs: [(text, text without the concept)].
    """

    def __init__(self, draw, pairs):
        self.denoiser, count = draw.denoiser, min(TEXTS, len(pairs))
        chosen = [pairs[i * len(pairs) // count] for i in range(count)]
        self.text, other = (
            Text.cat([draw.encoded_one(text) for text in side]) for side in zip(*chosen)
        )
        self.points = []
        predict = guided(draw.denoiser, self.text, draw.empty, draw.settings.guidance)

        def watched(x, t):
            self.points.append((x, t))
            return predict(x, t)

        noise = draw.noise(count).to(draw.denoiser.device)
        ddim(watched, noise, draw.denoiser.alphas_cumprod, STEPS, last=FIRST)
        self.others = [self._predicted(x, t, other) for x, t in self.points]
        self.effects = [
            self._predicted(x, t, self.text) - other
            for (x, t), other in zip(self.points, self.others)
        ]

    @torch.no_grad()
    def __call__(self, changes):
        """``changes``: layer name -> (up, down)."""
        worn = {
            name: FixedAdapter([(*f, 1.0)], self.denoiser.device) for name, f in changes.items()
        }
        shares = []
        with attached(worn, self.denoiser.module):
            for (x, t), other, effect in zip(self.points, self.others, self.effects):
                now = self._predicted(x, t, self.text) - other
                shares.append(float((now * effect).sum() / effect.square().sum()))
        return sum(shares) / len(shares)

    def _predicted(self, x, t, text):
        return self.denoiser.predict_noise(x, torch.full((len(x),), t), text).float()
