"""Changes added to the outputs of frozen layers: low rank as LoRA, full, or of finished patches.

A change is additive and Linear or Conv2d is linear in its weight, so a forward hook that adds the
change's own output is exact: the loaded weights are never written to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg import truncate_matrix
from .families import Family, Layer

LayerModule = nn.Linear | nn.Conv2d
# An adapter: (layer, its input) -> what is added to its output
Adapter = Callable[[LayerModule, Tensor], Tensor]
Device = torch.device | str


class Patch(Protocol):
    """A ``fmn.patches.patch.ForgetPatch``, as far as applying it goes."""

    changes: dict[str, tuple[Tensor, Tensor]]

    @property
    def changes_text(self) -> bool: ...

    def change_of(self, name: str, device: Device = "cpu") -> Tensor: ...

    def check_family(self, family: Family) -> None: ...

    def check_shapes(self, weight_of: Callable[[Layer], Tensor], text: bool = False) -> None: ...


def check_fits(patch: Patch, family: Family, module_of: Callable[[str], LayerModule]) -> None:
    """Refuse a patch of another family or with layers of other shapes.

    Args:
        module_of: function from a layer name to the host's module.
    """
    patch.check_family(family)
    for text in (False, True):
        patch.check_shapes(lambda layer: module_of(layer.name).weight, text)


def _apply(module: LayerModule, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    return F.linear(x, weight)


class _Factors(nn.Module):
    """W + up @ down with float32 factors up [out, r] and down [r, in]."""

    up: Tensor
    down: Tensor

    def forward(self, module: LayerModule, x: Tensor) -> Tensor:
        hidden = _apply(module, x, self.down.to(x))
        up = self.up.to(x)
        return F.conv2d(hidden, up) if up.dim() == 4 else F.linear(hidden, up)


class LowRankAdapter(_Factors):
    """A LoRA (Hu et al. 2021) to train. Starts at zero change.

    Args:
        down: [r, in]; given, it is fixed and only ``up`` is trained. Else random.
    """

    def __init__(
        self,
        module: LayerModule,
        rank: int,
        generator: torch.Generator,
        device: Device,
        down: Tensor | None = None,
    ) -> None:
        super().__init__()
        out, *inputs = module.weight.shape
        if down is None:
            rank = min(rank, out, inputs[0])
            down = torch.randn(rank, *inputs, generator=generator)
            down *= down[0].numel() ** -0.5
            self.down = nn.Parameter(down.to(device))
        else:
            self.register_buffer("down", down.float().to(device))
        ones = [1] * (len(inputs) - 1)
        self.up = nn.Parameter(torch.zeros(out, len(down), *ones, device=device))

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """up [out, r], down [r, in], and no error, whatever rank is asked for."""
        return self.up.detach(), self.down.detach(), 0.0


class FixedAdapter(_Factors):
    """Finished patches of one layer.

    Args:
        factors: (up, down, strength) of each patch.
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor, float]], device: Device) -> None:
        super().__init__()
        ups = [strength * up.float() for up, _, strength in factors]
        downs = [down.float() for _, down, _ in factors]
        # Ranks side by side: one product however many patches there are.
        self.register_buffer("up", torch.cat(ups, 1).to(device))
        self.register_buffer("down", torch.cat(downs, 0).to(device))


def fixed_adapters(
    changes: Mapping[str, tuple[Tensor, Tensor]], device: Device
) -> dict[str, FixedAdapter]:
    """An adapter for each layer of one patch at full strength."""
    return {name: FixedAdapter([(*pair, 1.0)], device) for name, pair in changes.items()}


class FullAdapter(nn.Module):
    """W + change, every weight trained, in float32 whatever precision W has.

    bfloat16 masters would not do: an AdamW step of 2e-6 is below half a unit in the last place
    for weights above 0.001, and they would never move.
    """

    def __init__(self, module: LayerModule, device: Device) -> None:
        super().__init__()
        shape = module.weight.shape
        self.change = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(self, module: LayerModule, x: Tensor) -> Tensor:
        return _apply(module, x, self.change.to(x))

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The change at that rank; see ``truncate_matrix``."""
        return truncate_matrix(self.change.detach(), rank)


class Switch:
    """Turns attached adapters off for a while, which leaves the frozen model."""

    def __init__(self) -> None:
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@contextmanager
def attached(
    adapters: Mapping[str, Adapter],
    module_of: Callable[[str], LayerModule],
    switch: Switch | None = None,
) -> Iterator[Switch]:
    """Add each adapter's output to its layer's for a while; yields their ``Switch``.

    Args:
        adapters: layer name -> adapter.
        module_of: function from a layer name to the host's module.
        switch: of other attached adapters, to turn all off at once; None makes a new one.
    """
    switch = switch or Switch()
    with ExitStack() as hooks:
        for name, adapter in adapters.items():

            def hook(module, args, output, adapter=adapter):
                return output + adapter(module, args[0]) if switch.on else output

            hooks.enter_context(module_of(name).register_forward_hook(hook))
        yield switch
