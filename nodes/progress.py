"""What a node shows while it runs: a bar, a picture and a line of text."""

from collections.abc import Callable

import comfy.utils
from comfy.model_management import throw_exception_if_processing_interrupted as stop_if_cancelled
from PIL import Image

from ..fmn.images import loss_picture
from ..fmn.progress import OnStep, StepProgress
from .page import show_text

PREVIEW_SIDE = 512


class Progress:
    """The bar of the running node. Every call ends the run if the user has pressed Cancel.

    Args:
        total: length of the bar; 0: the first ``show`` says it.
    """

    def __init__(self, total: int = 0) -> None:
        self.total, self.done = total, 0
        self.bar: comfy.utils.ProgressBar | None = None

    def show(
        self, done: int, text: str = "", total: int = 0, picture: Image.Image | None = None
    ) -> None:
        stop_if_cancelled()
        self.done, self.total = done, total or self.total
        self.bar = self.bar or comfy.utils.ProgressBar(self.total)
        preview = ("JPEG", picture, PREVIEW_SIDE) if picture else None
        self.bar.update_absolute(self.done, self.total, preview)
        if text:
            show_text(text)

    def step(self, step: StepProgress) -> None:
        """The callback of work in steps that have no loss."""
        text = f"step {step.index}/{step.total}, {step.seconds_left:.0f} s left"
        self.show(step.index, text, step.total)


class InversionProgress(Progress):
    """For textual inversions, and pictures that are drawn before or after them."""

    def training(self, title: str, runs: int = 1) -> OnStep:
        """The callback of a training, or of ``runs`` trainings in a row."""
        run = 0

        def on_step(step: StepProgress) -> None:
            nonlocal run
            run += step.index == 1
            which = f", inversion {run}/{runs}" if runs > 1 else ""
            text = (
                f"{title}{which}: step {step.index}/{step.total}, loss {step.losses[-1]:.4g}, "
                f"{step.seconds_left:.0f} s left"
            )
            self.show(self.done + 1, text, picture=loss_picture(step.losses, step.total))

        return on_step

    def drawing(self, title: str, count: int) -> Callable[[int], None]:
        """The callback of something that draws ``count`` pictures, some at a time."""
        drawn = 0

        def on_pictures(more: int) -> None:
            nonlocal drawn
            drawn += more
            self.show(self.done + more, f"{title}: {drawn} of {count} pictures drawn")

        return on_pictures
