"""Relearning: how soon a short fine-tuning brings the target back, and what it teaches anyway.

After "Erased or Dormant?" (2025, arXiv 2505.16174) and its reviews, which ask for a control: a
thing that the model never knew, taught in the same way. docs/robustness.md has the details.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ...concepts.prompt_templates import with_article
from ...models.adapters import LowRankAdapter, attached
from ...models.families import layers
from ...models.image_sampler import ImageSampler
from ...models.sampling import q_sample
from ...sequences import evenly
from ...training.loop import AdamWConfig, initial_loss_scale, train
from ...training.run import adapter_parameters
from .attacks import recognised_examples
from .trial import Ask, Result, Row, Trial


@dataclass(frozen=True)
class RelearnSettings:
    """How the target and the controls are taught.

    Attributes:
        pictures: to teach with.
        steps, batch, lr: of AdamW.
        rank: of one low-rank change to each projection of all attention layers, cross and self.
    """

    pictures: int = 12
    steps: int = 50
    batch: int = 4
    lr: float = 2e-3
    rank: int = 8


def relearn(trial: Trial, settings: RelearnSettings = RelearnSettings()) -> Result:
    """Fine-tune the model under test on the target for a moment, and ask for it again.

    It is taught with pictures of the untouched model, at other seeds than those asked for. The
    model and the patches come back as they were.

    Cost for the target and for each control: ``steps`` forwards and backwards of ``batch``, and
    2 * ``trial.count`` pictures; ``trial.count`` + ``pictures`` untouched, kept.

    Returns:
        rows: with ``before``, whether the target showed before fine-tuning.
        controls: rows of all controls, with ``concept``, still and before, or "absent".
        losses: by name.
    """
    asks = lesson_asks(trial, trial.count + settings.pictures)
    asks, spare = asks[: trial.count], asks[trial.count :]
    lesson, pictures = recognised_examples(trial, spare)
    prompts = [ask.prompt for ask in lesson]
    before, after, losses = _before_and_after(trial, asks, prompts, pictures, settings)
    shown_before, shown_after = map(trial.shows_target, (before, after))
    rows = trial.judged_rows(asks, shown_after)
    rows = [row | {"before": shown} for row, shown in zip(rows, shown_before)]
    controls: list[Row] = []
    all_losses = {trial.target.name: losses}
    for name, strip in trial.controls.items():
        of_control, all_losses[name] = _control(trial, name, strip, settings)
        controls += of_control
    return {
        "rows": rows,
        "controls": controls if trial.controls else "absent",
        "pictures": len(pictures),
        "losses": all_losses,
        "settings": asdict(settings),
    }


def lesson_asks(trial: Trial, count: int) -> list[Ask]:
    """What the target is taught and asked with: "a photo of" it, as the controls are.

    A style needs something to be drawn in it, and unsafe content its own prompts: ``target_asks``.
    """
    if trial.target.domain != "concept":
        return trial.target_asks(count)
    phrase = trial.suite.phrase(trial.target)
    return [trial.ask(f"a photo of {phrase}", i) for i in range(count)]


def _control(
    trial: Trial, name: str, pictures: torch.Tensor, settings: RelearnSettings
) -> tuple[list[Row], list[float]]:
    """Rows of a control, and its losses."""
    trial.check_control(name)
    asks = [trial.ask(f"a photo of {with_article(name)}", i) for i in range(trial.count)]
    count = min(settings.pictures, len(pictures))
    pictures = pictures[evenly(range(len(pictures)), count)]  # they may be sorted by style
    prompts = [asks[0].prompt] * len(pictures)
    before, after, losses = _before_and_after(trial, asks, prompts, pictures, settings)
    then, now = (trial.labels(images)["concept"] for images in (before, after))
    rows = [
        {
            "concept": name,
            "prompt": ask.prompt,
            "seed": ask.seed,
            "still": label_after == name,
            "before": label_before == name,
        }
        for ask, label_before, label_after in zip(asks, then, now)
    ]
    return rows, losses


def _before_and_after(
    trial: Trial,
    asks: list[Ask],
    prompts: list[str],
    pictures: torch.Tensor,
    settings: RelearnSettings,
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Pictures before and after fine-tuning on prompts and pictures, and the losses."""
    sampler = trial.sampler
    before = trial.draw(asks)
    adapters = make_adapters(sampler, settings.rank, trial.seed)
    with attached(adapters, sampler.denoiser.module):
        losses = fine_tune(sampler, adapters, prompts, pictures, settings, trial.seed)
        return before, trial.draw(asks), losses


def make_adapters(sampler: ImageSampler, rank: int, seed: int) -> dict[str, LowRankAdapter]:
    """Zero changes to all projections of all attention layers, cross and self."""
    generator = torch.Generator().manual_seed(seed)
    unet = sampler.denoiser
    return {
        layer.name: LowRankAdapter(unet.module(layer.name), rank, generator, unet.device)
        for layer in layers(sampler.model.family)
        if ".attn1." in layer.name or ".attn2." in layer.name
    }


def fine_tune(
    sampler: ImageSampler,
    adapters: dict[str, LowRankAdapter],
    prompts: Sequence[str],
    pictures: torch.Tensor,
    settings: RelearnSettings,
    seed: int,
) -> list[float]:
    """Train the attached adapters on pictures [N, H, W, 3] and their prompts; the losses."""
    unet, generator = sampler.denoiser, torch.Generator().manual_seed(seed)
    latents = sampler.model.encode_images(pictures, sampler.sampling.size).float().cpu()
    alphas = unet.alphas_cumprod.cpu()

    def loss_at(step: int) -> torch.Tensor:
        """L_simple, E |eps - eps_theta(x_t, t)|^2 (Ho et al. 2020, eq. 14)."""
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        t = torch.randint(len(alphas), (settings.batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        x_t = q_sample(latents[rows], noise, alphas[t]).to(unet.device)
        text = sampler.texts([prompts[i] for i in rows.tolist()])
        predicted = unet.predict_noise(x_t, t.to(unet.device), text)
        return F.mse_loss(predicted.float(), noise.to(predicted.device))

    parameters = adapter_parameters(adapters)
    scale = initial_loss_scale(unet.module(next(iter(adapters))))
    # ``open_sampler`` works without gradients; cancelling goes through its callback.
    with torch.enable_grad():
        return train(
            parameters, loss_at, settings.steps, AdamWConfig(settings.lr),
            lambda step: sampler.on_pictures(0), scale,
        )  # fmt: skip
