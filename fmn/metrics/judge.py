"""Judges: classifiers that say what a picture shows; ``load_judge`` makes one by its name."""

from collections.abc import Sequence
from typing import Protocol

import torch

from ..errors import ForgetError


class Judge(Protocol):
    """Classifies pictures.

    Attributes:
        name: what ``load_judge`` made it from.
        labels: of each domain ("concept", "style", "unsafe" ...). The demo's judges have "nothing"
            as the concept's last label: a picture of nothing that can be recognised.
    """

    name: str
    labels: dict[str, tuple[str, ...]]

    def probabilities(self, images: torch.Tensor, domain: str) -> torch.Tensor:
        """Of pictures [N, H, W, 3] in 0..1: float32 [N, labels of the domain] on the CPU.

        Raises:
            ForgetError: the pictures or the domain cannot be judged.
        """

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Float32 [N, F] on the CPU, for distances between pictures.

        Raises:
            ForgetError: the pictures cannot be judged, or this judge has no features.
        """


class JoinedJudges:
    """Several judges as one: each domain by the first that knows it, features by the first."""

    def __init__(self, judges: Sequence[Judge]):
        self.judges = judges
        self.name = "+".join(judge.name for judge in judges)
        self.labels: dict[str, tuple[str, ...]] = {}
        for judge in reversed(judges):
            self.labels |= judge.labels

    def probabilities(self, images: torch.Tensor, domain: str) -> torch.Tensor:
        labels_of(self, domain)
        judge = next(judge for judge in self.judges if domain in judge.labels)
        return judge.probabilities(images, domain)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.judges[0].features(images)


def labels_of(judge: Judge, domain: str) -> tuple[str, ...]:
    """The labels of a domain.

    Raises:
        ForgetError: the judge does not know this domain.
    """
    if domain not in judge.labels:
        raise ForgetError(
            f"Judge '{judge.name}' cannot tell the domain '{domain}': "
            f"it knows {', '.join(judge.labels)}."
        )
    return judge.labels[domain]


def check_images(images: torch.Tensor) -> torch.Tensor:
    """Pictures as float32 [N, H, W, 3] on the CPU, without an alpha channel.

    Raises:
        ForgetError: they have another shape or type, or values outside of 0..1.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = getattr(images, "dtype", type(images).__name__)
        raise ForgetError(f"Pictures to judge are {kind}: give a tensor of floats in 0..1.")
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ForgetError(
            f"Pictures to judge have shape {list(images.shape)}: give [N, height, width, 3]."
        )
    images = images[..., :3].detach().float().cpu()
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ForgetError(
            f"Pictures to judge have values from {low:.4g} to {high:.4g}: give finite values "
            "in 0..1."
        )
    return images
