"""The denoising task of the demo model's U-Net and text encoder."""

import torch

from demo.autoencoder import odds, training_rows
from demo.captions import caption, every_word
from demo.network import UsedRows
from demo.optim import Optimiser
from demo.parallel import Alone

STEPS = 1000  # time steps of the noise schedule


def signal_levels(start=0.00085, end=0.012):
    """The share of signal in the variance, alpha_bar [1000], of Stable Diffusion's schedule."""
    betas = torch.linspace(start**0.5, end**0.5, STEPS, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def draw_times(count, generator):
    """Time steps [count], more of them late: structure and colour are decided at high noise."""
    return (STEPS * torch.rand(count, generator=generator) ** 0.8).long().clamp(max=STEPS - 1)


def noised(latents, times, noise, levels, pure):
    """Noised latents and the noise that a perfect network would find in them.

    Where ``pure`` is true, time is the last one and the input is the noise alone. That is where
    sampling starts, while the schedule's last step still holds 0.5 % signal: dark and blue
    pictures would come out pale.
    """
    a = levels[times].view(-1, 1, 1, 1)
    mixed = a.sqrt() * latents + (1 - a).sqrt() * noise
    mixed = torch.where(pure.view(-1, 1, 1, 1), noise, mixed)
    return mixed, (mixed - a.sqrt() * latents) / (1 - a).sqrt()


def loss_weights(times, levels):
    """Weight of the noise's squared error that makes it x0's, times min(SNR, 5) + 1."""
    ratio = levels[times] / (1 - levels[times])
    return (ratio.clamp(max=5) + 1) / ratio


class Task:
    """Batches of latents with captions, and the loss on one.

    Args:
        latents: unscaled float16 [variants, N, 4, h, w]; rows: the pictures' metadata.
        derived: the share of derived styles in a batch; by default that of the pictures.
        pure_share: how often the input is noise alone, see ``noised``.
    """

    def __init__(self, networks, latents, rows, batch, team=None, derived=None, pure_share=0.03):
        self.networks, self.batch, self.pure_share = networks, batch, pure_share
        self.team = team or Alone()
        self.rows = training_rows(rows)
        self.odds = odds(self.rows, derived)
        self.latents, self.levels = latents, signal_levels().to(networks.unet.device)

    def examples(self, generator):
        """Latents and captions of a random batch: chosen on the CPU, by each process for all."""
        chosen = torch.multinomial(self.odds, self.batch, replacement=True, generator=generator)
        rows = [self.rows[i] for i in chosen.tolist()]
        variants = torch.randint(len(self.latents), (self.batch,), generator=generator)
        latents = self.latents[variants, [row["index"] for row in rows]].float()
        captions = [caption(row["concept"], row["style"], generator) for row in rows]
        return latents * self.networks.scale, captions

    def part(self, *values):
        """This process's part of tensors, on the device, and of lists."""
        part, device = slice(self.team.rank, None, self.team.count), self.networks.unet.device
        return [v[part].to(device) if isinstance(v, torch.Tensor) else v[part] for v in values]

    def loss(self, generator):
        """Mean error of x0 on this process's part of a random batch."""
        networks = self.networks
        latents, captions = self.examples(generator)
        times = draw_times(self.batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        pure = torch.rand(self.batch, generator=generator) < self.pure_share
        times[pure] = STEPS - 1
        latents, times, noise, pure, captions = self.part(latents, times, noise, pure, captions)
        mixed, target = noised(latents, times, noise, self.levels, pure)
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        found = networks.unet(mixed, times, self._context(captions)).sample
        error = (found - target).square().mean((1, 2, 3))
        return (error * loss_weights(times, self.levels)).mean()

    def _context(self, captions):
        """Text states [N, 77, width]; equal captions are encoded once."""
        unique = list(dict.fromkeys(captions))
        states = self.networks.context(self.networks.tokens(unique))
        return states[[unique.index(text) for text in captions]]


def trainable(networks, rows):
    """Replace the token embedding by its used rows; returns (matrices, other parameters)."""
    texts = every_word(
        sorted({row["concept"] for row in rows}), sorted({row["style"] for row in rows})
    )
    # padding and ends are in every caption
    used = sorted(set(networks.tokens(texts).flatten().tolist()))
    networks.text.set_input_embeddings(
        UsedRows(networks.text.get_input_embeddings(), used).to(networks.unet.device)
    )
    unet = list(networks.unet.parameters())
    matrices = [p for p in unet if p.ndim > 1]
    rest = [p for p in unet if p.ndim < 2]
    return matrices, rest + [p for p in networks.text.parameters() if p.requires_grad]


def whole_embedding(networks):
    """Undo what ``trainable`` did to the text encoder, keeping what was learned."""
    rows = networks.text.get_input_embeddings()
    if isinstance(rows, UsedRows):
        networks.text.set_input_embeddings(rows.whole().requires_grad_(True))


def optimiser_for(networks, rows, muon_lr, adam_lr):
    return Optimiser(*trainable(networks, rows), muon_lr, adam_lr)
