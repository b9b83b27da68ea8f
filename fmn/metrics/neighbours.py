"""The words nearest to a concept, which a training names before it forgets the concept."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from ..closed_form.nearest import nearest
from ..concepts.concept import Concept
from ..concepts.keep_list import candidates, keep_for
from ..models.interface import Model, UNetModel
from ..models.unknown_family import UnknownFamily
from ..sequences import evenly
from ..settings import Settings

MOST = 3  # concepts whose neighbours are looked for
NEAREST = 3


class Neighbours(NamedTuple):
    """The words that suffer first when a concept is forgotten.

    Attributes:
        near: word -> cosine with the concept, the nearest first; see ``nearest``.
        kept: those of them that the method keeps.
    """

    concept: str
    near: dict[str, float]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        words = ", ".join(f"{word} ({100 * like:.0f} %)" for word, like in self.near.items())
        others = [word for word in self.near if word not in self.kept]
        then = "they are kept." if not others else f"not kept: {', '.join(others)}."
        return f"Nearest to {self.concept:.40}: {words}; {then}"


def neighbours(
    model: Model, concepts: Sequence[Concept], settings: Settings, keep: Sequence[str] = ()
) -> list[Neighbours]:
    """The nearest words of each concept, of ``MOST`` of them if they are more, among the shipped
    lists and the user's; empty for other models than known U-Nets.

    It takes no forward of the U-Net: the words of the lists are encoded, each up to its end.

    Args:
        settings: of the method, which say what it keeps. keep: the user's words.
    """
    if isinstance(model.family, UnknownFamily):
        return []
    kept: tuple[str, ...] = ()
    searched = 0  # words that the method will look for itself
    if not settings.keep_needs:  # it keeps something
        kept = keep_for(concepts, keep, getattr(settings, "keep_list", "none"))
        searched = getattr(settings, "near_words", 0)
    asked = []
    for concept in (some := evenly(concepts, min(MOST, len(concepts)))):
        # For other methods the long lists would be encoded here alone.
        listed = candidates(concepts, concept.kind) if searched else keep_for(concepts)
        asked.append((concept.subjects[0], tuple(dict.fromkeys((*keep, *listed)))))
    found = []
    for concept, near in zip(some, nearest(cast(UNetModel, model), asked, NEAREST)):
        own = [word for word in near if word not in keep][:searched]
        if near:  # else all that is listed is forgotten
            kept_near = tuple(word for word in near if word in {*kept, *own})
            found.append(Neighbours(concept.name, near, kept_near))
    return found
