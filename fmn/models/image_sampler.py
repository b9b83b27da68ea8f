"""Draws pictures with a borrowed model, with patches applied or not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..concepts.concept import Prompt
from .adapters import Device, FixedAdapter, LayerModule, Patch, Switch, attached, check_fits
from .interface import NoiseFunction, Text, UNet, UNetModel
from .sampling import Sampling, guided, seeded_noise

CACHED_TEXTS = 4096


class ImageSampler:
    """Draws pictures from prompts or embeddings. Made by ``open_sampler``.

    Attributes:
        model, denoiser: the host's model, and its U-Net.
        sampling: a ``Sampling`` whose size is never 0.
        batch: pictures drawn at once.
        on_pictures: called with the number of pictures after each batch; may raise to cancel.
    """

    def __init__(
        self,
        model: UNetModel,
        denoiser: UNet,
        sampling: Sampling,
        batch: int,
        on_pictures: Callable[[int], object],
    ) -> None:
        self.model, self.denoiser, self.batch = model, denoiser, batch
        self.sampling = Sampling(
            sampling.steps, sampling.guidance, sampling.size or model.family.resolution
        )
        self.on_pictures = on_pictures
        self._applied: list[tuple[Switch, bool]] = []  # and whether they change the text encoder
        self._texts: dict[tuple[str, tuple[Switch, ...]], Text] = {}

    @contextmanager
    def applying(self, patches: Iterable[tuple[Patch, float]]) -> Iterator[None]:
        """Apply patches, a list of (patch, strength), for a while, on top of those applied."""
        before, patches = self._applied, list(patches)
        for patch, _ in patches:
            check_fits(patch, self.model.family, self._module)
        adapters = _fixed_adapters(patches, self.denoiser.device)
        changes_text = any(patch.changes_text for patch, _ in patches)
        with attached(adapters, self._module) as switch:
            self._applied = [*before, (switch, changes_text)]
            try:
                yield
            finally:
                self._applied = before

    def _module(self, name: str) -> LayerModule:
        is_text = name.startswith("text_encoder")
        return (self.model.text_module if is_text else self.denoiser.module)(name)

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """All applied patches off, for a while."""
        with ExitStack() as stack:
            for switch, _ in self._applied:
                stack.enter_context(switch.off())
            yield

    def text(self, prompt: str) -> Text:
        """The prompt encoded, [1, T, D]; cached, as every picture needs it and the empty one."""
        # A patch on the text encoder makes another text of the same prompt.
        switches = tuple(switch for switch, is_text in self._applied if is_text and switch.on)
        if (prompt, switches) not in self._texts:
            if len(self._texts) >= CACHED_TEXTS:
                self._texts.clear()
            self._texts[prompt, switches] = self.model.encode(Prompt(prompt, prompt))
        return self._texts[prompt, switches]

    def texts(self, prompts: Iterable[str]) -> Text:
        """Several as one batch, [B, T, D]."""
        return Text.cat([self.text(prompt) for prompt in prompts])

    def noise(self, seeds: Iterable[int]) -> Tensor:
        """``seeded_noise`` [B, 4, h, w] of the pictures' size."""
        family = self.model.family
        side = self.sampling.size // family.latent_factor
        return seeded_noise(seeds, side, family.latent_channels)

    def predictor(self, text: Text) -> NoiseFunction:
        """``sampling.guided`` for encoded prompts, with the sampler's guidance."""
        return guided(self.denoiser, text, self.text(""), self.sampling.guidance)

    def latents(self, text: Text, x: Tensor, **options: Any) -> Tensor:
        """Latents from x [B, C, h, w], on the CPU; options of the schedule's ``sample``."""
        x, schedule = x.to(self.denoiser.device), self.denoiser.schedule
        return (
            schedule.sample(self.predictor(text), x, self.sampling.steps, **options).float().cpu()
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1."""
        return self.model.decode(latents)

    def draw_texts(self, text: Text, seeds: Iterable[int], **options: Any) -> Tensor:
        """Pictures [B, H, W, 3] of encoded prompts, one a seed, in batches."""
        seeds, pictures = list(seeds), []
        for i in range(0, len(seeds), self.batch):
            rows = slice(i, i + self.batch)
            latents = self.latents(text[rows], self.noise(seeds[rows]), **options)
            pictures.append(self.decode(latents))
            self.on_pictures(len(pictures[-1]))
        return torch.cat(pictures)

    def draw(self, prompts: Iterable[str], seeds: Iterable[int], **options: Any) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1, one a prompt and seed."""
        return self.draw_texts(self.texts(prompts), seeds, **options)


def _fixed_adapters(
    patches: Sequence[tuple[Patch, float]], device: Device
) -> dict[str, FixedAdapter]:
    factors: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for patch, strength in patches:
        for name, (up, down) in patch.changes.items():
            factors.setdefault(name, []).append((up, down, strength))
    return {name: FixedAdapter(parts, device) for name, parts in factors.items()}


@contextmanager
def open_sampler(
    model: UNetModel,
    sampling: Sampling = Sampling(),
    batch: int = 16,
    on_pictures: Callable[[int], object] = lambda count: None,
    trained: bool = False,
) -> Iterator[ImageSampler]:
    """Borrow a model to draw with; its weights are never written to.

    Args:
        trained: something will be trained on it, too, which quantised models refuse.
    """
    side = (sampling.size or model.family.resolution) // 8
    opened = model.borrow_denoiser() if trained else model.watch(2 * batch, side)
    with opened as denoiser, torch.no_grad():
        yield ImageSampler(model, denoiser, sampling, batch, on_pictures)
