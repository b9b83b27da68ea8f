"""What layers get and give while a model predicts, for some positions of the picture."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .interface import Text, Watched
from .transformers import POOLED, Reader, Transformer


class Rows(NamedTuple):
    """A layer's inputs [B, P, in] and outputs [B, P, out] at P positions of B pictures, or of n
    tokens of text [n, in] and [n, out]."""

    inputs: Tensor
    outputs: Tensor


class Recorder:
    """Collects the rows of layers over forwards, which may each hold a part of the batch, on the
    CPU and in the precision of the model. Of a layer's inputs it takes those that attention gives.

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

                def hook(module, args, output, name=name, reader=reader):
                    width = output.shape[-1] if reader.fused else None
                    self._add(name, reader.tokens, args[0][..., :width], output)

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
        """The rows of all forwards so far, by layer, which are kept here no longer."""
        # A layer at a time: together they may be gigabytes.
        return {name: Rows(*map(torch.cat, zip(*self.rows.pop(name)))) for name in list(self.rows)}


TextRows = dict[str, Rows]  # by layer


class _AllSeen(Exception):
    """Ends a forward."""


def text_rows(watched: Watched, names: Collection[str], x_t: Tensor, text: Text) -> TextRows:
    """What layers that read nothing but text get and give for all tokens of a prompt.

    The forward ends behind the last of them.

    Args:
        names: of the layers.
        x_t: noise [1, C, h, w].
    """
    rows: TextRows = {}
    with ExitStack() as hooks:
        for name in names:

            def hook(module, args, output, name=name):
                tokens = (values.detach().flatten(0, -2) for values in (args[0], output))
                rows[name] = Rows(*(part.float().cpu() for part in tokens))
                if len(rows) == len(names):
                    raise _AllSeen

            hooks.enter_context(watched.module(name).register_forward_hook(hook))
        with suppress(_AllSeen):
            watched.predict_each(x_t, len(watched.schedule) - 1, [text])
    return rows
