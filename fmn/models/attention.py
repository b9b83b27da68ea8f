"""Cross-attention whose probabilities can be trained on.

Fused kernels do not give probabilities, so inside ``watch_attention`` every attn2 module computes
an explicit softmax. It runs over 77 text tokens, not over pixels: the matrix stays small.
"""

from contextlib import contextmanager, suppress

import torch
from einops import rearrange

from .module_patching import replaced


def cross_attention(q, k, v, heads):
    """Attention with visible probabilities (Vaswani et al. 2017, eq. 1), softmax in float32.

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


class _Seen(Exception):
    """All layers have been watched: the rest of the forward pass would be for nothing."""


class Watcher:
    """Collects the attention that flagged tokens get, layer by layer.

    Args:
        count: of the layers; behind the last one a forward pass ends.
    """

    def __init__(self, count):
        self.count = count
        self._places = {}  # by prompt length: recomputation in backward must find its own again
        self._collected = None

    def __call__(self, flags, forward):
        """Run ``forward()`` up to the last layer and return what the flagged tokens got.

        Args:
            flags: bool [B, T]; each sample may flag other tokens, and another number of them.

        Returns:
            per attn2 layer a tensor [N, H, P]: N flagged (sample, token) pairs, in row order.
        """
        self.aim(flags)
        return self.run(forward)

    def aim(self, flags):
        """Set the tokens that ``run`` is about."""
        # Found once: a mask would be looked through in every layer, and a GPU waited for.
        self._places[flags.shape[1]] = flags.nonzero(as_tuple=True)

    def run(self, forward):
        self._collected = []
        try:
            with suppress(_Seen):
                forward()
            return self._collected
        finally:
            # Checkpointed blocks run again during backward: that pass must select, so that it
            # saves the same tensors, but not collect.
            self._collected = None

    def attend(self, module, x, context):
        q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
        output, probabilities = cross_attention(q, k, v, module.heads)
        if self._collected is not None or torch.is_grad_enabled():  # else a preview is drawn
            samples, tokens = self._places[context.shape[1]]
            flagged = probabilities[samples, :, :, tokens]
            if self._collected is not None:
                self._collected.append(flagged)
                if len(self._collected) == self.count:
                    raise _Seen
        for layer in module.to_out:
            output = layer(output)
        return output


@contextmanager
def watch_attention(modules, context_argument):
    """Replace the forward of attn2 modules for a while; yields a ``Watcher``.

    Args:
        modules: the attn2 modules, of ComfyUI or of diffusers: both have to_q, to_k, to_v,
            to_out and heads.
        context_argument: the keyword under which they get the text.
    """
    watcher = Watcher(len(modules))

    def replacement(module):
        def forward(x, **arguments):
            return watcher.attend(module, x, arguments[context_argument])

        return forward

    with replaced(modules, replacement):
        yield watcher


@torch.no_grad()
def attention_share(watched):
    """Mean share of attention that flagged tokens get: over layers, heads and pixels, 0 to 1.

    Args:
        watched: what a ``Watcher`` returned for a batch of one.
    """
    return float(torch.stack([layer.sum(0).mean() for layer in watched]).mean())
