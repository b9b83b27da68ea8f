"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a concept's words learned from pictures.

The model stays as it is. Only the input embeddings of a few new tokens are trained, so that
prompts with them predict the noise on the pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..models.interface import Denoiser, TextEncoder, WordModel
from ..models.sampling import expand
from ..progress import OnStep, ignore
from ..settings import check_limits
from .loop import AdamWConfig, initial_loss_scale, train


@dataclass(frozen=True)
class Settings:
    """Textual inversion's settings."""

    tokens: int = 2  # how many input embeddings are learned; 1 to 64
    steps: int = 100
    lr: float = 0.01  # AdamW's, without weight decay
    batch: int = 4  # noised latents a step, at time steps spread over the whole schedule
    seed: int = 0  # for the start, the latents, the time steps and the noise
    # Words whose embeddings the tokens start from, repeated or cut to ``tokens``. Empty: random
    # directions with the mean length of the templates' words.
    start: str = ""
    templates: tuple[str, ...] = ("a photo of {}",)  # {} for the tokens; one a step, at random

    def __post_init__(self) -> None:
        limits = {"tokens": (1, 64), "steps": (1, 100_000), "batch": (1, 256)}
        check_limits(self, limits | {"seed": (0, 2**63 - 1)})
        if not 0 < self.lr < 10:
            raise ForgetError(f"lr is {self.lr}: use a number between 0 and 10, such as 0.01.")
        check_templates(self.templates)


@dataclass
class Inverted:
    """The learned tokens."""

    vectors: torch.Tensor  # float32 [tokens, width] on the CPU, for ``TextEncoder.encode``
    start: torch.Tensor  # the same before training
    losses: list[float]  # one a step


def check_templates(templates: Sequence[str]) -> None:
    """Raise a ``ForgetError`` unless every template has exactly one {}."""
    if not templates:
        raise ForgetError("There is no template: give at least one, such as 'a photo of {}'.")
    for template in templates:
        if template.count("{}") != 1:
            raise ForgetError(
                f"The template '{template:.60}' has {template.count('{}')} placeholders {{}} for "
                "the concept: write it with exactly one."
            )


def invert(
    model: WordModel,
    denoiser: Denoiser,
    images: torch.Tensor | None,
    settings: Settings = Settings(),
    on_step: OnStep = ignore,
) -> Inverted:
    """Learn tokens that stand for what pictures show.

    Args:
        denoiser: the model's; patches may be attached to it.
        images: float [N, H, W, 3] in 0..1.

    Raises:
        ForgetError: no pictures, or settings that do not fit the model.
        NonFiniteLoss: training diverged.
    """
    if images is None or len(images) == 0:
        raise ForgetError("There are no pictures to invert: give at least one.")
    latents = model.encode_images(images, model.family.resolution)
    with (
        model.borrow_text_encoder() as text_encoder,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        start = initial_vectors(text_encoder, settings)
        vectors = start.clone().requires_grad_()
        latents, schedule = latents.clone(), denoiser.schedule
        # Not the generator of the start: two more tokens must not change the noise.
        generator = torch.Generator().manual_seed(settings.seed)

        def loss_at(index: int) -> torch.Tensor:
            """|e(x_t, t, prompt) - noise|^2, equation 2 of the paper; of velocities in a flow."""
            template = torch.randint(len(settings.templates), (1,), generator=generator)
            prompt = fill(settings.templates[int(template)], PLACEHOLDER)
            rows, t, noise = draw_noise(latents, settings.batch, len(schedule), generator)
            x_t, wanted = schedule.noised(latents[rows], noise, t)
            text, _ = text_encoder.encode(prompt, vectors)
            x_t, t = x_t.to(denoiser.device), t.to(denoiser.device)
            predicted = denoiser.predict_noise(x_t, t, expand(text, len(x_t)))
            return torch.nn.functional.mse_loss(predicted.float(), wanted.to(predicted.device))

        reader = denoiser.module(model.family.marking()[0].name)
        config, scale = AdamWConfig(settings.lr, weight_decay=0.0), initial_loss_scale(reader)
        losses = train([vectors], loss_at, settings.steps, config, on_step, scale)
        return Inverted(vectors.detach().cpu().clone(), start.cpu(), losses)


def initial_vectors(text_encoder: TextEncoder, settings: Settings) -> torch.Tensor:
    """The embeddings that training starts from, float32 [tokens, width]; see ``Settings.start``.

    Raises:
        ForgetError: the start's words or the templates give no tokens.
    """
    words = settings.start or " ".join(settings.templates).replace("{}", " ")
    known = text_encoder.vectors(words)
    if len(known) == 0:
        raise ForgetError(
            f"'{words:.60}' gives no tokens to start from: write words around {{}} in a template, "
            "or words to start from."
        )
    if settings.start:
        return known.repeat(-(-settings.tokens // len(known)), 1)[: settings.tokens].clone()
    generator = torch.Generator().manual_seed(settings.seed)
    random = torch.randn(settings.tokens, text_encoder.width, generator=generator).to(known)
    return random / random.norm(dim=1, keepdim=True) * known.norm(dim=1).mean()


def draw_noise(
    latents: torch.Tensor, count: int, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of latents [N, 4, h, w], time steps t and noise for ``count`` noised latents.

    The time steps lie one in each of so many equal parts of the schedule: uniform as in the paper,
    and far less noisy.
    """
    rows = torch.randint(len(latents), (count,), generator=generator)
    share = torch.arange(count) + torch.rand(count, generator=generator)
    t = (share * steps / count).long().clamp(max=steps - 1)
    return rows, t, torch.randn((count, *latents.shape[1:]), generator=generator)
