"""RECE (Gong et al. 2024, arXiv 2407.12383): UCE against the embeddings that undo it.

After UCE, the embedding that through the edited layers comes nearest to what the concept gave is
solved for, and edited away as well; and so on for some rounds. All of it is algebra of [D, D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..closed_form.adversarial_embedding import hardest_contexts
from ..closed_form.input_edit import InputEdit, input_patch, uce, weight_gram
from ..closed_form.text_embeddings import Pairs, kept_contexts
from ..models.interface import UNet
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from . import shared_settings as shared
from .uce import uce_rows

TITLE = "RECE"
REVISION = 1
ABOUT = (
    "RECE (arXiv 2407.12383): UCE, then rounds that solve for the embedding which brings the "
    "concept back best, and edit that away too."
)


@dataclass(frozen=True)
class Settings(Base, method="rece"):
    rounds: int = setting(
        2,
        "How often the hardest embedding is found and edited away. More rounds resist attacks "
        "better and harm more.",
        limits=(1, 20),
    )
    regularisation: float = advanced(
        0.1,
        "Holds the hardest embedding near zero (r). Small: it brings the concept back best, so "
        "the edit is stronger. Large: hardly any edit.",
        limits=(1e-9, 1e6, 0.001),
    )
    erase: float = shared.erase()
    preserve: float = shared.preserve(default=0.1)
    damping: float = shared.damping(default=0.5)
    tokens: str = shared.tokens()
    expand: bool = shared.expand()
    keep_list: str = shared.keep_list()
    keep_tokens: str = shared.keep_tokens()
    rank: int = shared.solved_rank(default=8)


PRESETS = {
    "rece": Settings(),
    "rece-object": Settings(rounds=1, damping=0.1, tokens="all"),
    "rece-style": Settings(rounds=1, damping=0.1, regularisation=1e-3, tokens="all"),
    "rece-nudity": Settings(rounds=3, damping=0.1, tokens="all"),
}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``."""
    pairs, kept = uce_rows(task)
    # The empty prompt, all of it, is what guidance starts from.
    kept = torch.cat([kept, kept_contexts(task.model, ("",), "all")])

    def edit_of(denoiser: UNet) -> InputEdit:
        return rece(weight_gram(denoiser, task.model.family), pairs, kept, task.settings)

    return input_patch(task, pairs, edit_of)


def rece(weights: Tensor, pairs: Pairs, kept: Tensor, settings: Settings) -> InputEdit:
    """The edits of UCE and of all rounds as one.

    The adversarial embedding of a round is c' = (r I + sum W'^T W')^-1 (sum W'^T W) c. With
    W' = W (I + Z) in every layer, its sums over layers are (I + Z)^T G (I + Z) and (I + Z)^T G.

    Args:
        weights: G, of ``weight_gram``.
    """
    weighted = settings.erase, settings.preserve, settings.damping
    edit = uce(*pairs, kept, *weighted)
    for _ in range(settings.rounds):
        change = torch.eye(len(weights), dtype=torch.float64) + edit.left @ edit.right  # I + Z
        cross = change.mT @ weights  # sum W'^T W
        hardest = hardest_contexts(cross @ change, cross, pairs.targets, settings.regularisation)
        edit = edit.then(uce(hardest, pairs.anchors, kept, *weighted))
    return edit
