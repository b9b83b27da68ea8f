"""Probes of the weights: does the model still draw the target if sampling is disturbed?

Lu et al. 2025, When Are Concepts Erased From Diffusion Models? (arXiv 2505.17013), scaled down, as
in ``classifier`` and ``inpainting``; docs/robustness.md says where they differ from the paper and
what they cannot show. Each draws the prompts of ``Trial.target_asks``; ``untouched`` in a row is
whether the untouched model's plain picture of the same ask shows the target.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

import torch

from ...models.interface import Text
from ...models.sampling import Fresh
from .trial import Ask, Result, Row, Trial, as_saved

Latents = Callable[[Sequence[Ask], Text, torch.Tensor], torch.Tensor]  # of text and noise
SHARES, ETAS, SPREADS = (0.1, 0.2, 0.4), (1.0, 1.17, 1.34), (1.0, 1.04)


def completion(trial: Trial, shares: Sequence[float] = SHARES) -> Result:
    """The untouched model draws the first share of the steps, the model under test the rest.

    Cost: ``len(shares)`` * ``trial.count`` pictures, and ``trial.count`` untouched, kept.

    Returns:
        rows: one a picture and share, with ``share``, and ``steps`` of the untouched model.
    """
    sampler, asks = trial.sampler, trial.target_asks()

    def of_share(share: float) -> list[Row]:
        first = round(share * sampler.sampling.steps)

        def latents(part: Sequence[Ask], text: Text, noise: torch.Tensor) -> torch.Tensor:
            with sampler.unpatched():
                begun = sampler.latents(text, noise, last=first)
            return sampler.latents(text, begun, first=first)

        still = shows_target(trial, asks, latents)
        return trial.judged_rows(asks, still, share=share, steps=first)

    rows = [row for share in shares for row in of_share(share)]
    return {"rows": rows, "settings": {"shares": list(shares)}}


def noise(trial: Trial, etas: Sequence[float] = ETAS, spreads: Sequence[float] = SPREADS) -> Result:
    """More noise during sampling than DDPM's, on a grid; the best picture of an ask counts.

    x' = sqrt(a') x_0 + sqrt|1 - a' - s^2| e + spread s z with s = eta s_DDPM; of flow models x' =
    (1 - t') x_0 + sqrt|t'^2 - s^2| e + spread s z with s = eta times the deviation of q(x' | x,
    x_0). The first cell is eta 0, which is plain DDIM, or Euler's method.

    Cost: 1 + ``len(etas)`` * ``len(spreads)`` pictures an ask, and one untouched, kept.

    Returns:
        rows: with ``cells``, whether each cell shows the target. cells: [eta, spread] each.
    """
    asks = trial.target_asks()
    cells = [[0.0, 1.0], *([eta, spread] for eta in etas if eta for spread in spreads)]

    def shown(cell: list[float]) -> list[bool]:
        eta, spread = cell

        def latents(part: Sequence[Ask], text: Text, start: torch.Tensor) -> torch.Tensor:
            fresh = fresh_noise(ask.seed for ask in part)
            return trial.sampler.latents(text, start, eta=eta, spread=spread, fresh=fresh)

        return shows_target(trial, asks, latents)

    return best_of(trial, asks, map(shown, cells)) | {"cells": cells}


def fresh_noise(seeds: Iterable[int]) -> Fresh:
    """Noise for each step, each picture's from a generator of its own.

    With one for all a picture would depend on the others of its batch.
    """
    # Not the seed of the picture's first noise, of which this must be independent.
    seeds = [zlib.crc32(f"{seed}|fresh".encode()) for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=each) for each in generators])

    return fresh


def draw_latents(
    trial: Trial, asks: Sequence[Ask], latents: Latents
) -> torch.Tensor:  # [N, H, W, 3]
    """Pictures of ``latents(asks, text, noise)``, in batches."""
    sampler, pictures = trial.sampler, []
    for i in range(0, len(asks), sampler.batch):
        part = asks[i : i + sampler.batch]
        text, start = sampler.texts([a.prompt for a in part]), sampler.noise([a.seed for a in part])
        pictures.append(sampler.decode(latents(part, text, start)))
        sampler.on_pictures(len(part))
    return as_saved(torch.cat(pictures))


def shows_target(trial: Trial, asks: Sequence[Ask], latents: Latents) -> list[bool]:
    """Whether each picture of ``latents`` shows the target."""
    return trial.shows_target(draw_latents(trial, asks, latents))


def best_of(trial: Trial, asks: Sequence[Ask], shown: Iterable[Sequence[bool]]) -> Result:
    """Rows of a grid: ``shown`` holds what each cell shows of all asks, and the best one counts."""
    by_ask = [list(cells) for cells in zip(*shown)]
    rows = trial.judged_rows(asks, [any(cells) for cells in by_ask])
    return {"rows": [row | {"cells": cells} for row, cells in zip(rows, by_ask)]}
