"""How much attention a concept gets, on inputs that stay the same from one look to the next."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention import watch_attention
from .model import cross_attention
from .schedule import add_noise

STEPS = (250, 500, 750)  # of 1000: where layout, shapes and details are decided
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
        text: encoded prompts, one a concept. flags: bool [B, T] of the concept's tokens.
        latents: a concept: [N, 4, h, w], of which the first is noised.
    """

    def __init__(self, text, flags, latents, alphas_cumprod, seed=0):
        self.text, self.flags = text, flags
        generator = torch.Generator().manual_seed(seed)
        clean = torch.stack([rows[0] for rows in latents])
        noise = torch.randn(clean[:1].shape, generator=generator).expand_as(clean)
        self.inputs = []
        for t in STEPS:
            steps = torch.full((len(clean),), t)
            self.inputs.append((add_noise(clean, noise, alphas_cumprod.cpu()[steps]), steps))

    @torch.no_grad()
    def look(self, borrowed, watch):
        """One ``Attention`` a concept; costs three forwards without gradient."""
        flags = self.flags.to(borrowed.device)

        def look_at(x_t, t):
            x_t, t = x_t.to(borrowed.device), t.to(borrowed.device)
            return _by_concept(watch(flags, lambda: borrowed.denoise(x_t, t, self.text)), flags)

        shares, maps = zip(*(look_at(*inputs) for inputs in self.inputs))
        return [
            Attention(float(share), place)
            for share, place in zip(torch.stack(shares).mean(0), torch.stack(maps).mean(0))
        ]


def look_at(model, data):
    """``Probe.look`` at a model that nothing is attached to.

    Args:
        data: a ``methods.resteer.Data``: encoded prompts, flags and latents.
    """
    with model.borrow() as borrowed:
        modules = [borrowed.module(name) for name in cross_attention(model.family)]
        probe = data.probe(borrowed.alphas_cumprod)
        with watch_attention(modules, borrowed.context_argument) as watch:
            return probe.look(borrowed, watch)


def _by_concept(watched, flags):
    """Share [B] and map [B, 32, 32], mean over layers."""
    counts = flags.sum(1).tolist()
    shares, maps = [], []
    for layer in watched:  # [N, H, P], the rows of sample 0 first
        per_sample = torch.stack([rows.sum(0).mean(0) for rows in layer.split(counts)])  # [B, P]
        side = round(per_sample.shape[1] ** 0.5)
        places = per_sample.view(-1, 1, side, side)
        shares.append(per_sample.mean(1))
        maps.append(F.interpolate(places, size=(MAP_SIDE, MAP_SIDE), mode="bilinear")[:, 0])
    return torch.stack(shares).mean(0).cpu(), torch.stack(maps).mean(0).cpu()
