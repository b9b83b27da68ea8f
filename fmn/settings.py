"""Settings of a method, described once: nodes, command line and checks all read the fields."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from .errors import ForgetError

Value = bool | int | float | str  # of a setting

MAX_SEED = 2**53  # what a page's numbers hold exactly
# Settings that make words to keep count, each with what turns it on.
KEEPERS = {"preserve": "raise preserve", "general": "raise general", "protect": "turn protect on"}


def setting(
    default: Value,
    help: str,
    limits: tuple[float, ...] = (),
    choices: Iterable[str] = (),
    advanced: bool = False,
    group: str = "",
    formerly: str = "",
) -> Any:
    """A field of a settings dataclass.

    Args:
        help: what it does and what the end values mean, for tooltips and ``--help``.
        limits: the least and the largest number, both allowed, and what it is a multiple of, if
            anything.
        choices: allowed strings.
        advanced: see ``advanced``.
        group: name of the settings that belong together, "" for none.
        formerly: the name it had in version 0.1, which files, workflows and commands may hold.
            ``Settings.current`` translates it.
    """
    low, high, step = (*limits, None, None, None)[:3]
    described = {
        "help": help, "low": low, "high": high, "step": step, "choices": tuple(choices),
        "advanced": advanced, "group": group, "formerly": formerly,
    }  # fmt: skip
    return field(default=default, metadata=described)


def advanced(default: Value, help: str, **more: Any) -> Any:
    """A ``setting`` that nodes hide until asked for all of them."""
    return setting(default, help, advanced=True, **more)


@dataclass(frozen=True)
class Settings:
    """Base of the settings dataclasses: checks every field when one is made.

    A method derives its own with ``class Settings(Base, method=NAME)``: the name that
    patches, resume files and recipes hold.
    """

    method = ""
    trains: ClassVar[bool] = False  # whether these settings train in steps that can be resumed

    def __init_subclass__(cls, method: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.method = method or cls.method

    def __post_init__(self) -> None:
        for described in fields(self):
            check(described, getattr(self, described.name))

    @classmethod
    def current(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same values, with those under a former name of a setting under its name of today."""
        described = [field for field in fields(cls) if field.metadata["formerly"]]
        renamed = {field.metadata["formerly"]: field.name for field in described}
        return {renamed.get(name, name): value for name, value in values.items()}

    @property
    def keep_needs(self) -> str:
        """What to change so that words to keep make a difference, "" if they do."""
        ways = [name for name in KEEPERS if hasattr(self, name)]
        if any(getattr(self, name) for name in ways) or (not ways and hasattr(self, "keep_list")):
            return ""
        return " or ".join(KEEPERS[name] for name in ways) or "use another method"


def check_limits(settings: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise a ``ForgetError`` unless each field named in ``limits`` is within its (low, high)."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ForgetError(f"{name} is {value}: use {low} to {high}.")


def check(described: Field, value: Any) -> None:
    """Raise a ``ForgetError`` unless the value suits the field."""
    name, limits, kind = described.name, described.metadata, type(described.default)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits and not (kind is float and type(value) is int):
        raise ForgetError(f"{name} is {value!r:.60}: it has to be like {described.default!r}.")
    if limits["choices"] and value not in limits["choices"]:
        raise ForgetError(f"{name} is '{value:.60}': choose one of {', '.join(limits['choices'])}.")
    low, high, step = limits["low"], limits["high"], limits["step"]
    if low is not None and not low <= value <= high:
        raise ForgetError(f"{name} is {value}: use {low:g} to {high:g}.")
    if step and kind is int and value % step:
        raise ForgetError(f"{name} is {value}: use a multiple of {step}.")


HOW = ("concatenate", "joint")
PRESERVE = 2.0  # of joint merging: weight of kept prompts
