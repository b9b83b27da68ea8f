"""Double Projections (Zhang et al. 2026, arXiv 2604.10032): closed form, off the kept span.

First projection: the concept's embedding c onto the span of safe words gives its proxy c*. Second:
W c becomes W c* by a change that gives nothing for any kept embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..closed_form.input_edit import InputEdit, input_patch
from ..closed_form.text_embeddings import Pairs, concept_pairs, kept_contexts
from ..concepts.concept import Concept
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..linalg import main_directions, orthogonal_part
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import setting
from . import shared_settings as shared

TITLE = "Double Projections"
REVISION = 1
ABOUT = (
    "Double Projections (arXiv 2604.10032): a closed form that replaces the concept by its "
    "nearest mix of kept words, by a change that gives nothing for the last tokens of those "
    "words."
)
SMALLEST = 1e-6  # of an embedding's square norm; less outside the kept span is no direction


@dataclass(frozen=True)
class Settings(Base, method="double_projections"):
    directions: int = setting(
        0,
        "How many main directions of the kept words are protected exactly (top-k SVD). More: less "
        "harm and a weaker hold on the concept. 0: all of them, at most half of a token's width.",
        limits=(0, 2048),
    )
    proxy: int = setting(
        4,
        "Main directions of the kept words whose mix replaces a concept without an anchor. Few: "
        "something vague. Many: what resembles the concept most, so less is forgotten. 0: all "
        "protected ones, as published.",
        limits=(0, 2048),
    )
    tokens: str = shared.tokens()
    keep_list: str = shared.keep_list()
    rank: int = shared.solved_rank()


PRESETS = {
    "double-projections": Settings(),
    "double-projections-published": Settings(proxy=0),
}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``."""
    model, concepts, settings = task.model, task.concepts, task.settings
    # Of the empty prompt this keeps BOS, which begins every prompt.
    given = kept_contexts(model, ("", *keep_for(concepts, task.keep, "none")))
    kept = kept_contexts(model, ("", *task.kept_words()))
    count = settings.directions or model.family.context_dim // 2
    protected = protected_basis(given, kept, count)
    safe = main_directions(kept, settings.proxy or count)
    found = concept_pairs(model, concepts, settings.tokens)
    pairs = Pairs.cat(
        _with_proxy(concept, pairs, protected, safe) for concept, pairs in zip(concepts, found)
    )
    edit = double_projections(*pairs, protected)
    return input_patch(task, pairs, lambda denoiser: edit)


def protected_basis(given: Tensor, kept: Tensor, count: int) -> Tensor:
    """Basis [D, k] of at most ``count`` directions: of the user's rows first, then the main ones
    of the others."""
    first = main_directions(given, count)
    # Rows inside the first directions leave rounding, which is no direction.
    rest = orthogonal_part(kept, first)
    rest = rest[rest.square().sum(1) > SMALLEST * kept.square().sum(1)]
    return torch.cat([first, main_directions(rest, count - first.shape[1])], 1)


def double_projections(targets: Tensor, anchors: Tensor, basis: Tensor) -> InputEdit:
    """The second projection: dW = W (c* - c) x^T U^T / |x|^2 with x = U^T c, for several c at once.

    U is a basis of the complement of the kept span, so U x = P c with P = U U^T. Several concepts
    are solved jointly: dW = W (C* - C) (C^T P C)^+ C^T P maps each exactly, where edits made one
    after the other would undo each other. For one concept it is the formula above.

    Args:
        targets, anchors: rows c and c*, [n, D].
        basis: of the kept span, [D, k].
    """
    outside = orthogonal_part(targets, basis)  # C^T P
    inverse = torch.linalg.pinv(outside @ outside.mT, hermitian=True, rtol=SMALLEST)
    return InputEdit((anchors - targets).mT, inverse @ outside)


def _with_proxy(concept: Concept, pairs: Pairs, protected: Tensor, safe: Tensor) -> Pairs:
    """A concept's rows with its anchor's, or with the first projection: their proxy."""
    outside = orthogonal_part(pairs.targets, protected)
    if (outside.square().sum(1) < SMALLEST * pairs.targets.square().sum(1)).all():
        raise ForgetError(
            f"'{concept.name}' is a mix of the kept words, so nothing can change it without them: "
            "protect fewer directions, or keep fewer words."
        )
    if concept.anchor:
        return pairs
    return Pairs(pairs.targets, pairs.targets - orthogonal_part(pairs.targets, safe))
