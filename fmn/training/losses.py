"""Losses, named as in their papers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def attention_resteering(watched: Sequence[torch.Tensor]) -> torch.Tensor:
    """Forget-Me-Not's loss (Zhang et al. 2023, arXiv 2303.17591): the 2-norm of all attention that
    the concept's tokens get.

    Un-squared and un-averaged over layers, heads, pixels and samples, as released
    (SHI-Labs/Forget-Me-Not, train_attn.py). Its size grows with resolution and model; the
    gradient clip of the training loop is what makes it comparable.

    Args:
        watched: per attn2 layer a tensor [N, H, P], from ``attention.Watcher``.
    """
    return torch.linalg.vector_norm(torch.cat([layer.flatten() for layer in watched]))


def esd(
    predicted: torch.Tensor,
    frozen_from: torch.Tensor,
    frozen_concept: torch.Tensor,
    frozen_empty: torch.Tensor,
    eta: float,
) -> torch.Tensor:
    """ESD's loss (Gandikota et al. 2023, arXiv 2303.07345), with the erased concept c apart from
    c_from, the prompt that it is erased from, as in the released code of 2025.

    The mean square of predicted - [e(x_t, c_from) - eta (e(x_t, c) - e(x_t, ""))]. With c_from = c
    this is the paper's e(x_t, "") - eta' (e(x_t, c) - e(x_t, "")) for eta' = eta - 1.

    Args:
        predicted: noise [B, 4, h, w] of the edited model given c_from.
        frozen_from, frozen_concept, frozen_empty: e of the frozen model given c_from, c and "".
    """
    guidance = frozen_concept.float() - frozen_empty.float()  # e(x_t, c) - e(x_t, "")
    return F.mse_loss(predicted.float(), frozen_from.float() - eta * guidance)


def concept_ablation(
    predicted: torch.Tensor,
    target: torch.Tensor,
    prior: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    weight: float = 0.0,
) -> torch.Tensor:
    """Concept Ablation's loss (Kumari et al. 2023, arXiv 2303.13516, section 3), unweighted in t.

    Args:
        predicted: noise [B, 4, h, w] of the model in training, given the concept's prompts.
        target: [B, 4, h, w], without gradient: a model's noise given the anchor's prompts
            (model-based), or the true noise (noise-based).
        prior, noise: the trained model's noise given the anchor's prompts, and the true one.
        weight: of the error between those two; 0 needs neither.
    """
    loss = F.mse_loss(predicted.float(), target.float())
    if weight and prior is not None and noise is not None:
        loss = loss + weight * F.mse_loss(prior.float(), noise.float())  # the regularisation term
    return loss
