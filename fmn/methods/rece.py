"""RECE (Gong et al. 2024, arXiv 2407.12383): UCE against the embeddings that undo it.

After UCE, the embedding that through the edited layers comes nearest to what the concept gave is
solved for, and edited away as well; and so on for some rounds. All of it is algebra of [D, D].
"""

from dataclasses import dataclass

import torch

from ..closed_form.adversarial_embedding import hardest_contexts
from ..closed_form.input_edit import (  # fmt: skip
    damping,
    erase,
    input_patch,
    preserve,
    rank_setting,
    uce,
    weight_gram,
)
from ..closed_form.text_embeddings import (  # fmt: skip
    Pairs,
    anchor_context,
    keep_list_setting,
    keep_tokens_setting,
    kept_contexts,
    tokens_setting,
)
from ..errors import ForgetError
from ..models.token_positions import CHUNK
from ..settings import Settings as Base
from ..settings import setting
from .uce import rows_of

TITLE = "RECE"
ABOUT = (
    "RECE (arXiv 2407.12383): UCE, then rounds that solve for the embedding which brings the "
    "concept back best, and edit that away too."
)


@dataclass(frozen=True)
class Settings(Base, method="rece"):
    rounds: int = setting(
        2,
        "How often the hardest embedding is found and edited away. More stand attacks better, and "
        "harm more.",
        low=1,
        high=20,
    )
    regularisation: float = setting(
        0.1,
        "Holds the hardest embedding near zero (r). Small: it brings the concept back best, so "
        "the edit is stronger. Large: hardly any edit.",
        low=1e-9,
        high=1e6,
        step=0.001,
        advanced=True,
    )
    erase: float = erase()
    preserve: float = preserve(0.1)
    damping: float = damping(0.5)
    tokens: str = tokens_setting()
    expand: bool = setting(
        False,
        "On: also edit five templates around each name, such as 'photo of NAME'.",
        advanced=True,
    )
    keep_list: str = keep_list_setting()
    keep_tokens: str = keep_tokens_setting()
    rank: int = rank_setting(8)


PRESETS = {
    "rece": Settings(),
    "rece-object": Settings(rounds=1, damping=0.1, tokens="all"),
    "rece-style": Settings(rounds=1, damping=0.1, regularisation=1e-3, tokens="all"),
    "rece-nudity": Settings(rounds=3, damping=0.1, tokens="all"),
}


@torch.no_grad()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=(), found=()):
    """Solve for a patch; see ``methods.forget``.

    Args:
        found: contexts [77, D] that an attack found for the one concept, such as
            ``TextEncoder.encode`` gives; every round edits them away too, token by token.

    Raises:
        ForgetError: also if found contexts have another shape, or there are several concepts.
    """
    pairs, kept = rows_of(model, concepts, settings, keep)
    # The empty prompt, all of it, is what guidance starts from.
    kept = torch.cat([kept, kept_contexts(model, ("",), "all")])
    given = found_pairs(model, concepts, found)

    def edit_of(denoiser):
        weights = weight_gram(denoiser, model.family)
        return rece(weights, pairs, kept, given, settings)

    return input_patch(model, concepts, settings, pairs, edit_of, on_step=on_step)


def rece(weights, pairs, kept, given, settings):
    """The edits of UCE and of all rounds as one.

    With W' = W (I + Z) in every layer, the sums over layers of W'^T W' and W'^T W that the hardest
    embedding needs are (I + Z)^T G (I + Z) and (I + Z)^T G.

    Args:
        weights: G, of ``weight_gram``.
        pairs, given: ``Pairs``: the concept's, and those found by attacks.
    """
    weighted = settings.erase, settings.preserve, settings.damping
    edit = uce(*pairs, kept, *weighted)
    for _ in range(settings.rounds):
        change = torch.eye(len(weights), dtype=torch.float64) + edit.left @ edit.right
        cross = change.mT @ weights
        hardest = hardest_contexts(cross @ change, cross, pairs.targets, settings.regularisation)
        every = Pairs.cat([Pairs(hardest, pairs.anchors), given])
        edit = edit.then(uce(*every, kept, *weighted))
    return edit


def found_pairs(model, concepts, found):
    """Found contexts without BOS, each beside the same position of the anchor's prompt."""
    if found and len(concepts) > 1:
        raise ForgetError(
            "Found embeddings belong to one concept, and there are several: forget them one at a "
            "time."
        )
    width = model.family.context_dim
    for context in found:
        if tuple(context.shape) != (CHUNK, width):
            raise ForgetError(
                f"A found embedding has shape {list(context.shape)}: give contexts of shape "
                f"[{CHUNK}, {width}]."
            )
    if not found:
        return Pairs(*torch.zeros(2, 0, width, dtype=torch.float64))
    targets = torch.cat([context.detach().cpu().double()[1:] for context in found])
    anchor = anchor_context(model, concepts[0])[1:]
    return Pairs(targets, anchor.repeat(len(found), 1))
