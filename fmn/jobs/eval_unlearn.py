"""Forget patches as a technique of the PyPI package eval-unlearn, which finds it by entry point.

eval-unlearn 1.1.2 makes the technique from the mapping under ``technique.config`` and asks it for
pictures batch by batch (its runners/single_benchmark_runner.py). There is no base class, so nothing
of that package is imported here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image

from ..concepts.concept import parse_concept
from ..errors import ForgetError
from ..files import file_and_strength
from ..hosts.diffusers.open import open_model
from ..images import to_image
from ..methods import DEFAULT, check_preset, forget, settings_of
from ..models.sampling import Sampling
from ..patches.patch import load_patch

# The configuration file may hold anything: what to write for a field of each of these types.
EXPECTED = {
    str: "text", str | None: "text", int: "a whole number",
    int | float | None: "a number such as 7.5", list | None: "a list", dict | None: "a mapping",
}  # fmt: skip
GUIDANCE, DEMO_GUIDANCE = 7.5, 3.5
SEEDS = 2**63


@dataclass(frozen=True)
class Config:
    """What ``technique.config`` may hold. A key whose value is null counts as left out."""

    model: str = ""  # ``demo``, ``demo-dit``, a .safetensors checkpoint or a diffusers folder
    model_id: str = ""  # eval-unlearn's name for the same; give one of the two
    patches: list | None = None  # FILE or FILE:STRENGTH, all applied; []: the unpatched model
    # Words or KIND:WORDS; one patch for all is trained on the unpatched model and applied too.
    concepts: list | None = None
    method: str = DEFAULT  # a name in ``methods.PRESETS``
    settings: dict | None = None  # changes to that method's settings
    erase_concept: str = ""  # what the report says was erased; a label that trains nothing
    num_inference_steps: int = 50  # of the model's own scheduler
    guidance_scale: int | float | None = None  # default 7.5, for the demo models 3.5
    size: int = 0  # pixels a side; 0 takes the family's
    seed: int = 0  # of the first picture, if the caller gives none
    device: str | None = None  # default: a CUDA GPU if there is one, else the CPU

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.model_id):
            raise ForgetError(
                f"The config names {'two models' if self.model else 'no model'}: give model (or "
                "model_id): demo, a .safetensors checkpoint or a diffusers folder."
            )
        if self.patches is None and not self.concepts:
            raise ForgetError(
                "There is nothing to forget: give patches (files), or concepts to train one for; "
                "patches: [] samples from the unpatched model."
            )
        if self.settings and not self.concepts:
            raise ForgetError(
                "settings are for training, and there are no concepts to train: name some, or "
                "leave settings out."
            )
        check_preset(self.method)
        _check_texts("patches", self.patches)
        _check_texts("concepts", self.concepts)
        _check_seed(self.seed)


class ForgetMeNotTechnique:
    """Samples with patches applied, by the model's own scheduler as eval-unlearn's ``free_run``.

    Args:
        config: see ``Config``.

    Raises:
        ForgetError: an unknown key, a wrong value, or a model or patch that cannot be used.
    """

    def __init__(self, **options: Any):
        config = _parse(options)
        settings = settings_of(config.method, config.settings or {})
        guidance = config.guidance_scale
        self.sampling = Sampling(
            config.num_inference_steps, GUIDANCE if guidance is None else guidance, config.size
        )
        files = [file_and_strength(text) for text in config.patches or []]
        patches = [(load_patch(file), strength) for file, strength in files]
        concepts = [parse_concept(text) for text in config.concepts or []]
        try:
            torch.empty(1, device=config.device)
        except (RuntimeError, AssertionError) as error:
            raise ForgetError(
                f"The device '{config.device}' cannot be used ({str(error).splitlines()[0]}): name "
                "another, or leave it out."
            ) from error
        self.model = open_model(config.model or config.model_id, config.device)
        if guidance is None and self.model.is_demo:
            self.sampling = replace(self.sampling, guidance=DEMO_GUIDANCE)
        if concepts:
            patches.append((forget(self.model, concepts, settings), 1.0))
        self.model.add_patches(patches)
        self._next_seed = config.seed

    def generate(
        self, prompts: list[str], seed: int | None = None, **options: Any
    ) -> list[Image.Image]:
        """Sample one picture for each prompt; the i-th starts from ``seed`` + i.

        Without a seed, as eval-unlearn's command line calls, seeds continue from the config's over
        all calls: a run can be repeated, and no two of its pictures start from the same noise.

        Args:
            prompts: cut off after 77 tokens.
            options: num_inference_steps, guidance_scale and size for this call.

        Returns:
            Pictures, each of which depends on its prompt and seed alone.
        """
        sampling = self._sampling(options)
        _check_texts("prompts", prompts)
        if seed is None:
            seed = self._next_seed
            self._next_seed += len(prompts)
        _check_seed(seed)
        return [self._draw(prompt, seed + i, sampling) for i, prompt in enumerate(prompts)]

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "size": "size"}
        _check_names(options, names, "option")
        return replace(self.sampling, **{names[key]: value for key, value in options.items()})

    def _draw(self, prompt: str, seed: int, sampling: Sampling) -> Image.Image:
        noise = self.model.initial_noise([seed], sampling.size or self.model.family.resolution)
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Schedulers that add noise at each step take it from the global generator, which
            # continues where the first noise ended, as diffusers' own would.
            torch.manual_seed(seed)
            torch.randn(noise.shape)
            latents = self.model.sample_latents([prompt], noise, sampling.steps, sampling.guidance)
        return to_image(self.model.decode(latents)[0])


def _parse(options: Mapping[str, Any]) -> Config:
    """A ``Config`` of a mapping from a file, with names and types checked."""
    types: dict[str, Any] = {field.name: field.type for field in fields(Config)}
    _check_names(options, types, "key")
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        # Python counts true and false as whole numbers.
        if isinstance(value, bool) or not isinstance(value, types[name]):
            raise ForgetError(f"{name} is {value!r:.60}: write {EXPECTED[types[name]]}.")
    return Config(**given)


def _check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ForgetError(
            f"The {what} {unknown[0]!r:.60} is unknown: known are {', '.join(known)}."
        )


def _check_texts(name: str, values: Any) -> None:
    if isinstance(values, str) or not all(isinstance(value, str) for value in values or []):
        raise ForgetError(f"{name} is {values!r:.60}: write a list of texts.")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise ForgetError(f"seed is {seed}: use 0 to {SEEDS - 1}.")
