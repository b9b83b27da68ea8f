"""Pictures that show what a training has done so far: the same seed before and now."""

from contextlib import contextmanager

import torch

from ..errors import ForgetError
from ..images import to_image
from ..models.families import DEMO
from ..models.image_sampler import ImageSampler, open_sampler
from ..models.sampling import Sampling


class Previews:
    """Draws a few prompts with the model as it was and as it is.

    Args:
        model: a ``Model`` of a known family that can ``decode``.
        prompts: each gives a picture before and one now.
        on_pictures: as ``ImageSampler``'s; may raise to cancel.
    """

    def __init__(self, model, prompts, steps=8, seed=0, on_pictures=lambda count: None):
        if not model.family.known:
            raise ForgetError(
                f"Previews are drawn with Stable Diffusion 1.x, 2.x and XL, and "
                f"{model.family.title} is none of them: set preview_every to 0."
            )
        guidance = 3.5 if model.family is DEMO else 7.0
        self.model, self.prompts, self.seed = model, list(prompts), seed
        self.sampling, self.on_pictures = Sampling(steps, guidance), on_pictures
        self.before = None

    def during(self, training):
        """Pictures of a run between two of its steps: [(prompt, before, now)] of PIL pictures.

        Args:
            training: ``training.Training``, whose adapters are on the model.
        """
        with torch.no_grad(), self._denoiser(training) as denoiser:
            sampler = ImageSampler(self.model, denoiser, self.sampling, 1, self.on_pictures)
            if self.before is None:
                with training.switch.off():
                    self.before = self._draw(sampler)
            # Text that was encoded without the adapters must not be taken for text with them.
            sampler = ImageSampler(self.model, denoiser, self.sampling, 1, self.on_pictures)
            return self._rows(self._draw(sampler))

    def after(self, patch):
        """Pictures with the finished patch on the model."""
        with open_sampler(self.model, self.sampling, 1, self.on_pictures) as sampler:
            self.before = self.before or self._draw(sampler)
            with sampler.applying([(patch, 1.0)]):
                return self._rows(self._draw(sampler))

    @contextmanager
    def _denoiser(self, training):
        if training.denoiser is not None:
            yield training.denoiser
        else:
            with self.model.borrow_denoiser() as denoiser:
                yield denoiser

    def _draw(self, sampler):
        # One by one: prompts of different lengths do not fit into one batch.
        return [to_image(sampler.draw([prompt], [self.seed])[0]) for prompt in self.prompts]

    def _rows(self, now):
        return list(zip(self.prompts, self.before, now))
