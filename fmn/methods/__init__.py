"""Ways to forget, by the names that the command line and the bench use."""

from dataclasses import fields, replace
from importlib import import_module

from ..errors import ForgetError

# name -> module here, and what in it holds the settings to start from
PRESETS = {"resteer": ("resteer", "DEFAULT"), "resteer-released": ("resteer", "RELEASED")}


def method(name):
    """The module of a preset: it has ``run(model, concepts, settings, on_step)``."""
    return import_module(f".{PRESETS[name][0]}", __package__)


def settings_of(name, changes):
    """A preset's settings with some changed.

    Args:
        changes: field -> plain value.

    Raises:
        ForgetError: no such field, or a value it cannot have.
    """
    settings = getattr(method(name), PRESETS[name][1])
    known = {field.name: type(getattr(settings, field.name)) for field in fields(settings)}
    for field, value in changes.items():
        if field not in known:
            raise ForgetError(f"{name} has no setting '{field}': use {', '.join(known)}.")
        wanted = known[field]
        fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
        if not fits and not (wanted is float and type(value) is int):
            raise ForgetError(
                f"Setting '{field}' of {name} is {value!r}: it has to be like "
                f"{getattr(settings, field)!r}."
            )
    return replace(settings, **changes)


def preset_of(settings):
    """The preset that these settings started from, or the first of their method."""
    module = type(settings).__module__.rpartition(".")[2]
    own = [name for name, (where, _) in PRESETS.items() if where == module]
    same = [name for name in own if getattr(method(name), PRESETS[name][1]) == settings]
    return (same or own)[0]
