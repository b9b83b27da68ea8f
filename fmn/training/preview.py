"""Pictures that show what a training has done so far: the same seed before and now."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from PIL.Image import Image

from ..errors import ForgetError
from ..images import to_image
from ..models.families import DEMO
from ..models.image_sampler import ImageSampler, open_sampler
from ..models.interface import UNetModel
from ..models.sampling import Sampling
from ..patches.patch import ForgetPatch
from .run import TrainingRun

Rows = list[tuple[str, Image, Image]]  # prompt, before, now


class Previews:
    """Draws a few prompts with the model as it was and as it is.

    Args:
        model: of a known family, with a ``decode``.
        prompts: each gives a picture before and one now.
        on_pictures: as ``ImageSampler``'s; may raise to cancel.
    """

    def __init__(
        self,
        model: UNetModel,
        prompts: Iterable[str],
        steps: int = 8,
        seed: int = 0,
        on_pictures: Callable[[int], None] = lambda count: None,
    ):
        if not model.family.known:
            raise ForgetError(
                f"Previews work with Stable Diffusion 1.x, 2.x and XL, and {model.family.title} "
                "is none of them: set preview_every to 0."
            )
        guidance = 3.5 if model.family is DEMO else 7.0
        self.model, self.prompts, self.seed = model, list(prompts), seed
        self.sampling, self.on_pictures = Sampling(steps, guidance), on_pictures
        self.before: list[Image] = []

    def during(self, run: TrainingRun) -> Rows:
        """Pictures between two steps of a run, whose adapters are attached."""
        lent = nullcontext(run.denoiser) if run.denoiser else self.model.borrow_denoiser()
        with torch.no_grad(), lent as denoiser:
            # A new sampler each time: it caches texts, which the adapters may change.
            given = self.model, denoiser, self.sampling, 1, self.on_pictures
            if not self.before:
                with run.switch.off():
                    self.before = self._draw(ImageSampler(*given))
            return list(zip(self.prompts, self.before, self._draw(ImageSampler(*given))))

    def after(self, patch: ForgetPatch) -> Rows:
        """Pictures with the finished patch applied to the model."""
        with open_sampler(self.model, self.sampling, 1, self.on_pictures) as sampler:
            self.before = self.before or self._draw(sampler)
            with sampler.applying([(patch, 1.0)]):
                return list(zip(self.prompts, self.before, self._draw(sampler)))

    def _draw(self, sampler: ImageSampler) -> list[Image]:
        # One by one: prompts of different lengths do not fit into one batch.
        return [to_image(sampler.draw([prompt], [self.seed])[0]) for prompt in self.prompts]
