"""Ways to forget. One file here is one method; ``METHODS`` lists them, a line each.

A method's module has:

- ``TITLE`` and ``ABOUT``: its name in menus, and a sentence on what it does;
- ``REVISION``: a whole number from 1, raised whenever the method's patches change at equal
  settings; batches and ConceptBench then make their results anew;
- ``Settings``: a frozen dataclass over ``fmn.settings.Settings``;
- ``PRESETS``: name -> ``Settings``, the first being the defaults;
- ``run(model, concepts, settings, on_step, keep)``, which returns a ``ForgetPatch``;
  ``patches.task.method_run`` makes it of a function of a ``Task``;
- ``ANY_MODEL = True`` if it works on models that are none of ``families.FAMILIES``, or
  ``TRANSFORMERS = True`` if it works on those of ``transformers.TRANSFORMERS``.

A method that trains has ``trains = True`` in its ``Settings``, and its ``run`` takes the
``TrainingOptions`` after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ..errors import ForgetError
from ..progress import OnStep, ignore
from ..settings import Settings

if TYPE_CHECKING:
    from ..concepts.concept import Concept
    from ..models.families import Family
    from ..models.interface import Model, UNetModel
    from ..patches.patch import ForgetPatch
    from ..training.run import TrainingOptions

# module -> its presets, the defaults first
METHODS = {
    "reread": ("reread", "reread-quick", "reread-auto", "reread-robust"),
    "reread_text": ("reread-many",),
    "resteer": ("resteer", "resteer-released"),
    "esd": ("esd", "esd-u", "esd-paper", "esd-2025"),
    "ablation": ("ablation", "ablation-released"),
    "uce": ("uce", "uce-2023"),
    "rece": ("rece", "rece-object", "rece-style", "rece-nudity"),
    "speed": ("speed", "speed-many"),
    "double_projections": ("double-projections", "double-projections-published"),
    "trce": ("trce", "trce-released"),
    "oce": (
        "oce", "oce-paper", "oce-style", "oce-nudity", "oce-celebrities", "oce-reflection",
        "oce-projection",
    ),
    "casteer": ("casteer", "casteer-reflection"),
    "quickfix": ("quickfix", "quickfix-2024"),
    "hirm": ("hirm", "hirm-r", "hirm-s"),
}  # fmt: skip
PRESETS = {preset: name for name, presets in METHODS.items() for preset in presets}
DEFAULT = "reread"  # docs/methods/README.md says why
MANY, DEFAULT_MANY = 4, "reread-many"  # the default for more concepts than MANY in one patch


def check_preset(name: str) -> None:
    """Raise a ``ForgetError`` unless it is one of ``PRESETS``."""
    if name not in PRESETS:
        close = get_close_matches(name.lower(), PRESETS, 3)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ForgetError(
            f"There is no method '{name:.60}': {meant}'python -m fmn methods' lists all of them."
        )


def method(preset: str) -> ModuleType:
    """The module of a preset."""
    return import_module(f".{PRESETS[preset]}", __package__)


def revision(preset: str) -> int:
    """The revision of a preset's method: what is stored of an older one is out of date."""
    return method(preset).REVISION


def settings_of(preset: str, changes: dict[str, Any]) -> Settings:
    """A preset's settings with some changed.

    Args:
        changes: field, or its former name -> plain value.

    Raises:
        ForgetError: no such field, or a value it cannot have.
    """
    settings = method(preset).PRESETS[preset]
    known = [field.name for field in fields(settings)]
    current = settings.current(changes)
    for name in current:
        if name not in known:
            raise ForgetError(f"{preset} has no setting '{name}': use {', '.join(known)}.")
    if len(current) < len(changes):
        raise ForgetError(
            f"{', '.join(changes)} name a setting twice, by its name and its former one: give one."
        )
    return replace(settings, **current)


def default_settings(concepts: Sequence[Concept], unet: bool) -> Settings:
    """The settings for one patch of these concepts if no method is chosen.

    Args:
        unet: the model is one; on others DEFAULT_MANY does not work.
    """
    return settings_of(DEFAULT_MANY if unet and len(concepts) > MANY else DEFAULT, {})


def preset_of(settings: Settings) -> str:
    """The preset with these settings, or the first one of their method."""
    name = settings.method
    presets = method(METHODS[name][0]).PRESETS
    return next((preset for preset, own in presets.items() if own == settings), METHODS[name][0])


def forget(
    model: Model,
    concepts: Sequence[Concept],
    settings: Settings,
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
    options: TrainingOptions | None = None,
) -> ForgetPatch:
    """Make a patch with the method that the settings belong to.

    Args:
        model: it comes back unchanged, also after an error.
        on_step: called after each step, and may raise to cancel.
        keep: words or prompts to protect, for the methods that can.
        options: for methods that train. Those that solve make no use of them; they refuse to
            resume.

    Raises:
        ForgetError: bad input. NonFiniteLoss: training diverged; it carries the last good patch.
    """
    # Not at import, which loads no torch.
    from ..models.module_patching import autograd
    from ..patches.task import Task
    from ..training.run import TrainingOptions

    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    module, options = method(preset_of(settings)), options or TrainingOptions()
    check_keep(settings, keep)
    if options.resume and not settings.trains:
        raise ForgetError(
            f"{preset_of(settings)} solves and does not train, so it cannot resume "
            f"'{options.resume.name}': use the method and settings that it was saved with."
        )
    if options.resume:
        task = Task(cast("UNetModel", model), concepts, settings)
        options.resume.check(task.record(), settings.current)
    check_family(model.family, preset_of(settings))
    with autograd():
        more = (options,) if settings.trains else ()
        return module.run(model, concepts, settings, on_step, keep, *more)


def check_family(family: Family, preset: str) -> None:
    """Raise a ``ForgetError`` unless the method works on models of the family."""
    module = method(preset)
    follows_text = getattr(family, "entry", None) is not None
    if (
        family.known
        or getattr(module, "ANY_MODEL", False)
        or (follows_text and getattr(module, "TRANSFORMERS", False))
    ):
        return
    raise ForgetError(
        f"{module.TITLE} works on the cross-attention of Stable Diffusion 1.x, 2.x and XL, and "
        f"{family.title} is none of them: use the method {'Re-read' if follows_text else 'ESD'}."
    )


def check_keep(settings: Settings, keep: Sequence[str]) -> None:
    """Raise a ``ForgetError`` for words to keep that the method would ignore."""
    if keep and settings.keep_needs:
        title = method(preset_of(settings)).TITLE
        raise ForgetError(
            f"{title} would ignore the words to keep: {settings.keep_needs}, or leave them out."
        )
