"""What a method is asked for: a model, what to forget in it, what to keep, and how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from ..concepts.concept import Concept
from ..concepts.keep_list import keep_for
from ..models.interface import UNetModel
from ..progress import OnStep, ignore
from .metadata import new_info
from .patch import ForgetPatch


@dataclass
class Task:
    """All that a patch and a training state are made from, and labelled with.

    Attributes:
        model: comes back unchanged. Methods with ``ANY_MODEL`` use no more of it than ``Model``.
        settings: of the method.
        on_step: called after each step, and may raise to cancel.
        keep: words or prompts to protect.
        fingerprint: of the model without patches.
    """

    model: UNetModel
    concepts: Sequence[Concept]
    settings: Any
    on_step: OnStep = ignore
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.fingerprint = self.model.fingerprint()

    def kept_words(self) -> Sequence[str]:
        """The words to keep and those of the shipped list; none if the settings weigh them 0."""
        if not getattr(self.settings, "preserve", True):
            return ()
        return keep_for(self.concepts, self.keep, self.settings.keep_list)

    def record(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed; see ``TrainingState.check``."""
        family = self.model.family
        return {
            "method": self.settings.method,
            "settings": asdict(self.settings),
            "concepts": [concept.describe() for concept in self.concepts],
            "family": family.key if family.known else family.base_version,
            "fingerprint": self.fingerprint,
            "prediction": self.model.prediction,
        }

    def patch(
        self,
        changes: Mapping[str, tuple[Tensor, Tensor]],
        losses: Sequence[float],
        error: float = 0.0,
    ) -> ForgetPatch:
        """The patch with its record.

        Args:
            changes: layer name -> up, down.
            error: largest relative Frobenius error of the truncation to a rank.
        """
        method = self.settings.method, asdict(self.settings)
        info = new_info(self.model, self.fingerprint, *method, self.concepts, losses, error)
        return ForgetPatch(self.model.family, dict(changes), info)


def method_run(settings_class: type) -> Callable[[Callable[..., ForgetPatch]], Any]:
    """Turns a function of a ``Task`` into the ``run`` that every method has; see ``fmn.methods``.

    Args:
        settings_class: whose defaults are taken where no settings are given.
    """

    def decorate(run_task: Callable[..., ForgetPatch]) -> Callable[..., ForgetPatch]:
        @wraps(run_task)
        def run(
            model: UNetModel,
            concepts: Sequence[Concept],
            settings: Any = None,
            on_step: OnStep = ignore,
            keep: Sequence[str] = (),
            options: Any = None,
        ) -> ForgetPatch:
            task = Task(model, concepts, settings or settings_class(), on_step, keep)
            return run_task(task, options) if options else run_task(task)

        return run

    return decorate
