"""The event that a step callback gets while a method works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class ConceptAttention(Protocol):
    """The cross-attention that a concept's tokens get; ``models.attention_maps.Attention``."""

    @property
    def share(self) -> float: ...

    @property
    def map(self) -> torch.Tensor: ...  # [side, side]


@dataclass(frozen=True)
class StepProgress:
    """A finished step of training, or a finished part of a closed-form solution.

    Attributes:
        index: from 1.
        losses: one a finished step; training appends to the same list.
        attention_before: of the first concept, before training; None if nothing measures it.
        attention_now: the same when it was last measured.
        best_step: index of the best step so far, if the best one is kept.
        memory: the estimate of the memory that training needs, and what was done to fit.
    """

    index: int
    total: int
    losses: list[float]
    seconds_left: float
    attention_before: ConceptAttention | None = None
    attention_now: ConceptAttention | None = None
    best_step: int | None = None
    memory: str = ""


OnStep = Callable[[StepProgress], object]  # may raise to cancel


def ignore(progress: StepProgress) -> None:
    """The step callback that does nothing."""
