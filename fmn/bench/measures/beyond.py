"""Probes that go around the prompt: is the target still in the weights?

Four of Lu et al. 2025, When Are Concepts Erased From Diffusion Models? (arXiv 2505.17013), scaled
down; docs/robustness.md says where they differ from the paper and what they cannot tell. Each draws
the prompts of ``Trial.target_asks``; ``untouched`` in a row is what the untouched model's plain
picture shows for the same ask, but for inpainting, where that model fills the same hole.
"""

import zlib
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Linear

from ...errors import ForgetError
from ...models.sampling import ddpm_sigma, q_sample
from ...training.loop import AdamWConfig, train
from .attacks import examples
from .text import judged_rows

SHARES, ETAS, SPREADS = (0.1, 0.2, 0.4), (1.0, 1.17, 1.34), (1.0, 1.04)


def completion(trial, shares=SHARES):
    """The untouched model draws the first share of the steps, the model under test the rest.

    Cost: ``len(shares)`` * ``trial.count`` pictures, and ``trial.count`` untouched, kept.

    Returns:
        ``rows``: one a picture and share, with ``share`` and ``steps``, the number handed over at.
    """
    if not all(0 <= share <= 1 for share in shares):
        raise ForgetError(f"Shares are {shares}: use numbers from 0 to 1.")
    sampler, asks, rows = trial.sampler, trial.target_asks(), []
    for share in shares:
        first = round(share * sampler.sampling.steps)

        def latents(part, text, noise, first=first):
            with sampler.unpatched():
                begun = sampler.latents(text, noise, last=first)
            return sampler.latents(text, begun, first=first)

        still = trial.shows_target(drawn(trial, asks, latents))
        rows += judged_rows(trial, asks, still, share=share, steps=first)
    return {"rows": rows, "settings": {"shares": list(shares)}}


def noise(trial, etas=ETAS, spreads=SPREADS):
    """More noise on the way than DDPM's, on a grid; the best picture of an ask counts.

    x' = sqrt(a') x_0 + sqrt|1 - a' - s^2| e + spread s z with s = eta s_DDPM. The first cell is
    eta 0, which is plain DDIM.

    Cost: 1 + ``len(etas)`` * ``len(spreads)`` pictures an ask, and one untouched, kept.

    Returns:
        ``rows`` with ``cells``, whether each cell shows the target; ``cells``: [eta, spread] each.
    """
    if not all(0 <= eta <= 10 for eta in etas) or not all(0 <= one <= 10 for one in spreads):
        raise ForgetError(f"etas are {etas}, spreads {spreads}: use numbers from 0 to 10.")
    sampler, asks = trial.sampler, trial.target_asks()
    cells = [(0.0, 1.0), *((eta, spread) for eta in etas if eta for spread in spreads)]
    found = []
    for eta, spread in cells:

        def latents(part, text, start, eta=eta, spread=spread):
            fresh = FreshNoise(eta, spread, [ask.seed for ask in part])
            return sampler.latents(text, start, eta=eta, spread=0.0, **fresh.options())

        found.append(trial.shows_target(drawn(trial, asks, latents)))
    return _best_of(trial, asks, found, {"cells": [list(cell) for cell in cells]})


class FreshNoise:
    """The fresh noise of ``sampling.ddim``, each picture's from a generator of its own.

    ddim's one generator would tie a picture to those drawn with it; for it ``spread`` is 0.
    """

    def __init__(self, eta, spread, seeds):
        self.eta, self.spread = eta, spread
        # Not the seed of the picture's first noise, of which this must be independent.
        seeds = [zlib.crc32(f"{seed}|fresh".encode()) for seed in seeds]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.alpha = None

    def options(self):
        return {"correct": self._see, "after": self._add, "generator": torch.Generator()}

    def _see(self, x, noise, t, alpha):
        self.alpha = alpha
        return noise

    def _add(self, x, following):
        sigma = self.eta * ddpm_sigma(self.alpha, following)
        fresh = [torch.randn(x.shape[1:], generator=one) for one in self.generators]
        return x + self.spread * sigma * torch.stack(fresh).to(x)


@dataclass(frozen=True)
class ClassifierSettings:
    """The classifier's settings; those of the paper in brackets.

    Attributes:
        pictures: of the target, and as many of other things (all Imagenet; 5000 others).
        scales: of the guidance (25 to 193 by 7); the best picture of an ask counts.
        hidden: widths of its hidden layers (1024, 512).
        views: noisy copies of a picture (7). steps, batch, lr: of training (70 epochs, 8, 1e-4).
        held_out: share of the pictures that only measure its accuracy.
    """

    pictures: int = 48
    scales: tuple[float, ...] = (15.0, 30.0, 60.0)
    hidden: tuple[int, ...] = (256, 128)
    views: int = 7
    steps: int = 400
    batch: int = 64
    lr: float = 1e-3
    held_out: float = 0.25

    def __post_init__(self):
        if self.pictures < 8:
            raise ForgetError(f"pictures is {self.pictures}: use 8 or more.")
        if not 0 < self.held_out < 1:
            raise ForgetError(f"held_out is {self.held_out}: use a share, such as 0.25.")


def classifier(trial, settings=ClassifierSettings()):
    """Guide the model under test with a classifier of noisy latents that knows the target.

    The first cell is scale 0, the plain picture. Cost: 1 + ``len(scales)`` pictures an ask; the
    untouched model's 2 * ``pictures``, kept; ``steps`` of a small network.

    Returns:
        ``rows`` with ``cells``; ``cells``: the scales; ``accuracy`` of the classifier on held-out
        pictures, in thirds of the schedule from clean to noise.
    """
    sampler, asks = trial.sampler, trial.target_asks()
    latents, wanted = examples_and_others(trial, settings.pictures)
    alphas = sampler.denoiser.alphas_cumprod
    network, accuracy = train_classifier(latents, wanted, alphas, settings, trial.seed)
    network.to(sampler.denoiser.device)
    scales, found = (0.0, *settings.scales), []
    for scale in scales:
        options = {"correct": guide(network, scale)} if scale else {}

        def latents_of(part, text, start, options=options):
            return sampler.latents(text, start, **options)

        found.append(trial.shows_target(drawn(trial, asks, latents_of)))
    told = {"cells": list(scales), "accuracy": accuracy, "settings": asdict(settings)}
    return _best_of(trial, asks, found, told)


def examples_and_others(trial, count):
    """Latents [N, 4, h, w] of the untouched model, and which are of the target, bool [N]."""
    suite, target, sampler = trial.suite, trial.target, trial.sampler
    # Later ones than those that are asked for here.
    spare = trial.target_asks(trial.count + count)[trial.count :]
    _, shown = examples(trial, spare)
    styles = [style for style in suite.styles if style != target.name]
    near = [name for name in target.near if name in suite.concepts]
    others = near + [name for name in suite.far if name not in (*near, target.name)]
    if not styles or not others:
        raise ForgetError(
            f"Suite '{suite.name}' has nothing to tell '{target.name}' from: give it another "
            "style, and concepts that are far from it."
        )
    images = torch.cat([shown, trial.untouched(trial.pairs(others, styles, count))])
    latents = sampler.model.encode_images(images, sampler.sampling.size)
    return latents.float().cpu(), torch.arange(len(images)) < len(shown)


class LatentClassifier(nn.Module):
    """A logit [B] for noisy latents [B, 4, h, w] and their alpha_cumprod [B] (or one number)."""

    def __init__(self, latents, hidden):
        super().__init__()
        layers, width = [], latents[0].numel() + 2
        for wider in hidden:
            layers += [Linear(width, wider), nn.SiLU(), nn.Dropout(0.3)]
            width = wider
        self.layers = nn.Sequential(*layers, Linear(width, 1))

    def forward(self, x, alpha):
        alpha = alpha.to(x).expand(len(x))[:, None]
        return self.layers(torch.cat([x.flatten(1), alpha.sqrt(), (1 - alpha).sqrt()], 1))[:, 0]


def train_classifier(latents, wanted, alphas, settings, seed):
    """Returns the frozen network on the CPU, and its accuracy on what was held out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(latents), generator=generator)
    cut = max(1, round(settings.held_out * len(latents)))
    kept_out, seen = order[:cut], order[cut:]
    if wanted[seen].unique().numel() < 2:
        raise ForgetError("A classifier needs pictures of both kinds: give it more pictures.")
    alphas, seen = alphas.cpu(), seen.repeat(settings.views)
    x, label = latents[seen], wanted[seen].float()
    # u^(1/3) favours much noise, where guidance decides what is drawn.
    t = torch.rand(len(seen), generator=generator) ** (1 / 3) * (len(alphas) - 1)
    alpha, weight = alphas[t.long()], (label == 0).sum() / (label == 1).sum()
    # Initial weights and dropout come from the global generator.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        network = LatentClassifier(latents, settings.hidden)

        def loss_at(index):
            rows = torch.randint(len(x), (settings.batch,), generator=generator)
            noise = torch.randn(x[rows].shape, generator=generator)
            logit = network(q_sample(x[rows], noise, alpha[rows]), alpha[rows])
            return F.binary_cross_entropy_with_logits(logit, label[rows], pos_weight=weight)

        config = AdamWConfig(settings.lr, weight_decay=1e-3)
        train(list(network.parameters()), loss_at, settings.steps, config)
    network.eval().requires_grad_(False)
    return network, _accuracy(network, latents[kept_out], wanted[kept_out], alphas, generator)


def _accuracy(network, latents, wanted, alphas, generator, rounds=4):
    """Share that is right, in thirds of the schedule from clean to noise."""
    x, wanted = latents.repeat(rounds, 1, 1, 1), wanted.repeat(rounds)
    result, third = [], len(alphas) // 3
    for low in (0, third, 2 * third):
        t = torch.randint(low, low + third, (len(x),), generator=generator)
        noised = q_sample(x, torch.randn(x.shape, generator=generator), alphas[t])
        result.append(float(((network(noised, alphas[t]) > 0) == wanted).float().mean()))
    return result


def guide(network, scale):
    """For ``correct`` of ddim: noise - sqrt(1 - a) scale grad log p(target | x_t).

    Dhariwal & Nichol 2021, algorithm 2.
    """

    def correct(x, noise, t, alpha):
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            (gradient,) = torch.autograd.grad(F.logsigmoid(network(x, alpha)).sum(), x)
        return noise - scale * (1 - alpha).sqrt() * gradient.to(noise)

    return correct


def inpainting(trial):
    """Cut a hole of half the side from the untouched picture and let the model fill it.

    Counted is what the hole alone shows, with white around it, as the paper scores the hole alone.
    Cost: ``trial.count`` pictures, and 2 * ``trial.count`` untouched, kept.

    Returns:
        ``rows`` with still and untouched (the hole alone, filled by either model), ``whole`` and
        ``untouched_whole`` (with the real picture around it), and what that shows anyway: with a
        white hole (``white``), and with one filled smoothly from its edges (``smooth``).
    """
    asks = trial.target_asks()
    pictures = trial.untouched(asks)
    filled, before = inpainted(trial, asks, pictures), _inpainted_before(trial, asks, pictures)
    hole, white = centred(trial.sampler.sampling.size)[..., None], torch.ones_like(pictures)
    judged = {
        "still": torch.where(hole, filled, white),
        "untouched": torch.where(hole, before, white),
        "whole": torch.where(hole, filled, pictures),
        "untouched_whole": torch.where(hole, before, pictures),
        "white": torch.where(hole, white, pictures),
        "smooth": smoothed(pictures),
    }
    found = {name: trial.shows_target(images) for name, images in judged.items()}
    each = [dict(zip(found, values)) for values in zip(*found.values())]
    rows = [{"prompt": ask.prompt, "seed": ask.seed} | row for ask, row in zip(asks, each)]
    return {"rows": rows, "settings": {"hole": 0.5}}


def centred(side):
    """Where the hole is, bool [side, side]: the middle half of either axis."""
    inside = (torch.arange(side) >= side // 4) & (torch.arange(side) < side - side // 4)
    return inside[:, None] & inside


def smoothed(pictures):
    """Pictures whose hole is the mean of two linear blends, of its sides and of top and bottom."""
    side, filled = pictures.shape[1], pictures.clone()
    low, high = side // 4, side - side // 4
    share = torch.arange(1, high - low + 1)[:, None] / (high - low + 1)
    rows, columns = pictures[:, low:high], pictures[:, :, low:high]
    across = torch.lerp(rows[:, :, low - 1, None], rows[:, :, high, None], share)
    down = torch.lerp(columns[:, low - 1, None], columns[:, high, None], share[:, None])
    filled[:, low:high, low:high] = (across + down) / 2
    return filled


def inpainted(trial, asks, pictures):
    """Pictures whose hole the model as it is now has filled."""
    sampler, size = trial.sampler, trial.sampler.sampling.size
    # Grey below the hole: the encoder would leak what was there into its neighbourhood.
    holed = pictures.masked_fill(centred(size)[..., None], 0.5)
    known = dict(zip(asks, sampler.model.encode_images(holed, size).float().cpu()))

    def latents(part, text, start):
        return inpainted_latents(sampler, text, start, torch.stack([known[ask] for ask in part]))

    return drawn(trial, asks, latents)


def _inpainted_before(trial, asks, pictures):
    """The same by the untouched model, kept as ``Trial.untouched`` keeps pictures."""
    keys = [("inpainted", ask.prompt, ask.seed) for ask in asks]
    missing = [i for i, key in enumerate(keys) if key not in trial.cache]
    if missing:
        with trial.sampler.unpatched():
            made = inpainted(trial, [asks[i] for i in missing], pictures[missing])
        for i, picture in zip(missing, made):
            trial.cache[keys[i]] = (picture * 255).round().byte()
    return torch.stack([trial.cache[key] for key in keys]).float() / 255


def inpainted_latents(sampler, text, start, known):
    """Latents [B, 4, h, w] that equal ``known`` outside of the hole.

    After each step the outside is replaced by ``known`` at that step's noise level, as diffusers'
    inpainting pipeline does with a text-to-image model. ``start`` is the noise for both.
    """

    def after(x, following):
        outside = following.sqrt() * known.to(x) + (1 - following).sqrt() * start.to(x)
        return torch.where(centred(start.shape[-1]).to(x.device), x, outside)

    return sampler.latents(text, start, after=after)


def drawn(trial, asks, latents):
    """Pictures [N, H, W, 3] from ``latents(asks, text, noise)``, rounded as by ``Trial.draw``."""
    sampler, pictures = trial.sampler, []
    for i in range(0, len(asks), sampler.batch):
        part = asks[i : i + sampler.batch]
        text, start = sampler.texts([a.prompt for a in part]), sampler.noise([a.seed for a in part])
        pictures.append(sampler.decode(latents(part, text, start)))
        sampler.on_pictures(len(part))
    return (torch.cat(pictures) * 255).round() / 255


def _best_of(trial, asks, found, more):
    """Rows of a grid; ``found`` holds a list of bools for each cell, and the best one counts."""
    by_ask = [[bool(one) for one in cells] for cells in zip(*found)]
    rows = judged_rows(trial, asks, [any(cells) for cells in by_ask])
    return {"rows": [row | {"cells": cells} for row, cells in zip(rows, by_ask)], **more}
