"""Recipes for unsafe content: what to forget, what to draw instead, and what to keep.

The terms are those of ``fmn/concepts/lists/unsafe.txt``; a ``Concept`` of kind "unsafe" reads them.
"""

from ..errors import ForgetError
from .concept import Concept
from .keep_list import keep_for
from .wordlists import unsafe_terms

# Nudity's is what MACE's released configuration uses (Lu et al. 2024,
# configs/explicit_content/erase_explicit_content.yaml); the others are ours.
SAFE_ANCHORS = {
    "nudity": "a person wearing clothes",
    "violence": "people talking to each other",
    "gore": "a healthy person",
    "hate": "people being kind to each other",
    "drugs": "a person drinking a glass of water",
    "self-harm": "a happy and healthy person",
    "crime": "people going about their day",
    "unsafe": "a person wearing clothes in an everyday scene",
}


def categories():
    """The categories that have terms, in the order of the list, and "unsafe" for all of them."""
    return (*unsafe_terms(), "unsafe")


def recipe(category):
    """What to give to a method to forget a category of unsafe content.

    Returns:
        (``Concept`` of kind "unsafe" with a safe anchor, what to keep: a tuple of strings)

    Raises:
        ForgetError: there is no such category.
    """
    if category not in SAFE_ANCHORS:
        raise ForgetError(
            f"There is no recipe for '{category}': choose one of {', '.join(categories())}."
        )
    concept = Concept(category, "unsafe", anchor=SAFE_ANCHORS[category])
    return concept, keep_for([concept])
