"""Orthogonal Concept Erasure (ICML 2026, arXiv 2605.28902), a closed form.

The values of cross-attention are turned by an orthogonal matrix, W' = R W, that takes away what
the concept's last token gives. R is nearly a reflection; see ``docs/methods/oce.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..closed_form.input_edit import Changes, key_value_layers, weight_of
from ..closed_form.output_edit import (
    PartProgress,
    proper_span,
    reflection,
    span,
    truncate_to_tolerance,
)
from ..closed_form.text_embeddings import expanded_pairs, kept_contexts, words_of
from ..concepts.keep_list import CHOICES, keep_for
from ..errors import ForgetError
from ..linalg import gram
from ..models.interface import UNetModel
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from . import shared_settings as shared

TITLE = "OCE"
REVISION = 1
ABOUT = (
    "Orthogonal Concept Erasure (arXiv 2605.28902): a closed form, done in seconds, that turns "
    "what cross-attention gives for the concept's words into its opposite."
)
GENERAL = "a photo of {}"
TOLERANCE = 0.01  # relative error at which a layer's change of full rank is truncated, if rank is 0


@dataclass(frozen=True)
class Settings(Base, method="oce"):
    form: str = setting(
        "solved",
        "solved: the paper's solution, in which what is forgotten is weighed against what is kept. "
        "reflection: only the concept's directions are turned, and the weights, the guide and the "
        "keep-list do not count.",
        choices=("solved", "reflection"),
    )
    erase: float = setting(
        2000.0,
        "Weight of what is forgotten (s). Too small against the other weights: nothing is "
        "forgotten. Very large: the same as a reflection of strength 2.",
        limits=(1e-3, 1e9, 0.001),
    )
    general: float = advanced(
        10.0,
        "Weight of text in general (p), taken from shipped words and what is connected to keep. "
        "0: it may change freely.",
        limits=(0.0, 1e9, 0.001),
    )
    preserve: float = setting(
        1.0,
        "Weight of each kept word (q). 0: kept words count as text in general only. Higher: they "
        "change less, and less is forgotten.",
        limits=(0.0, 1e9, 0.001),
    )
    damping: float = advanced(
        10.0,
        "Ridge penalty (lambda). Small: a stronger edit. Large: no edit.",
        limits=(1e-6, 1e9, 0.001),
    )
    guide: str = advanced(
        "anchor",
        "Protected directions. anchor: those of the concepts' anchors; without any, the patch "
        "is exact. start: for a concept without an anchor, that of the start token, as in the "
        "released code.",
        choices=("anchor", "start"),
    )
    strength: float = setting(
        2.0,
        "For reflection only. 0: nothing happens. 1: nothing is left along the concept's "
        "directions. 2: it becomes its opposite, as in the paper.",
        limits=(0.0, 4.0, 0.01),
    )
    expand: bool = shared.expand()
    keep_list: str = setting(
        "auto",
        "Shipped list of kept words, beside what is connected, if preserve is not 0. auto: by the "
        "concept's kind.",
        choices=CHOICES,
    )
    rank: int = advanced(
        0,
        "Largest rank of a layer's change. 0: all of it; with a guide, which has full rank, what "
        "changes a layer by more than 1 %.",
        limits=(0, 768),
    )

    @property
    def keep_needs(self) -> str:
        return "use the form solved" if self.form == "reflection" else super().keep_needs


PRESETS = {
    "oce": Settings(),
    "oce-paper": Settings(preserve=0.0),
    "oce-style": Settings(erase=500.0, preserve=1.0, keep_list="artists"),
    "oce-nudity": Settings(erase=3000.0, general=20.0, preserve=0.0),
    "oce-celebrities": Settings(erase=800.0, general=70.0, preserve=2.0, keep_list="people"),
    "oce-reflection": Settings(form="reflection"),
    "oce-projection": Settings(form="reflection", strength=1.0),
}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``.

    The losses of the record are the mean cosine between what a concept's token gives before and
    after: 1 at first, -1 if it is turned around.
    """
    model, settings = task.model, task.settings
    targets, guides = _contexts(task)
    moment = None if settings.form == "reflection" else _moment(task)
    changes: Changes = {}
    largest_error = 0.0
    with model.watch() as denoiser:
        names = [layer.name for layer in key_value_layers(model.family, "v")]
        progress = PartProgress(task.on_step, len(names))
        for name in names:
            weight = weight_of(denoiser, name).cpu()
            up, down, error = _edit(weight, targets, guides, moment, settings, name)
            changes[name] = up.float(), down.float()
            largest_error = max(largest_error, error)
            progress(_cosine(weight, up, down, targets))
    if moment is not None and not any((up @ down).any() for up, down in changes.values()):
        raise ForgetError(
            f"The weight of what is forgotten, {settings.erase:g}, is too small against what is "
            "kept, so nothing would change: raise erase, or lower general, preserve or damping."
        )
    losses = [1.0, sum(progress.values) / len(names)]
    return task.patch(changes, losses, largest_error)


def _contexts(task: Task) -> tuple[Tensor, Tensor]:
    """Contexts [n, D] of the concepts' last tokens, and [m, D] of the guides."""
    pairs_of = expanded_pairs(task.model, task.concepts, "last", task.settings.expand)
    targets = torch.cat([pairs.targets for pairs in pairs_of])
    guides = [
        pairs.anchors
        for concept, pairs in zip(task.concepts, pairs_of)
        if concept.anchor or task.settings.guide == "start"
    ]
    return targets, torch.cat([targets[:0], *guides])


def _moment(task: Task) -> Tensor:
    """K = p C + q sum k k^T + l I, [D, D] in float64."""
    model, settings = task.model, task.settings
    shipped = keep_for(task.concepts, (), "auto")
    given = keep_for(task.concepts, task.keep, "none")
    moment = settings.damping * torch.eye(model.family.context_dim, dtype=torch.float64)
    if settings.general:
        texts = [*given, *(GENERAL.format(word) for word in shipped)]
        moment += settings.general * word_moment(model, texts)
    if settings.preserve:
        moment += settings.preserve * gram(kept_contexts(model, task.kept_words()))
    return moment


def word_moment(model: UNetModel, texts: Sequence[str]) -> Tensor:
    """C, the mean of c c^T over the contexts of all tokens of texts, [D, D] in float64.

    The start and the first end of the text count, padding does not, as in the released code.
    """
    rows = torch.cat(words_of(model, texts))
    return gram(rows) / len(rows)


def _edit(
    weight: Tensor,
    targets: Tensor,
    guides: Tensor,
    moment: Tensor | None,
    settings: Settings,
    name: str,
) -> tuple[Tensor, Tensor, float]:
    """up, down and the relative error of a layer's change."""
    erased = proper_span(weight @ targets.mT, name)  # E
    if moment is None:
        factors = reflection(weight, erased, settings.strength)
        return truncate_to_tolerance(*factors, settings.rank)
    guide = span(weight @ guides.mT)  # G
    factors = procrustes(weight, erased, guide, moment, settings.erase)
    tolerance = TOLERANCE if guide.shape[1] else 1e-9
    return truncate_to_tolerance(*factors, settings.rank, tolerance)


def procrustes(
    weight: Tensor, erased: Tensor, guide: Tensor, moment: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """R W - W, R the orthogonal matrix that maximises <R, M> (Procrustes' problem).

    M = A - s E E^T (I - G G^T), A = W K W^T positive. Without a guide M is symmetric: R turns the
    sign of its negative eigenvectors P, R = I - 2 P P^T, and there are at most as many as columns
    in E. R is not made a rotation: the released code negates one unrelated output if det R < 0.

    Args:
        weight: W [out, D].
        erased, guide: orthonormal E [out, n] and G [out, m], m may be 0.
        moment: K [D, D] = p C + q sum k k^T + l I.
        scale: s.

    Returns:
        factors up, down; with a guide up is the whole change, and down the identity.
    """
    keep = weight @ moment @ weight.mT  # A
    if not guide.shape[1]:
        values, vectors = torch.linalg.eigh(keep - scale * erased @ erased.mT)  # of M
        # W may have fewer inputs than outputs: then some eigenvalues are 0 up to rounding.
        negative = vectors[:, values < -1e-9 * values.abs().max()]  # P
        return reflection(weight, negative, 2.0)
    spared = erased.mT - erased.mT @ guide @ guide.mT  # E^T (I - G G^T)
    u, _, vh = torch.linalg.svd(keep - scale * erased @ spared)  # M = u s vh, R = u vh
    return u @ (vh @ weight) - weight, torch.eye(weight.shape[1], dtype=weight.dtype)


def _cosine(weight: Tensor, up: Tensor, down: Tensor, targets: Tensor) -> float:
    before = weight @ targets.mT
    after = before + up @ (down @ targets.mT)
    return float(torch.cosine_similarity(before, after, dim=0).mean())
