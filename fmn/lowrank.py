"""Trainable changes to frozen layers, and their reduction to low rank.

A change is additive and Linear or Conv2d is linear in its weight, so a forward hook that adds the
change's own output is exact: the loaded weights are never written to.
"""

import math
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def _apply(module, x, weight):
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    return F.linear(x, weight)


class LowRank(nn.Module):
    """W + up @ down with float32 factors (LoRA, Hu et al. 2021). Starts at zero change.

    Args:
        down: [r, in]; given, it is fixed and only ``up`` is trained. Else random.
    """

    def __init__(self, module, rank, generator, device, down=None):
        super().__init__()
        out, *inputs = module.weight.shape
        rank = min(rank, out, inputs[0]) if down is None else len(down)
        if down is None:
            down = torch.randn(rank, *inputs, generator=generator)
            down *= down[0].numel() ** -0.5
            self.down = nn.Parameter(down.to(device))
        else:
            self.register_buffer("down", down.float().to(device))
        self.up = nn.Parameter(torch.zeros(out, rank, *([1] * (len(inputs) - 1)), device=device))

    def forward(self, module, x):
        hidden = _apply(module, x, self.down.to(x))
        up = self.up.to(x)
        return F.conv2d(hidden, up) if up.dim() == 4 else F.linear(hidden, up)

    def factors(self, rank):
        return self.up.detach(), self.down.detach(), 0.0


class Fixed(nn.Module):
    """W + sum of strength * up @ down: patches that are worn, not trained.

    Args:
        factors: list of (up, down, strength) for one layer.
    """

    def __init__(self, factors, device):
        super().__init__()
        ups = [strength * up.float() for up, _, strength in factors]
        downs = [down.float() for _, down, _ in factors]
        # Ranks side by side: one product however many patches there are.
        self.register_buffer("up", torch.cat(ups, 1).to(device))
        self.register_buffer("down", torch.cat(downs, 0).to(device))

    forward = LowRank.forward


class Full(nn.Module):
    """W + change, every weight free, in float32 whatever precision W has.

    bfloat16 masters would not do: an AdamW step of 2e-6 is below half a unit in the last place
    for weights above 0.001, and they would never move.
    """

    def __init__(self, module, device):
        super().__init__()
        shape = module.weight.shape
        self.change = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(self, module, x):
        return _apply(module, x, self.change.to(x))

    def factors(self, rank):
        return truncate(self.change.detach(), rank)


class Switch:
    """Turns attached adapters off for a while: the frozen model under the one in training."""

    def __init__(self):
        self.on = True

    @contextmanager
    def off(self):
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@contextmanager
def attached(adapters, module_of, switch=None):
    """Add each adapter's output to its layer's for a while; yields their ``Switch``.

    Args:
        adapters: layer name -> LowRank, Full or Fixed.
        module_of: function from a layer name to the host's module.
        switch: of others that are attached, to turn all off at once; None makes a new one.
    """
    switch = switch or Switch()
    with ExitStack() as hooks:
        for name, adapter in adapters.items():

            def hook(module, args, output, adapter=adapter):
                return output + adapter(module, args[0]) if switch.on else output

            hooks.enter_context(module_of(name).register_forward_hook(hook))
        yield switch


def truncate(change, rank, oversample=8, rounds=4):
    """Best factors of that rank, by subspace iteration (Halko et al. 2011, algorithm 4.4).

    Args:
        change: [out, in] or [out, in, kh, kw].

    Returns:
        up [out, r] (or [out, r, 1, 1]), down [r, in] (or [r, in, kh, kw]), and the relative
        Frobenius error ||change - up @ down|| / ||change||.
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], rank + oversample, generator=generator)
    basis = torch.linalg.qr(matrix @ probes.to(matrix)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    up = basis @ u[:, :rank] * s[:rank].sqrt()
    down = s[:rank].sqrt()[:, None] * vh[:rank]
    norm = matrix.norm()
    error = float((matrix - up @ down).norm() / norm) if norm > 0 else 0.0
    if change.dim() == 4:
        return up[:, :, None, None], down.unflatten(1, change.shape[1:]), error
    return up, down, error


def product_svd(up, down):
    """u, s, vh of up @ down, for [out, k] and [k, in]; the product is made only if k is large."""
    if up.shape[1] >= min(len(up), down.shape[1]):
        return _svd(up @ down)
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(up_core @ down_core.mT, full_matrices=False)
    return up_basis @ u, s, vh @ down_basis.mT


def full_rank(matrix):
    """Factors of a matrix as they are: its shorter side's identity, and itself.

    Scaled by a power of two, which rounds nothing, so that both are of like size: half precision
    has no small numbers.
    """
    out, width = matrix.shape
    size = float(matrix.norm()) / min(out, width) ** 0.5
    scale = 2.0 ** round(math.log2(size) / 2) if size else 1.0
    eye = scale * torch.eye(min(out, width)).to(matrix)
    return (eye, matrix / scale) if out <= width else (matrix / scale, eye)


def _svd(matrix):
    """Its thin one; of the square factor of the longer side's QR, which LAPACK is faster at."""
    if len(matrix) < matrix.shape[1]:
        u, s, vh = _svd(matrix.mT)
        return vh.mT, s, u.mT
    basis, core = torch.linalg.qr(matrix)
    u, s, vh = torch.linalg.svd(core)
    return basis @ u, s, vh


def merge(up, down):
    """The full change up @ down, [out, in] or [out, in, kh, kw], in float32."""
    product = up.flatten(1).float() @ down.flatten(1).float()
    return product.unflatten(1, down.shape[1:]) if down.dim() == 4 else product
