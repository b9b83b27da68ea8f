"""A frozen lora_down that reads a concept and not what is kept.

After SuPLoRA (Tu et al. 2026, arXiv 2601.03305): a low-rank change up @ down of a key or value
gives nothing for any context c with down c = 0, whatever up becomes. So down is fixed on
directions of the concept's contexts that are orthogonal to the kept contexts, and up is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..concepts.concept import Concept, Prompt
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..models.families import layers
from ..models.interface import UNetModel
from ..models.token_positions import CHUNK, EOS_ID, mentions
from ..patches.task import Task

ENERGY = 0.99  # share of the kept contexts' sum of squares that down is orthogonal to
SMALLEST = 1e-9  # share of a sum of squares below which a direction is rounding
AT_ONCE = 64


def protected_downs(task: Task, scope: str) -> dict[str, Tensor] | None:
    """Fixed lora_down matrices for training: layer name -> [r, D]; None without ``protect``.

    They protect the user's words and prompts, the empty prompt, which guidance uses, and the
    shipped lists for the concepts' kinds.

    Args:
        scope: of ``fit_adapters.SCOPES``.

    Raises:
        ForgetError: these layers cannot be protected so, or nothing of the concepts is left.
    """
    model, concepts, keep, settings = task.model, task.concepts, task.keep, task.settings
    if not settings.protect:
        return None
    if not model.family.known:
        raise ForgetError(
            f"protect needs the keys and values of Stable Diffusion 1.x, 2.x or XL, and "
            f"{model.family.title} is none of them: turn protect off."
        )
    if scope != "kv" or settings.full_weights:
        raise ForgetError(
            "protect works for low-rank keys and values alone, the only layers that read the text: "
            "choose those layers and turn full_weights off, or turn protect off."
        )
    # Each of the two groups counts as much: a user's few words would drown in a long list.
    groups = [weighted_moment(model, ("", *words)) for words in (keep, keep_for(concepts, keep))]
    kept = groups[0] / groups[0].trace() + groups[1] / groups[1].trace()
    down = protected_down(concept_moment(model, concepts), kept, settings.rank)
    return {layer.name: down.float() for layer in layers(model.family) if layer.is_key_or_value}


def protected_down(concept: Tensor, kept: Tensor, rank: int, energy: float = ENERGY) -> Tensor:
    """The directions in which contexts of the concept vary most, off the span of the kept ones.

    Kept contexts of real words span the whole space sooner or later, if only by little. So only
    those of their principal directions are excluded that hold, largest first, the share ``energy``
    of their sum of squares: |c down^T| <= sqrt(1 - energy) |c| in the root mean square.

    Args:
        concept, kept: sums of c c^T, [D, D] in float64.

    Returns:
        [r, D] float64 with orthonormal rows, r <= rank.

    Raises:
        ForgetError: nothing of the concept lies outside the kept span.
    """
    values, directions = torch.linalg.eigh(kept)
    # Ascending: the directions before the first that matters are free.
    lost = values.clamp(min=0).cumsum(0)
    free = directions[:, lost <= (1 - energy + SMALLEST) * lost[-1]]
    values, inside = torch.linalg.eigh(free.mT @ concept @ free)
    count = min(rank, int((values > SMALLEST * concept.trace()).sum()))
    if not count:
        raise ForgetError(
            "Nothing of the concept lies outside what is to be kept: keep fewer words, or turn "
            "protect off."
        )
    return (free @ inside[:, -count:].flip(1)).mT.contiguous()


def weighted_moment(model: UNetModel, texts: Sequence[str]) -> Tensor:
    """Sum of w c c^T over contexts c of texts of at most 75 tokens, with w their
    ``position_weights``: [D, D] in float64."""
    total = torch.zeros(model.family.context_dim, model.family.context_dim, dtype=torch.float64)
    for i in range(0, len(texts), AT_ONCE):
        part = texts[i : i + AT_ONCE]
        weights = [position_weights(model.tokenize(Prompt(text, text))) for text in part]
        total += _weighted_gram(model.encode_all(part).flatten(0, 1), torch.cat(weights))
    return total


def concept_moment(model: UNetModel, concepts: Sequence[Concept]) -> Tensor:
    """The same over the training prompts' contexts from the concept's first token on: the text
    encoder is causal, so those before it know nothing of the concept."""
    total = torch.zeros(model.family.context_dim, model.family.context_dim, dtype=torch.float64)
    for prompt in (prompt for concept in concepts for prompt in concept.training_prompts()):
        weights = position_weights(model.tokenize(prompt))
        weights[: mentions(model.tokenize, prompt)[0][0]] = 0
        total += _weighted_gram(model.encode(prompt).context[0], weights)
    return total


def position_weights(ids: Sequence[int | None]) -> Tensor:
    """1 for BOS, words and the first EOT of each chunk; all padding together counts as 1: [T].

    Nearly all positions of a short prompt are padding, of nearly equal contexts, which would
    outweigh the words.
    """
    weights = torch.ones(len(ids), dtype=torch.float64)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        behind = chunk.index(EOS_ID) + 1 if EOS_ID in chunk else CHUNK
        weights[start + behind : start + CHUNK] = 1 / max(CHUNK - behind, 1)
    return weights


def _weighted_gram(rows: Tensor, weights: Tensor) -> Tensor:
    rows = rows.to("cpu", torch.float64)
    return rows.mT @ (weights[:, None] * rows)
