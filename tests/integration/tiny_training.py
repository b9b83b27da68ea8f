"""A tiny network trained by the demo's programs, in this process and in others."""

from types import SimpleNamespace

import torch
from torch import nn

from demo import diffusion, network, pictures
from demo.loop import Loop, Schedule


class TinyTextEncoder(nn.Module):
    """A text encoder of one embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)

    def get_input_embeddings(self):
        return self.table

    def set_input_embeddings(self, table):
        self.table = table

    def forward(self, ids):
        return (self.table(ids),)


class TinyUNet(nn.Module):
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 4)

    def forward(self, latents, times, context):
        shift = self.mix(context.mean(1)) * (1 + times[:, None] / 1000)
        return SimpleNamespace(sample=self.conv(latents) + shift[..., None, None])


class TinyNetworks(network.Networks):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(TinyUNet(), TinyTextEncoder(), None, None, 1.3)

    def tokens(self, texts):
        ids = [
            [sum(map(ord, word)) % 40 for word in text.replace(",", " ,").split()] for text in texts
        ]
        return torch.tensor([(row + [49] * 12)[:12] for row in ids])


ROWS = [
    {
        "index": i,
        "concept": "dog",
        "style": s,
        "derived": s in pictures.DERIVED,
        "holdout": s == "x",
    }
    for i, s in enumerate(("twemoji", "x", "pixel art"))
]


def tiny_loop(folder, steps=6, team=None):
    networks = TinyNetworks()
    optimiser = diffusion.optimiser_for(networks, ROWS, 1e-2, 1e-2)
    latents = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(4)).half()
    task = diffusion.Task(networks, latents, ROWS, 4, team)
    schedule = Schedule(steps, warmup=2, decay=2)
    return networks, Loop("unet", folder, optimiser, task.loss, schedule, 0, team)


def train(folder, team):
    tiny_loop(folder, 3, team)[1].run()
