"""Relearning: how soon a short fine-tuning brings the target back, and what it teaches anyway.

After "Erased or Dormant?" (2025, arXiv 2505.16174) and its reviews, which ask for a control: a
thing that the model never knew, taught in the same way. docs/robustness.md tells the rest.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ...errors import ForgetError
from ...models.adapters import LowRankAdapter, attached
from ...models.families import layers
from ...models.sampling import q_sample
from ...settings import check_limits
from ...text import with_article
from ...training.loop import AdamWConfig, initial_loss_scale, train
from ...training.run import adapter_parameters
from .attacks import examples
from .text import judged_rows


@dataclass(frozen=True)
class Settings:
    """How it is taught, the target and the controls alike.

    Attributes:
        pictures: how many it is taught with.
        steps, batch, lr: of AdamW; one low-rank change to every attention layer's projections,
            self-attention's too, of ``rank``.
    """

    pictures: int = 12
    steps: int = 50
    batch: int = 4
    lr: float = 2e-3
    rank: int = 8

    def __post_init__(self):
        limits = {"pictures": 10_000, "steps": 100_000, "batch": 256, "rank": 128}
        check_limits(self, {name: (1, high) for name, high in limits.items()})
        if not 0 < self.lr < 1:
            raise ForgetError(f"lr is {self.lr}: use a number between 0 and 1, such as 0.001.")


def relearn(trial, settings=Settings()):
    """Fine-tune the model under test on the target for a moment, and ask for it again.

    Taught are pictures of the untouched model, with other seeds than those asked for. The model
    and the patches come back as they were.

    Cost for the target and for each control: ``steps`` forwards and backwards of ``batch``, and
    2 * ``trial.count`` pictures; ``trial.count`` + ``pictures`` untouched, kept.

    Returns:
        rows: with ``before``, whether the target showed before fine-tuning.
        controls: rows of all controls, with ``concept``, still and before, or "absent".
        losses: by name.
    """
    asks = lesson_asks(trial, trial.count + settings.pictures)
    asks, spare = asks[: trial.count], asks[trial.count :]
    taught, pictures = examples(trial, spare)
    prompts = [ask.prompt for ask in taught]
    before, after, losses = _lesson(trial, asks, prompts, pictures, settings)
    shown = zip(trial.shows_target(before), judged_rows(trial, asks, trial.shows_target(after)))
    rows = [row | {"before": found} for found, row in shown]
    controls, all_losses = [], {trial.target.name: losses}
    for name, given in trial.controls.items():
        found, all_losses[name] = _control(trial, name, given, settings)
        controls += found
    return {
        "rows": rows,
        "controls": controls if trial.controls else "absent",
        "pictures": len(pictures),
        "losses": all_losses,
        "settings": asdict(settings),
    }


def lesson_asks(trial, count):
    """What the target is taught and asked with: "a photo of" it, as the controls are.

    A style needs something that wears it, and unsafe content its own prompts: ``target_asks``.
    """
    if trial.target.domain != "concept":
        return trial.target_asks(count)
    phrase = trial.suite.phrase(trial.target)
    return [trial.ask(f"a photo of {phrase}", i) for i in range(count)]


def _control(trial, name, pictures, settings):
    """Rows of a control, and its losses."""
    labels = trial.judge.labels.get("concept", ())
    if name not in labels:
        raise ForgetError(
            f"The judge '{trial.judge.name}' has no label for the control '{name}': use a judge "
            "that knows it, or leave the control out."
        )
    asks = [trial.ask(f"a photo of {with_article(name)}", i) for i in range(trial.count)]
    pictures = spread(pictures, settings.pictures)
    prompts = [asks[0].prompt] * len(pictures)
    before, after, losses = _lesson(trial, asks, prompts, pictures, settings)
    shown = [[said == name for said in trial.said(one)["concept"]] for one in (after, before)]
    rows = [
        {"concept": name, "prompt": ask.prompt, "seed": ask.seed, "still": still, "before": was}
        for ask, still, was in zip(asks, *shown)
    ]
    return rows, losses


def spread(pictures, count):
    """``count`` of the pictures, evenly over all of them: they may be sorted by style."""
    count = min(count, len(pictures))
    return pictures[[i * len(pictures) // count for i in range(count)]]


def _lesson(trial, asks, prompts, pictures, settings):
    """Pictures before and after fine-tuning on prompts and pictures, and the losses."""
    sampler = trial.sampler
    before = trial.draw(asks)
    adapters = make_adapters(sampler, settings.rank, trial.seed)
    with attached(adapters, sampler.denoiser.module):
        losses = fine_tune(sampler, adapters, prompts, pictures, settings, trial.seed)
        return before, trial.draw(asks), losses


def make_adapters(sampler, rank, seed):
    """Zero changes to all projections of all attention layers, cross and self."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = sampler.denoiser
    return {
        layer.name: LowRankAdapter(denoiser.module(layer.name), rank, generator, denoiser.device)
        for layer in layers(sampler.model.family)
        if ".attn1." in layer.name or ".attn2." in layer.name
    }


def fine_tune(sampler, adapters, prompts, pictures, settings, seed):
    """Train the attached adapters on the denoising loss (Ho et al. 2020, eq. 14); the losses."""
    denoiser, generator = sampler.denoiser, torch.Generator().manual_seed(seed)
    latents = sampler.model.encode_images(pictures, sampler.sampling.size).float().cpu()
    alphas = denoiser.alphas_cumprod.cpu()

    def loss_at(index):
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        t = torch.randint(len(alphas), (settings.batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        x_t = q_sample(latents[rows], noise, alphas[t]).to(denoiser.device)
        text = sampler.texts([prompts[i] for i in rows.tolist()])
        predicted = denoiser.predict_noise(x_t, t.to(denoiser.device), text)
        return F.mse_loss(predicted.float(), noise.to(predicted.device))

    parameters = adapter_parameters(adapters)
    scale = initial_loss_scale(denoiser.module(next(iter(adapters))))
    # ``open_sampler`` works without gradients; cancelling goes through its callback.
    with torch.enable_grad():
        return train(
            parameters, loss_at, settings.steps, AdamWConfig(settings.lr),
            lambda step: sampler.on_pictures(0), scale,
        )  # fmt: skip
