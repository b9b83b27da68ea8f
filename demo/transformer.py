"""The demo transformer: a small Flux on the demo model's text encoder and autoencoder.

Only its own weights are trained. Flow matching as in Stable Diffusion 3 (Esser et al., 2024): on
the line from a picture (sigma 0) to noise (sigma 1) it predicts the velocity, noise - picture.
"""

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from demo.diffusion import Task
from demo.network import Networks
from demo.optim import Optimiser
from fmn.hosts.diffusers.transformer import CONFIG, END, TOKENS, velocity


class DemoTransformer(nn.Module):
    """``FluxTransformer2DModel`` on latents [N, 4, 16, 16]."""

    def __init__(self):
        super().__init__()
        self.flux = FluxTransformer2DModel(**CONFIG)

    @property
    def device(self):
        return self.flux.device

    def forward(self, latents, sigmas, context, pooled):
        """Velocity, as ``latents``; sigmas [N], context [N, T, 128], pooled [N, 128]."""
        return velocity(self.flux, latents, sigmas, context, pooled)


class TransformerNetworks(Networks):
    """The demo's frozen networks with a transformer in the U-Net's place."""

    @classmethod
    def from_demo(cls, path, weights=None):
        """``path``: checkpoint of the demo model; ``weights``: of the transformer, else random."""
        found = Networks.load(path)
        transformer = DemoTransformer()
        if weights is not None:
            transformer.flux.load_state_dict({k: v.float() for k, v in weights.items()})
        found.text.eval().requires_grad_(False)
        return cls(transformer, found.text, found.vae, found.tokenizer, found.scale)

    @torch.no_grad()
    def encode(self, captions):
        """(context [N, TOKENS, 128], pooled [N, 128]: the state at the end of the text)."""
        ids = self.tokens(captions)[:, :TOKENS].to(self.unet.device)
        end = (ids == END).int().argmax(1)
        states = self.text(ids)[0]
        return states, states[torch.arange(len(ids)), end]


class FlowTask(Task):
    """Batches of latents with captions, and the error of the velocity on one."""

    def __init__(self, networks, latents, rows, batch, team=None, derived=None):
        super().__init__(networks, latents, rows, batch, team, derived)
        self.encoded = {}  # by caption; the text encoder does not change

    def loss(self, generator):
        """Mean squared error of the velocity on this process's part of a random batch."""
        latents, captions = self.examples(generator)
        noise = torch.randn(latents.shape, generator=generator)
        # Most at middle and high noise, where the picture is decided (Esser et al., section 3.1).
        sigmas = (torch.randn(self.batch, generator=generator) + 0.3).sigmoid()
        latents, noise, sigmas, captions = self.part(latents, noise, sigmas, captions)
        share = sigmas.view(-1, 1, 1, 1)
        found = self.networks.unet(
            (1 - share) * latents + share * noise, sigmas, *self._text(captions)
        )
        return (found - (noise - latents)).square().mean()

    def _text(self, captions):
        new = [text for text in dict.fromkeys(captions) if text not in self.encoded]
        if new:
            self.encoded |= zip(new, zip(*self.networks.encode(new)))
        states, pooled = zip(*(self.encoded[text] for text in captions))
        return torch.stack(states), torch.stack(pooled)


def optimiser_for(networks, muon_lr, adam_lr):
    """Muon on the blocks' matrices, AdamW on what reads and writes tokens, and on vectors."""
    matrices, rest = [], []
    for name, parameter in networks.unet.flux.named_parameters():
        inner = name.startswith(("transformer_blocks", "single_transformer_blocks"))
        (matrices if inner and parameter.ndim > 1 else rest).append(parameter)
    return Optimiser(matrices, rest, muon_lr, adam_lr)
