"""What it will do: the words nearest to a concept, told before it is forgotten."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from ..closed_form.nearest import nearest, nearest_kept
from ..concepts.concept import Concept
from ..concepts.keep_list import candidates, keep_for
from ..models.interface import Model, UNetModel
from ..models.unknown_family import UnknownFamily
from ..sequences import evenly
from ..settings import Settings

MOST = 3  # concepts that are told of
NEAREST = 3


class Neighbours(NamedTuple):
    """The words that suffer first when a concept is forgotten.

    Attributes:
        near: word -> ``nearest.likeness``, the nearest first.
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
    unet = cast(UNetModel, model)
    kept = set() if settings.keep_needs else _kept(unet, concepts, settings, keep)
    found = []
    for concept in evenly(concepts, min(MOST, len(concepts))):
        # Methods that do not look for neighbours would pay for the long list alone.
        looks = getattr(settings, "near_words", 0)
        listed = candidates(concepts, concept.kind) if looks else keep_for(concepts, (), "auto")
        words = tuple(dict.fromkeys((*keep, *listed)))
        near = nearest(unet, concept.subjects[0], words, NEAREST)
        found.append(Neighbours(concept.name, near, tuple(word for word in near if word in kept)))
    return found


def _kept(
    model: UNetModel, concepts: Sequence[Concept], settings: Settings, keep: Sequence[str]
) -> set[str]:
    listed = keep_for(concepts, keep, getattr(settings, "keep_list", "none"))
    return {*listed, *nearest_kept(model, concepts, getattr(settings, "near_words", 0))}
