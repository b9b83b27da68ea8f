"""Cross-attention whose probabilities can be trained on.

Fused kernels do not give probabilities, so inside ``watch_attention`` every attn2 module computes
an explicit softmax. It runs over 77 text tokens, not over pixels: the matrix stays small.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .module_patching import replaced


class CrossAttention(Protocol):
    """An attn2 module, of ComfyUI or of diffusers."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.Sequential
    heads: int


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), with the softmax in float32.

    Args:
        q: [B, P, H*D] one row a pixel; k, v: [B, T, H*D] one row a token.

    Returns:
        output [B, P, H*D] and probabilities [B, H, P, T].
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5).float() @ k.float().transpose(-1, -2)
    probabilities = scores.softmax(dim=-1)
    output = probabilities.to(v.dtype) @ v
    return rearrange(output, "b h p d -> b p (h d)"), probabilities


class _AllWatched(Exception):
    """The last layer has run: the rest of the forward pass would be for nothing."""


class Watcher:
    """Collects the attention that flagged tokens get, layer by layer.

    Args:
        count: of the layers; behind the last one a forward pass ends.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        # (samples, tokens) by prompt length: recomputation in backward must find the same
        self._flagged: dict[int, tuple[Tensor, ...]] = {}
        self._collected: list[Tensor] | None = None

    def __call__(self, flags: Tensor, forward: Callable[[], object]) -> list[Tensor]:
        """Run ``forward()`` up to the last layer and return what the flagged tokens got.

        Args:
            flags: bool [B, T]; each sample may flag other tokens, and another number of them.

        Returns:
            per attn2 layer a tensor [N, H, P]: N flagged (sample, token) pairs, in row order.
        """
        self.aim(flags)
        return self.run(forward)

    def aim(self, flags: Tensor) -> None:
        """Set the tokens that ``run`` is about."""
        # As indices: to index by a mask would make the CPU wait for the GPU in every layer.
        self._flagged[flags.shape[1]] = flags.nonzero(as_tuple=True)

    def run(self, forward: Callable[[], object]) -> list[Tensor]:
        collected: list[Tensor] = []
        self._collected = collected
        try:
            with suppress(_AllWatched):
                forward()
            return collected
        finally:
            # Checkpointed blocks run again during backward: that pass must select, so that it
            # saves the same tensors, but not collect.
            self._collected = None

    def attend(self, module: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
        """The output [B, P, C] of an attn2 module for x [B, P, C] and a context [B, T, D]."""
        q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
        output, probabilities = cross_attention(q, k, v, module.heads)
        if self._collected is not None or torch.is_grad_enabled():  # else a preview is drawn
            samples, tokens = self._flagged[context.shape[1]]
            flagged = probabilities[samples, :, :, tokens]
            if self._collected is not None:
                self._collected.append(flagged)
                if len(self._collected) == self.count:
                    raise _AllWatched
        for layer in module.to_out:
            output = layer(output)
        return output


@contextmanager
def watch_attention(modules: Sequence[nn.Module], context_argument: str) -> Iterator[Watcher]:
    """Replace the forward of attn2 modules for a while; yields a ``Watcher``.

    Args:
        modules: each a ``CrossAttention``.
        context_argument: the keyword under which they get the text.
    """
    watcher = Watcher(len(modules))

    def replacement(module: nn.Module) -> Callable[..., Tensor]:
        def forward(x, **arguments):
            return watcher.attend(cast(CrossAttention, module), x, arguments[context_argument])

        return forward

    with replaced(modules, replacement):
        yield watcher


@torch.no_grad()
def attention_share(watched: Sequence[Tensor]) -> float:
    """Mean share of attention that flagged tokens get: over layers, heads and pixels, 0 to 1.

    Args:
        watched: per layer [N, H, P], of a ``Watcher`` for a batch of one.
    """
    return float(torch.stack([layer.sum(0).mean() for layer in watched]).mean())
