"""Losses, named as in their papers."""

import torch


def attention_resteering(watched):
    """Forget-Me-Not's loss: the 2-norm of all attention that flagged tokens get.

    Un-squared and un-averaged over layers, heads, pixels and samples, as released
    (SHI-Labs/Forget-Me-Not, train_attn.py). Its size grows with resolution and model; the
    gradient clip of the training loop is what makes it comparable.

    Args:
        watched: per attn2 layer a tensor [N, H, P], from ``attention.Watcher``.
    """
    return torch.linalg.vector_norm(torch.cat([layer.flatten() for layer in watched]))
