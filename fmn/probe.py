"""How much attention a concept gets, on inputs that stay the same from one look to the next."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .attention import attention_share, watch_attention
from .model import cross_attention_names
from .schedule import add_noise

STEPS = (0.25, 0.5, 0.75)  # shares of the schedule, where details, shapes and layout are decided
MAP_SIDE = 32


@dataclass(frozen=True)
class Attention:
    """One concept's attention in its first prompt.

    Attributes:
        share: of all attention, mean over layers, heads, pixels and time steps; 0 to 1.
        map: [32, 32], the same per place of the picture, mean over layers and heads.
    """

    share: float
    map: torch.Tensor


class Probe:
    """Fixed noise, time steps and prompts, looked at again and again.

    Args:
        looked_at: a concept: (text of one prompt, flags bool [1, T], latent [1, 4, h, w]).
        steps: shares of the schedule; a look costs one forward for each concept and step.
    """

    def __init__(self, looked_at, alphas_cumprod, steps=STEPS, seed=0):
        self.looked_at = looked_at
        self.t = torch.tensor([int(share * len(alphas_cumprod)) for share in steps])
        self.alphas_cumprod = alphas_cumprod.cpu()[self.t]
        shape = looked_at[0][2].shape
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def look(self, borrowed, watch):
        """One ``Attention`` a concept."""
        return [self._look_at(borrowed, watch, *one) for one in self.looked_at]

    def _look_at(self, borrowed, watch, text, flags, latent):
        flags = flags.to(borrowed.device)
        shares, places = [], []
        for t, alpha in zip(self.t, self.alphas_cumprod):
            x_t = add_noise(latent, self.noise, alpha).to(borrowed.device)
            watched = watch(flags, partial(borrowed.denoise, x_t, t[None], text))
            shares.append(attention_share(watched))
            places.append(_places(watched))
        return Attention(sum(shares) / len(shares), torch.stack(places).mean(0))


def _places(watched):
    """Attention by place, mean over layers and heads, summed over tokens: [32, 32]."""
    maps = []
    for layer in watched:  # [N, H, P]
        pixels = layer.sum(0).mean(0)
        side = round(len(pixels) ** 0.5)
        resized = F.interpolate(
            pixels.view(1, 1, side, side), size=(MAP_SIDE, MAP_SIDE), mode="bilinear"
        )
        maps.append(resized[0, 0].cpu())
    return torch.stack(maps).mean(0)


def look_at(model, data):
    """``Probe.look`` at a model that nothing is attached to.

    Args:
        data: a ``methods.resteer.Data``: encoded prompts and latents.
    """
    with model.borrow() as borrowed:
        modules = [borrowed.module(name) for name in cross_attention_names(model.family)]
        probe = data.probe(borrowed.alphas_cumprod, STEPS)
        with watch_attention(modules, borrowed.context_argument) as watch:
            return probe.look(borrowed, watch)
