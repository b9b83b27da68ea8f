"""How much attention a concept gets, measured again and again on the same inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..concepts.concept import Prompt
from ..images import heat_map, labelled_grid, to_image
from .attention import Watcher, attention_share, watch_attention
from .families import Family, cross_attention_names
from .interface import Text, UNet, UNetModel
from .sampling import q_sample
from .token_positions import flagged_positions

STEPS = (0.25, 0.5, 0.75)  # shares of the schedule, where details, shapes and layout are decided
MAP_SIDE = 32
# Of a concept: one encoded prompt, flags bool [1, T], latent [1, 4, h, w]
ProbeInput = tuple[Text, Tensor, Tensor]


class Probed(Protocol):
    """A method's prepared data."""

    def probe_inputs(self) -> Sequence[ProbeInput]: ...


@dataclass(frozen=True)
class Attention:
    """One concept's attention in its first prompt.

    Attributes:
        share: of all attention, mean over layers, heads, pixels and time steps; 0 to 1.
        map: [32, 32], the same per place of the picture, mean over layers and heads.
        layers: map of each attn2 layer [layers, 32, 32], in forward order.
    """

    share: float
    map: Tensor
    layers: Tensor


# Concept's name, its attention, and a picture [H, W, 3] in 0..1 or None
MapRow = tuple[str, Attention, Tensor | None]


class AttentionProbe:
    """Fixed noise, time steps and prompts on which attention is measured.

    Args:
        steps: shares of the schedule; ``measure`` costs one forward for each concept and step.
    """

    def __init__(
        self,
        probe_inputs: Sequence[ProbeInput],
        alphas_cumprod: Tensor,
        steps: Sequence[float] = STEPS,
        seed: int = 0,
    ) -> None:
        self.probe_inputs = probe_inputs
        self.t = torch.tensor([int(share * len(alphas_cumprod)) for share in steps])
        self.alphas_cumprod = alphas_cumprod.cpu()[self.t]
        shape = probe_inputs[0][2].shape
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def measure(self, denoiser: UNet) -> list[Attention]:
        """One ``Attention`` a concept."""
        modules = denoiser.cross_attention_modules()
        with watch_attention(modules, denoiser.context_argument) as watch:
            return [self._measure(denoiser, watch, *inputs) for inputs in self.probe_inputs]

    def _measure(
        self, denoiser: UNet, watch: Watcher, text: Text, flags: Tensor, latent: Tensor
    ) -> Attention:
        flags = flags.to(denoiser.device)
        shares, maps = [], []
        for t, alpha in zip(self.t, self.alphas_cumprod):
            x_t = q_sample(latent, self.noise, alpha).to(denoiser.device)
            watched = watch(flags, partial(denoiser.predict_noise, x_t, t[None], text))
            shares.append(attention_share(watched))
            maps.append(_layer_maps(watched))
        layers = torch.stack(maps).mean(0)
        return Attention(sum(shares) / len(shares), layers.mean(0), layers)


def _layer_maps(watched: Sequence[Tensor]) -> Tensor:
    """Attention by layer and place, mean over heads, summed over tokens: [layers, 32, 32].

    Args:
        watched: per layer [N, H, P].
    """
    maps = []
    for layer in watched:
        pixels = layer.sum(0).mean(0)
        side = round(len(pixels) ** 0.5)
        resized = F.interpolate(
            pixels.view(1, 1, side, side), size=(MAP_SIDE, MAP_SIDE), mode="bilinear"
        )
        maps.append(resized[0, 0].cpu())
    return torch.stack(maps)


def concept_flags(model: UNetModel, prompt: Prompt, end_tokens: str = "none") -> Tensor:
    """Which tokens of a ``Prompt`` name its subject, bool [1, T]; see ``flagged_positions``."""
    flags = torch.zeros(1, len(model.tokenize(prompt)), dtype=torch.bool)
    flags[0, flagged_positions(model.tokenize, prompt, end_tokens)] = True
    return flags


def measure_attention(model: UNetModel, data: Probed) -> list[Attention]:
    """``AttentionProbe.measure`` of a model that nothing is attached to."""
    with model.borrow_denoiser() as denoiser:
        probe = AttentionProbe(data.probe_inputs(), denoiser.alphas_cumprod, STEPS)
        return probe.measure(denoiser)


BLOCKS = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}


def block_maps(family: Family, attention: Attention) -> dict[str, Tensor]:
    """Maps of an ``Attention`` by block, mean over the block's layers: title -> [32, 32]."""
    grouped: dict[str, list[Tensor]] = {}
    for name, layer in zip(cross_attention_names(family), attention.layers):
        part, number, *_ = name.split(".")
        title = BLOCKS[part] + (f" {number}" if number.isdecimal() else "")
        grouped.setdefault(title, []).append(layer)
    return {title: torch.stack(maps).mean(0) for title, maps in grouped.items()}


def maps_grid(
    family: Family, rows: Sequence[MapRow], brightest: float = 0.0, side: int = 160
) -> Image.Image:
    """Heat maps of several concepts as one picture: mean over all layers, then each block.

    Args:
        rows: the picture comes first and shows through the mean, or all of them are None.
        brightest: share of attention, 0 to 1, that is drawn palest; 0 takes each row's highest.
    """
    grid = []
    for name, attention, picture in rows:
        maps = {"mean": attention.map} | block_maps(family, attention)
        top = brightest or max(*(float(values.max()) for values in maps.values()), 1e-9)
        cells = {title: heat_map(values / top, side) for title, values in maps.items()}
        if picture is not None:
            image = to_image(picture).resize((side, side))
            cells = {"picture": image} | cells
            cells["mean"] = Image.blend(image, cells["mean"], 0.65)
        grid.append((f"{name}: {attention.share:.2%}", cells))
    columns = list(grid[0][1])
    return labelled_grid([(name, list(cells.values())) for name, cells in grid], columns, side)


def maps_text(family: Family, rows: Sequence[MapRow]) -> str:
    """The shares behind ``maps_grid``, one line a concept."""
    lines = []
    for name, attention, _ in rows:
        blocks = block_maps(family, attention)
        shares = ", ".join(f"{title} {float(v.mean()):.2%}" for title, v in blocks.items())
        lines.append(f"{name}: {attention.share:.2%} of attention ({shares})")
    return "\n".join(lines)
