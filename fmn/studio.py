"""A borrowed model that draws, with patches on or off, for as long as it is borrowed."""

from contextlib import contextmanager

import torch

from .concept import Prompt
from .lowrank import Fixed, attached
from .model import Text
from .sampling import Sampling, ddim, guided

CACHED_TEXTS = 4096


class Studio:
    """Draws pictures from prompts or embeddings. Made by ``open_studio``.

    Attributes:
        model, borrowed: the host, and its U-Net.
        sampling: a ``Sampling`` whose size is never 0.
        batch: pictures drawn at once.
        on_pictures: called with the number of pictures after each batch; may raise to cancel.
    """

    def __init__(self, model, borrowed, sampling, batch, on_pictures):
        self.model, self.borrowed, self.batch = model, borrowed, batch
        self.sampling = Sampling(
            sampling.steps, sampling.guidance, sampling.size or model.family.resolution
        )
        self.on_pictures = on_pictures
        self._worn, self._texts = [], {}

    @contextmanager
    def wearing(self, patches):
        """Put patches on for a while, beside those worn already.

        Args:
            patches: list of (ForgetPatch, strength).
        """
        before, added = self._worn, list(patches)
        for patch, _ in added:
            patch.check_family(self.model.family)
            patch.check_shapes(lambda layer: self.borrowed.module(layer.name).weight)
        adapters = _adapters(added, self.borrowed.device)
        self._worn = [*before, adapters]
        try:
            with attached(adapters, self.borrowed.module):
                yield
        finally:
            self._worn = before

    @contextmanager
    def bare(self):
        """As if nothing were worn, for a while."""
        switched = [adapter for adapters in self._worn for adapter in adapters.values()]
        before = [adapter.on for adapter in switched]
        try:
            for adapter in switched:
                adapter.on = False
            yield
        finally:
            for adapter, on in zip(switched, before):
                adapter.on = on

    def text(self, prompt):
        """The prompt encoded, [1, T, D]; kept, as every picture needs it and the empty one."""
        if prompt not in self._texts:
            if len(self._texts) >= CACHED_TEXTS:
                self._texts.clear()
            self._texts[prompt] = self.model.encode(Prompt(prompt, prompt))
        return self._texts[prompt]

    def texts(self, prompts):
        """Several as one batch, [B, T, D]."""
        return Text.cat([self.text(prompt) for prompt in prompts])

    def noise(self, seeds):
        """Pure noise [B, 4, h, w], one generator a seed, on the CPU."""
        side = self.sampling.size // 8
        return torch.stack(
            [torch.randn(4, side, side, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )

    def predictor(self, text):
        """``sampling.guided`` for encoded prompts, with the studio's guidance."""
        return guided(self.borrowed, text, self.text(""), self.sampling.guidance)

    def latents(self, text, x, **options):
        """``sampling.ddim`` from x [B, 4, h, w], on the CPU; options as there."""
        x = x.to(self.borrowed.device)
        alphas = self.borrowed.alphas_cumprod
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


class _Switched:
    """An adapter that can be off."""

    def __init__(self, adapter):
        self.adapter, self.on = adapter, True

    def __call__(self, module, x):
        return self.adapter(module, x) if self.on else 0


def _adapters(patches, device):
    factors = {}
    for patch, strength in patches:
        for name, (up, down) in patch.changes.items():
            factors.setdefault(name, []).append((up, down, strength))
    return {name: _Switched(Fixed(found, device)) for name, found in factors.items()}


@contextmanager
def open_studio(model, sampling=Sampling(), batch=16, on_pictures=lambda count: None):
    """Borrow a model to draw with; its weights are never written to.

    Args:
        model: a ``Model`` that can ``decode``.
    """
    with model.borrow() as borrowed, torch.no_grad():
        yield Studio(model, borrowed, sampling, batch, on_pictures)
