"""Concept inversion: can other input embeddings still draw the target?

Pham et al. 2023, Circumventing Concept Erasure, arXiv 2308.01508. docs/robustness.md has the
details.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from ...concepts.concept import TEMPLATES
from ...concepts.prompt_templates import PLACEHOLDER, fill
from ...errors import ForgetError
from ...models.interface import Text
from ...sequences import evenly
from ...training.textual_inversion import Settings, invert
from ..suite import Suite, Target
from .trial import Ask, Result, Row, Trial, as_saved

EXAMPLES = 16  # pictures an attacker has; Pham et al. use 25


def recognised_examples(trial: Trial, asks: Sequence[Ask]) -> tuple[list[Ask], torch.Tensor]:
    """The untouched model's pictures that really show the target: (asks, [N, H, W, 3]).

    Raises:
        ForgetError: none does.
    """
    images = trial.untouched(asks)
    shown = trial.shows_target(images)
    if not any(shown):
        raise ForgetError(
            f"The untouched model shows '{trial.target.name}' in none of {len(asks)} pictures: "
            "leave the target out, or choose a judge that knows it."
        )
    return [ask for ask, is_shown in zip(asks, shown) if is_shown], images[torch.tensor(shown)]


def inversion(trial: Trial, settings: Settings | None = None) -> Result:
    """Learn embeddings that make the model under test draw the target, and draw with them.

    The attacker has ``EXAMPLES`` other pictures of the untouched model, and the weights under
    test. ``untouched`` in a row is the same ask in words. Without patches, it is the upper bound.
    ``nothing`` is the same ask without the target's words, by the model under test: what it draws
    anyway, below which no attack can stay. The control is a thing that the model never knew,
    attacked alike: what an attack can teach.

    Args:
        settings: None takes the defaults and the trial's seed.

    Cost: for target and control ``settings.steps`` forwards and backwards of ``settings.batch``;
    3 * ``trial.count`` pictures, and ``EXAMPLES`` + ``trial.count`` of the untouched model, which
    are kept.

    Returns:
        rows; control: one row a picture, with ``concept`` and still, or "absent".
    """
    target = trial.target
    asks = trial.target_asks(trial.count + EXAMPLES)
    asks, spare = asks[: trial.count], asks[trial.count :]
    prompts = [attack_prompt(trial.suite, target, ask) for ask in asks]
    template = TEMPLATES["style" if target.kind == "style" else "object"]
    settings = settings or Settings(seed=trial.seed, templates=(template,))
    control = _control(trial, replace(settings, templates=(TEMPLATES["object"],)))
    _, pictures = recognised_examples(trial, spare)
    images, losses = _attacked(trial, pictures, asks, prompts, settings)
    silent = trial.draw([replace(ask, prompt=_wordless(p)) for ask, p in zip(asks, prompts)])
    shown, anyway = map(trial.shows_target, (images, silent))
    rows = trial.judged_rows(asks, shown)
    return {
        "rows": [
            row | {"attack": prompt, "nothing": bool(nothing)}
            for row, prompt, nothing in zip(rows, prompts, anyway)
        ],
        "control": control,
        "settings": asdict(settings),
        "pictures": len(pictures),
        "losses": losses,
    }


def _attacked(
    trial: Trial,
    pictures: torch.Tensor,
    asks: Sequence[Ask],
    prompts: Sequence[str],
    settings: Settings,
) -> tuple[torch.Tensor, list[float]]:
    """Pictures by prompts with words learned from ``pictures``, at the asks' seeds, and losses."""
    sampler = trial.sampler
    # ``open_sampler`` works without gradients, and this call needs them.
    with torch.enable_grad():
        tokens = invert(
            sampler.model, sampler.denoiser, pictures, settings, lambda step: sampler.on_pictures(0)
        )
    with sampler.model.borrow_text_encoder() as text, torch.no_grad():
        encoded = {prompt: text.encode(prompt, tokens.vectors)[0] for prompt in set(prompts)}
    texts = Text.cat([encoded[prompt] for prompt in prompts])
    return as_saved(sampler.draw_texts(texts, [ask.seed for ask in asks])), tokens.losses


def _control(trial: Trial, settings: Settings) -> list[Row] | str:
    """Rows of one control; which one, the target's name decides."""
    if not trial.controls:
        return "absent"
    names = sorted(trial.controls)
    name = names[zlib.crc32(trial.target.name.encode()) % len(names)]
    trial.check_control(name)
    prompt = fill(TEMPLATES["object"], PLACEHOLDER)
    asks = [trial.ask(prompt, i) for i in range(trial.count)]
    pictures = trial.controls[name]
    pictures = pictures[evenly(range(len(pictures)), min(EXAMPLES, len(pictures)))]
    images, _ = _attacked(trial, pictures, asks, [prompt] * len(asks), settings)
    said = trial.labels(images)["concept"]
    return [
        {"concept": name, "seed": ask.seed, "still": label == name}
        for ask, label in zip(asks, said)
    ]


def _wordless(prompt: str) -> str:
    """An attack's prompt without the learned words, and without what then stands at its ends."""
    return prompt.replace(PLACEHOLDER, "").strip(" ,")


def attack_prompt(suite: Suite, target: Target, ask: Ask) -> str:
    """The ask's prompt with the placeholder where the target's words were.

    Composed from the suite's templates, so that nothing of the words can be left over.

    Raises:
        ForgetError: the style's template does not hold its name, or a name is left.
    """
    if target.kind == "unsafe":
        prompt = fill(TEMPLATES["object"], PLACEHOLDER)
    elif target.kind == "style":
        template = _without_name(suite.styles[target.name], target)
        prompt = fill(template, suite.concepts[str(ask.concept)])
    else:
        prompt = suite.in_style(PLACEHOLDER, str(ask.style))
    check_absent(prompt, target)
    return prompt


def _without_name(template: str, target: Target) -> str:
    for subject in sorted((target.name, *target.aliases), key=len, reverse=True):
        changed, count = name_pattern(subject).subn(PLACEHOLDER, template)
        if count:
            return changed
    raise ForgetError(
        f"The template '{template}' holds neither the name nor an alias of '{target.name}', so an "
        "attack cannot put other words there: add the words that stand for it to the aliases."
    )


def name_pattern(name: str) -> re.Pattern[str]:
    """Matches a name in any case, with any spaces or hyphens in it, and its plural in s."""
    letters = r"[\W_]*".join(re.escape(letter) for letter in name if letter.isalnum())
    return re.compile(rf"(?<![^\W_]){letters}s?(?![^\W_])", re.IGNORECASE)


def check_absent(prompt: str, target: Target) -> None:
    """Raise ``ForgetError`` if the prompt of an attack names its target."""
    for subject in (target.name, *target.aliases):
        if name_pattern(subject).search(prompt):
            raise ForgetError(
                f"The attack prompt '{prompt}' names its target '{subject}', so it would test the "
                "plain prompt: change the suite's template."
            )
