"""Orthogonal Concept Erasure (ICML 2026, arXiv 2605.28902), a closed form.

The values of cross-attention are turned by an orthogonal matrix, W' = R W, that takes away what
the concept's last token gives. R is nearly a reflection; see ``docs/methods/oce.md``.
"""

from dataclasses import dataclass

import torch

from ..closed_form.input_edit import finished, key_value_layers
from ..closed_form.output_edit import Progress, cut, proper_span, reflection, span
from ..closed_form.text_embeddings import concept_pairs, kept_contexts, templates_of, words_of
from ..concepts.keep_list import CHOICES, keep_for
from ..errors import ForgetError
from ..linalg import gram
from ..settings import Settings as Base
from ..settings import setting

TITLE = "OCE"
ABOUT = (
    "Orthogonal Concept Erasure (arXiv 2605.28902): a closed form, done in seconds, that turns "
    "what cross-attention gives for the concept's words into its opposite."
)
GENERAL = "a photo of {}"
CUT = 0.01  # relative error of a layer's change at which a full rank is cut, if rank is 0


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
        low=1e-3,
        high=1e9,
        step=0.001,
    )
    general: float = setting(
        10.0,
        "Weight of text in general (p), taken from shipped words and what is connected to keep. "
        "0: it may change freely.",
        low=0.0,
        high=1e9,
        step=0.001,
        advanced=True,
    )
    preserve: float = setting(
        0.0,
        "Weight of each kept word (q). 0: kept words count as text in general only. Higher: they "
        "change less, and less is forgotten.",
        low=0.0,
        high=1e9,
        step=0.001,
    )
    damping: float = setting(
        10.0,
        "Weight of leaving all as it is (lambda). Small: a stronger edit. Large: none.",
        low=1e-6,
        high=1e9,
        step=0.001,
        advanced=True,
    )
    guide: str = setting(
        "anchor",
        "Directions that are spared. anchor: those of the concepts' anchors; without any, the "
        "patch is exact. start: for a concept without an anchor that of the start of the text, as "
        "in the released code.",
        choices=("anchor", "start"),
        advanced=True,
    )
    strength: float = setting(
        2.0,
        "For reflection only. 0: nothing happens. 1: nothing is left along the concept's "
        "directions. 2: it becomes its opposite, as in the paper.",
        low=0.0,
        high=4.0,
        step=0.01,
    )
    expand: bool = setting(
        False,
        "On: also edit five templates around each name, such as 'photo of NAME'.",
        advanced=True,
    )
    keep_list: str = setting(
        "auto",
        "Shipped list of kept words, beside what is connected, if preserve is not 0. auto: by the "
        "concept's kind.",
        choices=CHOICES,
    )
    rank: int = setting(
        0,
        "Largest rank of a layer's change. 0: all of it; with a guide, which has full rank, what "
        "changes a layer by more than 1 %.",
        low=0,
        high=768,
        advanced=True,
    )

    @property
    def keep_needs(self):
        return "use the form solved" if self.form == "reflection" else super().keep_needs


PRESETS = {
    "oce": Settings(),
    "oce-style": Settings(erase=500.0, preserve=1.0, keep_list="artists"),
    "oce-nudity": Settings(erase=3000.0, general=20.0),
    "oce-celebrities": Settings(erase=800.0, general=70.0, preserve=2.0, keep_list="people"),
    "oce-reflection": Settings(form="reflection"),
    "oce-projection": Settings(form="reflection", strength=1.0),
}


def second_moment(model, texts):
    """Mean of c c^T over the contexts of all tokens of some texts, [D, D] in float64.

    The start and the first end of the text count, padding does not, as in the released code.
    """
    rows = torch.cat(words_of(model, texts))
    return gram(rows) / len(rows)


def solved(weight, erased, guide, kept_moment, scale):
    """R W - W, R the orthogonal matrix that maximises <R, M> (Procrustes' problem).

    M = A - s E E^T (I - G G^T), A = W K W^T positive. Without a guide M is symmetric: R turns the
    sign of its negative eigenvectors P, R = I - 2 P P^T, and there are at most as many as columns
    in E. R is not made a rotation: the released code negates one unrelated output if det R < 0.

    Args:
        weight: W [out, D]. erased, guide: orthonormal E [out, n] and G [out, m], m may be 0.
        kept_moment: K [D, D] = p C + q sum k k^T + l I. scale: s.

    Returns:
        factors up, down; with a guide up is the whole change, and down the identity.
    """
    keep = weight @ kept_moment @ weight.mT
    if not guide.shape[1]:
        values, vectors = torch.linalg.eigh(keep - scale * erased @ erased.mT)
        # W may have fewer inputs than outputs: then some eigenvalues are 0 up to rounding.
        turned = vectors[:, values < -1e-9 * values.abs().max()]
        return reflection(weight, turned, 2.0)
    spared = erased.mT - erased.mT @ guide @ guide.mT
    u, _, vh = torch.linalg.svd(keep - scale * erased @ spared)
    return u @ (vh @ weight) - weight, torch.eye(weight.shape[1], dtype=weight.dtype)


def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch; see ``methods.forget``.

    The losses of the record are the mean cosine between what a concept's token gives before and
    after: 1 at first, -1 if it is turned around.
    """
    base = model.fingerprint()
    with torch.no_grad():
        targets, guides = _contexts(model, concepts, settings)
        moment = None if settings.form == "reflection" else _kept(model, concepts, settings, keep)
        with model.borrow_denoiser() as denoiser:
            names = [layer.name for layer in key_value_layers(model.family, "v")]
            progress, changes, worst = Progress(on_step, len(names)), {}, 0.0
            for name in names:
                weight = denoiser.module(name).weight.detach().to("cpu", torch.float64)
                up, down, lost = _edit(weight, targets, guides, moment, settings, name)
                changes[name], worst = (up.float(), down.float()), max(worst, lost)
                progress(_cosine(weight, up, down, targets))
    if moment is not None and not any((up @ down).any() for up, down in changes.values()):
        raise ForgetError(
            f"The weight of what is forgotten, {settings.erase:g}, is too small against what is "
            "kept, so nothing would change: raise erase, or lower general, preserve or damping."
        )
    losses = [1.0, sum(progress.values) / len(names)]
    return finished(model, base, concepts, settings, changes, losses, worst)


def _contexts(model, concepts, settings):
    """Contexts [n, D] of the concepts' last tokens, and [m, D] of what guides."""
    targets, guides = [], []
    found = concept_pairs(
        model, concepts, "last", lambda concept: templates_of(concept) * settings.expand
    )
    for concept, pairs in zip(concepts, found):
        targets.append(pairs.targets)
        if concept.anchor or settings.guide == "start":
            guides.append(pairs.anchors)
    targets = torch.cat(targets)
    return targets, torch.cat([targets[:0], *guides])


def _kept(model, concepts, settings, keep):
    """K = p C + q sum k k^T + l I."""
    shipped = keep_for(concepts, (), "auto")
    given = keep_for(concepts, keep, "none")
    moment = settings.damping * torch.eye(model.family.context_dim, dtype=torch.float64)
    if settings.general:
        texts = [*given, *(GENERAL.format(word) for word in shipped)]
        moment += settings.general * second_moment(model, texts)
    if settings.preserve:
        words = keep_for(concepts, keep, settings.keep_list)
        moment += settings.preserve * gram(kept_contexts(model, words))
    return moment


def _edit(weight, targets, guides, moment, settings, name):
    erased = proper_span(weight @ targets.mT, name)
    if moment is None:
        return cut(*reflection(weight, erased, settings.strength), settings.rank)
    guide = span(weight @ guides.mT)
    tolerance = CUT if guide.shape[1] else 1e-9
    return cut(*solved(weight, erased, guide, moment, settings.erase), settings.rank, tolerance)


def _cosine(weight, up, down, targets):
    before = weight @ targets.mT
    after = before + up @ (down @ targets.mT)
    return float(torch.cosine_similarity(before, after, dim=0).mean())
