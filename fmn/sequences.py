"""Choosing from sequences."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` items, evenly over all of them; some several times if there are fewer."""
    return [items[i * len(items) // count] for i in range(count)]
