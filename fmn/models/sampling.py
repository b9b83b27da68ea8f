"""DDIM (Song et al. 2021) over any host, from embeddings instead of words.

A bench needs more of a sampler than a host's own gives: to start in the middle, to change the
predicted noise on the way, to draw from learned embeddings, and to do the same in every host.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import ForgetError
from .interface import Text

DRAWN_AT_ONCE = 4  # pictures that a host draws together, whatever the memory: the methods' default


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

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ForgetError(f"Sampling steps are {self.steps}: use 1 to 1000.")
        if not 0 <= self.guidance <= 100:
            raise ForgetError(f"Guidance is {self.guidance}: use 0 to 100; 1 is none.")
        if self.size % 64 or not 0 <= self.size <= 4096:
            raise ForgetError(f"size is {self.size}: use a multiple of 64 up to 4096, or 0.")


def trailing_timesteps(total, steps):
    """Time steps from ``total`` - 1 down, evenly spaced ("trailing", Lin et al. 2024, table 2)."""
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def seeded_noise(seeds: Iterable[int], side: int, channels: int = 4) -> torch.Tensor:
    """Noise of unit variance [N, channels, side, side] on the CPU, from one generator a seed.

    A seed's noise is the same in any batch and on any device.
    """
    shape = channels, side, side
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def expand(text, count):
    """One encoded prompt as a batch, unless it has to stay alone."""
    if text.alone:
        return text
    vectors = {name: v.expand(count, *v.shape[1:]) for name, v in text.vectors.items()}
    return Text(text.context.expand(count, -1, -1), vectors)


def guided(denoiser, text, empty, guidance):
    """A function from x_t [B, 4, h, w] and t to the guided noise; ``empty`` is one prompt's."""
    if guidance == 1:
        return lambda x, t: denoiser.predict_noise(x, torch.full((len(x),), t), text)
    if text.alone:

        def apart(x, t):
            with_text, without = predictions(denoiser, x, t, [text, empty])
            return without + guidance * (with_text - without)

        return apart
    both = Text.cat([text, expand(empty, len(text.context))])

    def predict(x, t):
        noise = denoiser.predict_noise(torch.cat([x, x]), torch.full((2 * len(x),), t), both)
        with_text, without = noise.chunk(2)
        return without + guidance * (with_text - without)

    return predict


def predictions(denoiser, x, t, texts):
    """Predicted noise for x [B, C, h, w] at the step t, given each of several prompts [1, T, D].

    In one batch, for which all must have the same T; with a forward for each if they are alone.
    """
    if texts[0].alone:
        return [denoiser.predict_noise(x, torch.full((len(x),), t), text) for text in texts]
    rows = Text.cat([expand(text, len(x)) for text in texts])
    many = x.repeat(len(texts), 1, 1, 1)
    return denoiser.predict_noise(many, torch.full((len(many),), t), rows).split(len(x))


def begin(denoiser, predict, noise, steps, last):
    """The first ``last`` of ``steps`` steps of a drawing from noise, as the model is drawn with."""
    if denoiser.alphas_cumprod is None:
        return euler(predict, noise, denoiser.sigmas, denoiser.scales, steps, last)
    return ddim(predict, noise, denoiser.alphas_cumprod, steps, last=last)


def step_count(denoiser):
    """Number of time steps that a borrowed model knows."""
    alphas = denoiser.alphas_cumprod
    return len(denoiser.sigmas if alphas is None else alphas)


@torch.no_grad()
def euler(predict, x, sigmas, scales, steps, last):
    """Begin a drawing with Euler's method on dx / d sigma (Karras et al. 2022, eq. 1).

    For any noising x = a clean + sigma noise whose network gives, or can be made to give, the
    direction d = (x - clean) / sigma: in flow models d is the velocity, and a is 1 - sigma.

    Args:
        predict: d of x_t and t.
        x: [B, C, h, w], noise.
        sigmas: noise level of each time step, ascending.
        scales: what x_t, the network's input, is multiplied by to give x; one a time step.
        steps: number of steps of the whole schedule; this call does the first ``last``, fewer.

    Returns:
        x_t at step ``last``, [B, C, h, w].
    """
    times = trailing_timesteps(len(sigmas), steps)
    for now, following in zip(times[:last], times[1:]):
        step = predict(x, now).to(x) * (sigmas[following] - sigmas[now]).to(x)
        x = (x * scales[now].to(x) + step) / scales[following].to(x)
    return x


def ddpm_sigma(alpha, following):
    """Standard deviation of DDPM's fresh noise in a step (Song et al. 2021, eq. 16 with eta 1)."""
    return ((1 - following) / (1 - alpha) * (1 - alpha / following)).sqrt()


@torch.no_grad()
def ddim(
    predict,
    x,
    alphas_cumprod,
    steps,
    first=0,
    last=None,
    eta=0.0,
    spread=1.0,
    generator=None,
    correct=None,
    after=None,
):
    """Draw latents by DDIM (Song et al. 2021, eq. 12).

    Args:
        predict: noise from x_t and t, e.g. of ``guided``.
        x: [B, 4, h, w]: noise, or the latent that an earlier call left at step ``first``.
        steps: number of steps of the whole schedule; this call does those from ``first`` up to,
            not with, ``last`` (None: the end).
        eta: share of fresh noise a step; 0 is deterministic, 1 is DDPM's.
        spread: factor on that fresh noise (Lu et al. 2025, arXiv 2505.17013, noise probe).
        generator: for the fresh noise.
        correct: (x, noise, t, alpha) -> noise, called on every prediction.
        after: (x, next alpha) -> x, called after every step.

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
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        sigma = eta * ddpm_sigma(alpha, following)
        # With eta above 1 the root's argument turns negative; the probe takes its absolute value.
        x = following.sqrt() * clean + (1 - following - sigma**2).abs().sqrt() * noise
        if eta:
            fresh = torch.randn(x.shape, generator=generator).to(x)
            x = x + spread * sigma * fresh
        if after is not None:
            x = after(x, following)
    return x


def q_sample(clean, noise, alpha_cumprod):
    """x_t of a clean latent (Ho et al. 2020, eq. 4).

    Args:
        clean, noise: [B, 4, h, w]. alpha_cumprod: [B], the product of alphas up to each t.
    """
    alpha_cumprod = alpha_cumprod.view(-1, 1, 1, 1)
    return alpha_cumprod.sqrt() * clean + (1 - alpha_cumprod).sqrt() * noise
