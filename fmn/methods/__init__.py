"""Ways to forget. One file here is one method; ``METHODS`` lists them, a line each.

A method's module has:

- ``TITLE`` and ``ABOUT``: its name in menus, and a sentence on what it does;
- ``Settings``: a frozen dataclass over ``fmn.settings.Settings``;
- ``PRESETS``: name -> ``Settings``, the first being the defaults;
- ``run(model, concepts, settings, on_step, keep)``, which returns a ``ForgetPatch``;
- ``ANY_MODEL = True`` if it works on models that are none of ``families.FAMILIES``.
"""

from dataclasses import fields, replace
from difflib import get_close_matches
from importlib import import_module

from ..errors import ForgetError
from ..training.run import Supervisor

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
        "oce", "oce-style", "oce-nudity", "oce-celebrities", "oce-reflection", "oce-projection",
    ),
    "casteer": ("casteer", "casteer-reflection"),
    "quickfix": ("quickfix", "quickfix-2024"),
    "hirm": ("hirm", "hirm-r", "hirm-s"),
}  # fmt: skip
PRESETS = {preset: name for name, presets in METHODS.items() for preset in presets}
DEFAULT = "reread"  # for somebody who picks nothing; docs/methods/README.md says why
MANY, DEFAULT_MANY = 4, "reread-many"  # the same for more concepts than MANY in one patch


def check_preset(name):
    """Refuse what is none of ``PRESETS``."""
    if name not in PRESETS:
        close = get_close_matches(name.lower(), PRESETS, 3)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ForgetError(
            f"There is no method '{name:.60}': {meant}'python -m fmn methods' lists all of them."
        )


def method(preset):
    """The module of a preset."""
    return import_module(f".{PRESETS[preset]}", __package__)


def settings_of(preset, changes):
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


def default_settings(concepts):
    """What is used for one patch of these concepts if nothing is picked."""
    return settings_of(DEFAULT if len(concepts) <= MANY else DEFAULT_MANY, {})


def preset_of(settings):
    """The preset that these settings are, or the defaults' name of their method."""
    name = settings.method
    presets = method(METHODS[name][0]).PRESETS
    return next((preset for preset, own in presets.items() if own == settings), METHODS[name][0])


def forget(model, concepts, settings, on_step=lambda step: None, keep=()):
    """Make a patch with the method that the settings belong to.

    Args:
        model: a ``Model``; it comes back unchanged, also after an error.
        concepts: list of ``Concept``.
        on_step: gets a ``train.Step`` after each step, and may raise to cancel. A
            ``Supervisor`` can also resume a run and have its best step kept, in methods that train.
        keep: words or prompts to protect, for the methods that can.

    Raises:
        ForgetError: bad input. NonFiniteLoss: training blew up; it carries the last good patch.
    """
    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    module = method(preset_of(settings))
    check_keep(settings, keep)
    _check_resumed(model, concepts, settings, on_step)
    if not model.family.known and not getattr(module, "ANY_MODEL", False):
        raise ForgetError(
            f"{module.TITLE} works on the cross-attention of Stable Diffusion 1.x, 2.x and XL, and "
            f"{model.family.title} is none of them: use the method ESD."
        )
    return module.run(model, concepts, settings, on_step, keep)


def check_keep(settings, keep):
    """Refuse words to keep where nothing would look at them."""
    if keep and settings.keep_needs:
        title = method(preset_of(settings)).TITLE
        raise ForgetError(
            f"{title} would not look at the words to keep: {settings.keep_needs}, or leave them "
            "out."
        )


def _check_resumed(model, concepts, settings, on_step):
    """Refuse to go on with another training, before any work is done."""
    begun = on_step.resume if isinstance(on_step, Supervisor) else None
    if begun:
        from ..training.resume import record_of  # not at import, which is to stay light

        # Methods that solve have no state that could match.
        begun.check(record_of(model, model.fingerprint(), settings, concepts), settings.current)
