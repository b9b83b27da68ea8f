"""DDIM (Song et al. 2021) over any host, from embeddings instead of words.

A bench needs more than a host's sampler offers: to start in the middle, to change the
predicted noise on the way, to draw from learned embeddings, and to do the same in every host.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ForgetError
from .interface import Denoiser, NoiseFunction, NoiseSchedule, Text

DRAWN_AT_ONCE = 4  # pictures that a host draws together, whatever the memory: the methods' default

# (x_t, predicted noise, t, alpha-bar of t) -> noise
Correction = Callable[[Tensor, Tensor, int, Tensor], Tensor]
# (x, alpha-bar of the next step) -> x
AfterStep = Callable[[Tensor, Tensor], Tensor]
Fresh = Callable[[Tensor], Tensor]  # x -> noise of its shape


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        steps: calls of the model a picture (two forwards each, with guidance other than 1).
        guidance: scale of classifier-free guidance (Ho & Salimans 2022); 1 is none.
        size: pixels a side; 0 takes the family's.
    """

    steps: int = 20
    guidance: float = 7.0
    size: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ForgetError(f"Sampling steps are {self.steps}: use 1 to 1000.")
        if not 0 <= self.guidance <= 100:
            raise ForgetError(f"Guidance is {self.guidance}: use 0 to 100; 1 is none.")
        if self.size % 64 or not 0 <= self.size <= 4096:
            raise ForgetError(f"size is {self.size}: use a multiple of 64 up to 4096, or 0.")


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """Time steps from ``total`` - 1 down, evenly spaced ("trailing", Lin et al. 2024, table 2)."""
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def seeded_noise(seeds: Iterable[int], side: int, channels: int = 4) -> Tensor:
    """Noise of unit variance [N, channels, side, side] on the CPU, from one generator a seed.

    A seed's noise is the same in any batch and on any device.
    """
    shape = channels, side, side
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def expand(text: Text, count: int) -> Text:
    """One encoded prompt as a batch of ``count``, unless it has to stay alone."""
    if text.alone:
        return text
    vectors = {name: v.expand(count, *v.shape[1:]) for name, v in text.vectors.items()}
    return Text(text.context.expand(count, -1, -1), vectors)


def guided(denoiser: Denoiser, text: Text, empty: Text, guidance: float) -> NoiseFunction:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), where 1 + w is ``guidance``.

    Args:
        text: of B prompts. empty: of one, the unconditional.

    Returns:
        a function from x_t [B, C, h, w] and t to the guided noise [B, C, h, w].
    """
    if guidance == 1:
        return lambda x, t: denoiser.predict_noise(x, torch.full((len(x),), t), text)
    if text.alone:

        def predict_apart(x: Tensor, t: int) -> Tensor:
            with_text, without = predictions(denoiser, x, t, [text, empty])
            return without + guidance * (with_text - without)

        return predict_apart
    both = Text.cat([text, expand(empty, len(text.context))])

    def predict(x: Tensor, t: int) -> Tensor:
        noise = denoiser.predict_noise(torch.cat([x, x]), torch.full((2 * len(x),), t), both)
        with_text, without = noise.chunk(2)
        return without + guidance * (with_text - without)

    return predict


@torch.no_grad()
def drawn(
    denoiser: Denoiser, text: Text, empty: Text, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Clean latents from noise [B, C, h, w], of one prompt or of B."""
    predict = guided(denoiser, expand(text, len(noise)), empty, guidance)
    return denoiser.schedule.sample(predict, noise.to(denoiser.device), steps)


def predictions(denoiser: Denoiser, x: Tensor, t: int, texts: Sequence[Text]) -> Sequence[Tensor]:
    """Predicted noise for x [B, C, h, w] at the step t, given each of several prompts [1, T, D].

    In one batch, for which all must have the same T; with a forward for each if they are alone.
    """
    if texts[0].alone:
        return [denoiser.predict_noise(x, torch.full((len(x),), t), text) for text in texts]
    rows = Text.cat([expand(text, len(x)) for text in texts])
    many = x.repeat(len(texts), 1, 1, 1)
    return denoiser.predict_noise(many, torch.full((len(many),), t), rows).split(len(x))


def posterior_sigma(signals: Sequence[float], levels: Sequence[float]) -> float:
    """``ddpm_sigma`` for x = a x_0 + sigma noise: of q(x' | x, x_0), at signals a, a' and levels
    sigma, sigma'."""
    return levels[1] * (1 - (signals[0] * levels[1] / (signals[1] * levels[0])) ** 2) ** 0.5


def ddpm_sigma(alpha: Tensor, following: Tensor) -> Tensor:
    """Standard deviation of DDPM's fresh noise in a step (Song et al. 2021, eq. 16 with eta 1)."""
    return ((1 - following) / (1 - alpha) * (1 - alpha / following)).sqrt()


@torch.no_grad()
def ddim(
    predict: NoiseFunction,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    first: int = 0,
    last: int | None = None,
    eta: float = 0.0,
    spread: float = 1.0,
    fresh: Fresh = torch.randn_like,
    correct: Correction | None = None,
    after: AfterStep | None = None,
) -> Tensor:
    """Draw latents by DDIM (Song et al. 2021, eq. 12).

    Args:
        predict: noise from x_t and t, e.g. of ``guided``.
        x: [B, 4, h, w], noise, or the latent that an earlier call left at step ``first``.
        steps: number of steps of the whole schedule; this call does those from ``first`` up to,
            not with, ``last`` (None: the end).
        eta: share of fresh noise a step; 0 is deterministic, 1 is DDPM's.
        spread: factor on that fresh noise (Lu et al. 2025, arXiv 2505.17013, noise probe).
        fresh: makes that noise.
        correct: called on every prediction. after: called after every step.

    Returns:
        x_0 (or x at step ``last``), [B, 4, h, w].
    """
    times = trailing_timesteps(len(alphas_cumprod), steps)
    last = steps if last is None else last
    for i in range(first, last):
        alpha = alphas_cumprod[times[i]].to(x)
        following = alphas_cumprod[times[i + 1]].to(x) if i + 1 < steps else torch.ones_like(alpha)
        noise = predict(x, times[i]).to(x)
        if correct is not None:
            noise = correct(x, noise, times[i], alpha)
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()  # "predicted x_0" of eq. 12
        sigma = eta * ddpm_sigma(alpha, following)
        # "Direction pointing to x_t" of eq. 12. With eta above 1 the root's argument turns
        # negative; the noise probe takes its absolute value.
        x = following.sqrt() * clean + (1 - following - sigma**2).abs().sqrt() * noise
        if eta:
            x = x + spread * sigma * fresh(x).to(x)  # "random noise" of eq. 12
        if after is not None:
            x = after(x, following)
    return x


def q_sample(clean: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """x_t of a clean latent, the forward process of DDPM (Ho et al. 2020, eq. 4).

    Args:
        clean, noise: [B, 4, h, w]. alpha_cumprod: [B], the product of alphas up to each t.
    """
    alpha_cumprod = alpha_cumprod.view(-1, 1, 1, 1)
    return alpha_cumprod.sqrt() * clean + (1 - alpha_cumprod).sqrt() * noise


class DDPMSchedule(NoiseSchedule):
    """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise (Ho et al. 2020, eq. 4).

    ``levels`` are alpha-bar, float32.
    """

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return q_sample(clean, noise, self.levels.to(clean)[t]), noise

    def partial_sample(
        self, predict: NoiseFunction, noise: Tensor, steps: int, last: int
    ) -> Tensor:
        return ddim(predict, noise, self.levels, steps, last=last)

    def sample(self, predict: NoiseFunction, noise: Tensor, steps: int, **options: Any) -> Tensor:
        return ddim(predict, noise, self.levels, steps, **options)


@dataclass(frozen=True)
class SigmaSchedule(NoiseSchedule):
    """x = a x_0 + sigma noise, by ComfyUI's noise levels; ``levels`` are sigma, ascending.

    The network gives, or can be made to give, the direction d = (x - x_0) / sigma: in flow models
    d is the velocity, and a is 1 - sigma.

    Attributes:
        scales: x / x_t of each time step [S], where x_t is the network's input.
        signals: a of each time step [S].
    """

    scales: Tensor
    signals: Tensor

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        every = (self.signals, self.levels, self.scales)
        signal, level, scale = (values.to(clean)[t].view(-1, 1, 1, 1) for values in every)
        x = signal * clean + level * noise
        return x / scale, (x - clean) / level

    def partial_sample(
        self, predict: NoiseFunction, noise: Tensor, steps: int, last: int
    ) -> Tensor:
        return self.sample(predict, noise, steps, last=last)

    @torch.no_grad()
    def sample(self, predict: NoiseFunction, noise: Tensor, steps: int, **options: Any) -> Tensor:
        """By Euler's method on dx / d sigma = d (Karras et al. 2022, eq. 1), to sigma 0.

        Args:
            options: ``first``, the step to start at, from its x_t; ``last``, that to end before;
                ``eta``, ``spread`` and ``fresh``, see ``ddim``.
        """
        times = trailing_timesteps(len(self.levels), steps)
        levels, scales, signals = (
            [*values[times].tolist(), last]
            for values, last in ((self.levels, 0.0), (self.scales, 1.0), (self.signals, 1.0))
        )
        eta, spread = options.get("eta", 0.0), options.get("spread", 1.0)
        x = noise
        for i in range(options.get("first", 0), options.get("last", steps)):
            direction, x = predict(x, times[i]).to(x), x * scales[i]
            if eta:
                clean = x - levels[i] * direction
                sigma = eta * posterior_sigma(signals[i : i + 2], levels[i : i + 2])
                # The noise in x, less of it than Euler's step keeps; as in ``ddim``.
                kept = abs(levels[i + 1] ** 2 - sigma**2) ** 0.5
                x = signals[i + 1] * clean + kept / levels[i] * (x - signals[i] * clean)
                x = x + spread * sigma * options["fresh"](x).to(x)
            else:
                x = x + direction * (levels[i + 1] - levels[i])
            x = x / scales[i + 1]
        return x
