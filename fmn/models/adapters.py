"""Trainable changes to frozen layers, and their reduction to low rank.

A change is additive and Linear or Conv2d is linear in its weight, so a forward hook that adds the
change's own output is exact: the loaded weights are never written to.
"""

from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..linalg import truncate_matrix


def _apply(module, x, weight):
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    return F.linear(x, weight)


class LowRankAdapter(nn.Module):
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


class FixedAdapter(nn.Module):
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

    forward = LowRankAdapter.forward


class FullAdapter(nn.Module):
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
        return truncate_matrix(self.change.detach(), rank)


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
        adapters: layer name -> LowRankAdapter, FullAdapter or Fixed.
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
