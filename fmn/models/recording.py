"""What layers get and give while a model predicts, for some positions of the picture."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .transformers import POOLED, Reader, Transformer


class Rows(NamedTuple):
    """A layer's inputs [B, P, in] and outputs [B, P, out] at P positions of B pictures."""

    inputs: Tensor
    outputs: Tensor


class Recorder:
    """Collects the rows of layers over forwards, which may each hold a part of the batch, on the
    CPU and in the precision of the model.

    Args:
        positions: numbers of the picture's tokens, [B, P].
        count: tokens of the picture.
    """

    def __init__(self, entry: Transformer, positions: Tensor, count: int) -> None:
        self.entry, self.positions, self.count = entry, positions, count
        self.rows: dict[str, list[Rows]] = {}

    @contextmanager
    def attached(
        self, readers: Mapping[str, Reader], modules: Mapping[str, nn.Module]
    ) -> Iterator[None]:
        """Record for a while. Hooks that are added later change what is recorded of later layers
        only: a layer's own output is recorded without its edit."""
        with ExitStack() as hooks:
            for name, reader in readers.items():

                def hook(module, args, output, name=name, tokens=reader.tokens):
                    self._add(name, tokens, args[0], output)

                hooks.enter_context(modules[name].register_forward_hook(hook))
            yield

    def _add(self, name: str, tokens: str, inputs: Tensor, outputs: Tensor) -> None:
        parts = self.rows.setdefault(name, [])
        first = sum(len(part.inputs) for part in parts)
        positions = self.positions[first : first + len(inputs)].to(inputs.device)
        parts.append(
            Rows(self._at(inputs, tokens, positions), self._at(outputs, tokens, positions))
        )

    def _at(self, values: Tensor, tokens: str, positions: Tensor) -> Tensor:
        if tokens == POOLED:
            return values.detach().reshape(len(values), 1, -1).cpu()
        values = values.flatten(1, -2)
        part = values[:, self.entry.picture(tokens, self.count, values.shape[1])]
        chosen = positions[..., None].expand(-1, -1, part.shape[-1])
        return torch.gather(part, 1, chosen).detach().cpu()

    def taken(self) -> dict[str, Rows]:
        """The rows of all forwards so far, by layer."""
        return {name: Rows(*map(torch.cat, zip(*parts))) for name, parts in self.rows.items()}
