"""Judges: classifiers that say what a picture shows; ``load_judge`` makes one by its name."""

from typing import Protocol

import torch

from ..errors import ForgetError


class Judge(Protocol):
    """Names what pictures show.

    Attributes:
        name: what ``load_judge`` made it from.
        labels: a tuple of labels for each domain ("concept", "style", "unsafe" ...). The demo's
            judges have "nothing" as the concept's last label: no picture that can be recognised.
    """

    name: str
    labels: dict[str, tuple[str, ...]]

    def probabilities(self, images, domain):
        """Of pictures [N, H, W, 3] in 0..1: float32 [N, labels of the domain] on the CPU.

        Raises:
            ForgetError: the pictures or the domain cannot be judged.
        """

    def features(self, images):
        """Float32 [N, F] on the CPU, for distances between pictures.

        Raises:
            ForgetError: the pictures cannot be judged, or this judge has no features.
        """


def short_list(labels):
    listed = ", ".join(labels[:12])
    return f"{listed} ..." if len(labels) > 12 else listed


def find_labels(judge, domain):
    """The labels of a domain.

    Raises:
        ForgetError: the judge cannot tell this domain.
    """
    if domain not in judge.labels:
        raise ForgetError(
            f"Judge '{judge.name}' cannot tell the domain '{domain}': "
            f"it knows {', '.join(judge.labels)}."
        )
    return judge.labels[domain]


def check_images(images):
    """Pictures as float32 [N, H, W, 3] on the CPU, an alpha channel dropped.

    Raises:
        ForgetError: they are no such tensor, none, or not finite numbers in 0..1.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        found = getattr(images, "dtype", type(images).__name__)
        raise ForgetError(f"Pictures to judge are {found}: give a tensor of floats in 0..1.")
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
