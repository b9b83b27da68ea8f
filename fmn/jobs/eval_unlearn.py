"""Forget patches as a technique of the PyPI package eval-unlearn, which finds it by entry point.

eval-unlearn 1.1.2 makes the technique from the mapping under ``technique.config`` and asks it for
pictures batch by batch (its runners/single_benchmark_runner.py). There is no base class, so nothing
of that package is imported here.
"""

from dataclasses import dataclass, fields, replace

import torch

from .. import methods
from ..concepts.concept import parse_concept
from ..errors import ForgetError
from ..files import file_and_strength
from ..hosts.diffusers.model import DiffusersModel
from ..images import to_image
from ..models.families import DEMO
from ..models.sampling import Sampling
from ..patches.patch import load_patch

# A file's mapping may hold anything: what to write where a field has one of these types.
WORDS = {
    str: "text", str | None: "text", int: "a whole number",
    int | float | None: "a number such as 7.5", list | None: "a list", dict | None: "a mapping",
}  # fmt: skip
GUIDANCE, DEMO_GUIDANCE = 7.5, 3.5
SEEDS = 2**63


@dataclass(frozen=True)
class Config:
    """What ``technique.config`` may hold. A key whose value is null counts as left out.

    Attributes:
        model: ``demo``, a .safetensors checkpoint or a diffusers folder.
        model_id: eval-unlearn's name for the same; give one of the two.
        patches: FILE or FILE:STRENGTH, each put on the model; [] draws with the untouched model.
        concepts: words or KIND:WORDS; one patch that forgets all of them is trained on the
            untouched model, and put on beside ``patches``.
        method: how, a name in ``methods.PRESETS``.
        settings: changes to that method's settings.
        erase_concept: what the report says was erased. A label: it trains nothing.
        num_inference_steps: of the model's own scheduler.
        guidance_scale: of classifier-free guidance; left out: 7.5, for the demo model 3.5.
        size: pixels a side; 0 takes the family's.
        seed: of the first picture, where the caller gives none.
        device: left out: a CUDA GPU if there is one, else the CPU.
    """

    model: str = ""
    model_id: str = ""
    patches: list | None = None
    concepts: list | None = None
    method: str = methods.DEFAULT
    settings: dict | None = None
    erase_concept: str = ""
    num_inference_steps: int = 50
    guidance_scale: int | float | None = None
    size: int = 0
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        if bool(self.model) == bool(self.model_id):
            raise ForgetError(
                f"The config names {'two models' if self.model else 'no model'}: give model (or "
                "model_id): demo, a .safetensors checkpoint or a diffusers folder."
            )
        if self.patches is None and not self.concepts:
            raise ForgetError(
                "There is nothing to forget: give patches (files), or concepts to train one for; "
                "patches: [] draws with the untouched model."
            )
        if self.settings and not self.concepts:
            raise ForgetError(
                "settings are for training, and there are no concepts to train: name some, or "
                "leave settings out."
            )
        if self.method not in methods.PRESETS:
            raise ForgetError(
                f"There is no method '{self.method}': use {', '.join(methods.PRESETS)}."
            )
        _check_texts("patches", self.patches)
        _check_texts("concepts", self.concepts)
        _check_seed(self.seed)


class ForgetMeNotTechnique:
    """Draws with patches on. The model's own scheduler draws, as in eval-unlearn's ``free_run``.

    Args:
        config: see ``Config``.

    Raises:
        ForgetError: an unknown key, a wrong value, or a model or patch that cannot be used.
    """

    def __init__(self, **config):
        config = _read(config)
        settings = methods.settings_of(config.method, config.settings or {})
        guidance = config.guidance_scale
        self.sampling = Sampling(
            config.num_inference_steps, GUIDANCE if guidance is None else guidance, config.size
        )
        named = [file_and_strength(text) for text in config.patches or []]
        patches = [(load_patch(file), strength) for file, strength in named]
        concepts = [parse_concept(text) for text in config.concepts or []]
        _check_device(config.device)
        self.model = DiffusersModel.load(config.model or config.model_id, config.device)
        if guidance is None and self.model.family is DEMO:
            self.sampling = replace(self.sampling, guidance=DEMO_GUIDANCE)
        if concepts:
            patches.append((methods.forget(self.model, concepts, settings), 1.0))
        self.model.merged(patches)
        self._next_seed = config.seed

    def generate(self, prompts, seed=None, **options):
        """Draw pictures, one a prompt; the i-th starts from ``seed`` + i.

        Without a seed, as eval-unlearn's command line calls, seeds count on from the config's over
        all calls: a run can be repeated, and no two of its pictures start from the same noise.

        Args:
            prompts: list of texts; what goes beyond 77 tokens is cut off.
            options: num_inference_steps, guidance_scale and size for this call.

        Returns:
            List of PIL pictures. Each depends on its prompt and seed alone, not on the others.
        """
        sampling = self._sampling(options)
        _check_texts("prompts", prompts)
        if seed is None:
            seed = self._next_seed
            self._next_seed += len(prompts)
        _check_seed(seed)
        return [self._draw(prompt, seed + i, sampling) for i, prompt in enumerate(prompts)]

    def _sampling(self, options):
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "size": "size"}
        _check_names(options, names, "option")
        return replace(self.sampling, **{names[key]: value for key, value in options.items()})

    def _draw(self, prompt, seed, sampling):
        noise = self.model.initial_noise([seed], sampling.size or self.model.family.resolution)
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Schedulers that add noise on the way take it from the global generator. It goes on
            # where the first noise ended, as diffusers' own would.
            torch.manual_seed(seed)
            torch.randn(noise.shape)
            latents = self.model.sample_latents([prompt], noise, sampling.steps, sampling.guidance)
        return to_image(self.model.decode(latents)[0])


def _read(config):
    """A ``Config`` of a mapping from a file, with names and types checked."""
    types = {field.name: field.type for field in fields(Config)}
    _check_names(config, types, "key")
    given = {name: value for name, value in config.items() if value is not None}
    for name, value in given.items():
        # Python counts true and false as whole numbers.
        if isinstance(value, bool) or not isinstance(value, types[name]):
            raise ForgetError(f"{name} is {value!r:.60}: write {WORDS[types[name]]}.")
    return Config(**given)


def _check_names(given, known, what):
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ForgetError(
            f"The {what} {unknown[0]!r:.60} is unknown: known are {', '.join(known)}."
        )


def _check_texts(name, values):
    if isinstance(values, str) or not all(isinstance(value, str) for value in values or []):
        raise ForgetError(f"{name} is {values!r:.60}: write a list of texts.")


def _check_seed(seed):
    if not 0 <= seed < SEEDS:
        raise ForgetError(f"seed is {seed}: use 0 to {SEEDS - 1}.")


def _check_device(device):
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ForgetError(
            f"The device '{device}' cannot be used ({reason}): name another, or leave it out."
        ) from error
