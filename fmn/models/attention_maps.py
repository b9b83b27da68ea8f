"""How much attention a concept gets, on inputs that stay the same from one look to the next."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image

from ..images import heat_map, labelled_grid, to_image
from .attention import attention_share, watch_attention
from .interface import cross_attention_names
from .sampling import q_sample
from .token_positions import flagged_positions

STEPS = (0.25, 0.5, 0.75)  # shares of the schedule, where details, shapes and layout are decided
MAP_SIDE = 32


@dataclass(frozen=True)
class Attention:
    """One concept's attention in its first prompt.

    Attributes:
        share: of all attention, mean over layers, heads, pixels and time steps; 0 to 1.
        map: [32, 32], the same per place of the picture, mean over layers and heads.
        layers: map of each attn2 layer [layers, 32, 32], in forward order.
    """

    share: float
    map: torch.Tensor
    layers: torch.Tensor | None = None


class AttentionProbe:
    """Fixed noise, time steps and prompts, looked at again and again.

    Args:
        probe_inputs: a concept: (text of one prompt, flags bool [1, T], latent [1, 4, h, w]).
        steps: shares of the schedule; a look costs one forward for each concept and step.
    """

    def __init__(self, family, probe_inputs, alphas_cumprod, steps=STEPS, seed=0):
        self.names, self.probe_inputs = cross_attention_names(family), probe_inputs
        self.t = torch.tensor([int(share * len(alphas_cumprod)) for share in steps])
        self.alphas_cumprod = alphas_cumprod.cpu()[self.t]
        shape = probe_inputs[0][2].shape
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def measure(self, denoiser):
        """One ``Attention`` a concept."""
        modules = [denoiser.module(name) for name in self.names]
        with watch_attention(modules, denoiser.context_argument) as watch:
            return [self._look_at(denoiser, watch, *one) for one in self.probe_inputs]

    def _look_at(self, denoiser, watch, text, flags, latent):
        flags = flags.to(denoiser.device)
        shares, places = [], []
        for t, alpha in zip(self.t, self.alphas_cumprod):
            x_t = q_sample(latent, self.noise, alpha).to(denoiser.device)
            watched = watch(flags, partial(denoiser.predict_noise, x_t, t[None], text))
            shares.append(attention_share(watched))
            places.append(_places(watched))
        layers = torch.stack(places).mean(0)
        return Attention(sum(shares) / len(shares), layers.mean(0), layers)


def _places(watched):
    """Attention by layer and place, mean over heads, summed over tokens: [layers, 32, 32]."""
    maps = []
    for layer in watched:  # [N, H, P]
        pixels = layer.sum(0).mean(0)
        side = round(len(pixels) ** 0.5)
        resized = F.interpolate(
            pixels.view(1, 1, side, side), size=(MAP_SIDE, MAP_SIDE), mode="bilinear"
        )
        maps.append(resized[0, 0].cpu())
    return torch.stack(maps)


def concept_flags(model, prompt, end_tokens="none"):
    """Which tokens of a ``Prompt`` name its subject, bool [1, T]; see ``flagged_positions``."""
    ids = model.tokenize(prompt)
    subject = model.tokenize(prompt._replace(text=prompt.subject, plain=True))
    flags = torch.zeros(1, len(ids), dtype=torch.bool)
    flags[0, flagged_positions(prompt, ids, subject, end_tokens)] = True
    return flags


def measure_attention(model, data):
    """``AttentionProbe.measure`` at a model that nothing is attached to.

    Args:
        data: a method's prepared data; its ``probe_inputs()`` are those of ``AttentionProbe``.
    """
    with model.borrow_denoiser() as denoiser:
        return AttentionProbe(
            model.family, data.probe_inputs(), denoiser.alphas_cumprod, STEPS
        ).measure(denoiser)


BLOCKS = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}


def block_maps(family, attention):
    """Maps of an ``Attention`` by block, mean over the block's layers: title -> [32, 32]."""
    grouped = {}
    for name, layer in zip(cross_attention_names(family), attention.layers):
        part, number, *_ = name.split(".")
        title = BLOCKS[part] + (f" {number}" if number.isdecimal() else "")
        grouped.setdefault(title, []).append(layer)
    return {title: torch.stack(maps).mean(0) for title, maps in grouped.items()}


def maps_grid(family, rows, brightest=0.0, side=160):
    """Heat maps of several concepts as one picture: mean over all layers, then each block.

    Args:
        rows: list of (name, ``Attention``, picture [H, W, 3] in 0..1); the picture stands first
            and shows through the mean, or all of them are None.
        brightest: share of attention, 0 to 1, that is drawn palest; 0 takes each row's highest.
    """
    made = []
    for name, attention, picture in rows:
        maps = {"mean": attention.map} | block_maps(family, attention)
        top = brightest or max(*(float(values.max()) for values in maps.values()), 1e-9)
        cells = {title: heat_map(values / top, side) for title, values in maps.items()}
        if picture is not None:
            shown = to_image(picture).resize((side, side))
            cells = {"picture": shown} | cells
            cells["mean"] = Image.blend(shown, cells["mean"], 0.65)
        made.append((f"{name}: {attention.share:.2%}", cells))
    return labelled_grid([(name, list(cells.values())) for name, cells in made], made[0][1], side)


def maps_text(family, rows):
    """The shares behind ``maps_grid``, one line a concept."""
    lines = []
    for name, attention, *_ in rows:
        blocks = block_maps(family, attention)
        shares = ", ".join(f"{title} {float(v.mean()):.2%}" for title, v in blocks.items())
        lines.append(f"{name}: {attention.share:.2%} of attention ({shares})")
    return "\n".join(lines)
