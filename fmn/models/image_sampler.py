"""A borrowed model that draws, with patches on or off, for as long as it is borrowed."""

from contextlib import ExitStack, contextmanager

import torch

from ..concepts.concept import Prompt
from .adapters import FixedAdapter, attached
from .interface import Text
from .sampling import Sampling, ddim, guided, seeded_noise

CACHED_TEXTS = 4096


class ImageSampler:
    """Draws pictures from prompts or embeddings. Made by ``open_sampler``.

    Attributes:
        model, denoiser: the host, and its U-Net.
        sampling: a ``Sampling`` whose size is never 0.
        batch: pictures drawn at once.
        on_pictures: called with the number of pictures after each batch; may raise to cancel.
    """

    def __init__(self, model, denoiser, sampling, batch, on_pictures):
        self.model, self.denoiser, self.batch = model, denoiser, batch
        self.sampling = Sampling(
            sampling.steps, sampling.guidance, sampling.size or model.family.resolution
        )
        self.on_pictures = on_pictures
        self._worn, self._texts = [], {}

    @contextmanager
    def applying(self, patches):
        """Put patches on for a while, beside those worn already.

        Args:
            patches: list of (ForgetPatch, strength).
        """
        before, added = self._worn, list(patches)
        for patch, _ in added:
            patch.check_family(self.model.family)
            patch.check_shapes(lambda layer: self._module(layer.name).weight)
            patch.check_shapes(lambda layer: self._module(layer.name).weight, text=True)
        adapters = _adapters(added, self.denoiser.device)
        changes_text = any(patch.changes_text for patch, _ in added)
        with attached(adapters, self._module) as switch:
            self._worn = [*before, (switch, changes_text)]
            try:
                yield
            finally:
                self._worn = before

    def _module(self, name):
        is_text = name.startswith("text_encoder")
        return (self.model.text_module if is_text else self.denoiser.module)(name)

    @contextmanager
    def unpatched(self):
        """As if nothing were worn, for a while."""
        with ExitStack() as stack:
            for switch, _ in self._worn:
                stack.enter_context(switch.off())
            yield

    def text(self, prompt):
        """The prompt encoded, [1, T, D]; kept, as every picture needs it and the empty one."""
        # A patch on the text encoder makes another text of the same prompt.
        worn = tuple(switch for switch, is_text in self._worn if is_text and switch.on)
        if (prompt, worn) not in self._texts:
            if len(self._texts) >= CACHED_TEXTS:
                self._texts.clear()
            self._texts[prompt, worn] = self.model.encode(Prompt(prompt, prompt))
        return self._texts[prompt, worn]

    def texts(self, prompts):
        """Several as one batch, [B, T, D]."""
        return Text.cat([self.text(prompt) for prompt in prompts])

    def noise(self, seeds):
        """``seeded_noise`` [B, 4, h, w] of the drawings' size."""
        return seeded_noise(seeds, self.sampling.size // 8)

    def predictor(self, text):
        """``sampling.guided`` for encoded prompts, with the sampler's guidance."""
        return guided(self.denoiser, text, self.text(""), self.sampling.guidance)

    def latents(self, text, x, **options):
        """``sampling.ddim`` from x [B, 4, h, w], on the CPU; options as there."""
        x = x.to(self.denoiser.device)
        alphas = self.denoiser.alphas_cumprod
        return ddim(self.predictor(text), x, alphas, self.sampling.steps, **options).float().cpu()

    def decode(self, latents):
        """Pictures [B, H, W, 3] in 0..1."""
        return self.model.decode(latents)

    def draw_texts(self, text, seeds, **options):
        """Pictures [B, H, W, 3] of encoded prompts, one a seed, in batches."""
        seeds, pictures = list(seeds), []
        for i in range(0, len(seeds), self.batch):
            rows = slice(i, i + self.batch)
            vectors = {name: v[rows] for name, v in text.vectors.items()}
            part = Text(text.context[rows], vectors)
            pictures.append(self.decode(self.latents(part, self.noise(seeds[rows]), **options)))
            self.on_pictures(len(pictures[-1]))
        return torch.cat(pictures)

    def draw(self, prompts, seeds, **options):
        """Pictures [B, H, W, 3] in 0..1, one a prompt and seed."""
        return self.draw_texts(self.texts(prompts), seeds, **options)


def _adapters(patches, device):
    factors = {}
    for patch, strength in patches:
        for name, (up, down) in patch.changes.items():
            factors.setdefault(name, []).append((up, down, strength))
    return {name: FixedAdapter(found, device) for name, found in factors.items()}


@contextmanager
def open_sampler(model, sampling=Sampling(), batch=16, on_pictures=lambda count: None):
    """Borrow a model to draw with; its weights are never written to.

    Args:
        model: a ``Model`` that can ``decode``.
    """
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        yield ImageSampler(model, denoiser, sampling, batch, on_pictures)
