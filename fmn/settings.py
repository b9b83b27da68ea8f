"""Settings of a method, described once: nodes, command line and checks all read the fields."""

from dataclasses import field, fields
from typing import ClassVar

from .errors import ForgetError

MAX_SEED = 2**53  # what a page's numbers hold exactly
# Settings that make words to keep count, each with what turns it on.
KEEPERS = {"preserve": "raise preserve", "general": "raise general", "protect": "turn protect on"}


def setting(default, help, low=None, high=None, step=None, choices=()):
    """A field of a settings dataclass.

    Args:
        help: what it does and what the end values mean, for tooltips and ``--help``.
        low, high: limits of a number, both allowed.
        step: what a number is a multiple of.
        choices: allowed strings.
    """
    told = {"help": help, "low": low, "high": high, "step": step, "choices": tuple(choices)}
    return field(default=default, metadata=told)


def steps(default):
    help = "Training steps for each concept. More forget more, and harm neighbours."
    return setting(default, help, low=1, high=100_000)


def lr(default, help):
    return setting(default, help, low=1e-8, high=1.0)


def rank(default=4):
    return setting(
        default,
        "Rank of the patch: how many directions each layer may change. The file grows with it.",
        low=1,
        high=128,
    )


def full_weights():
    return setting(
        False,
        "On: train whole weight matrices, as released, and cut them to the rank when done; needs "
        "far more memory. Off: train the low rank itself.",
    )


def size():
    return setting(
        0,
        "Pixels a side while training. 0: what the model was made for. Smaller is faster and "
        "needs less memory.",
        low=0,
        high=4096,
        step=64,
    )


def checkpointing():
    return setting(False, "On: save memory by computing some things twice, which takes longer.")


def seed():
    return setting(0, "The same seed and settings give the same patch.", low=0, high=MAX_SEED)


class Settings:
    """Base of the settings dataclasses: checks every field when one is made.

    A method derives its own with ``class Settings(Base, method=NAME)``: the name that
    patches, resume files and recipes hold.
    """

    method = ""
    trains: ClassVar[bool] = False  # whether these settings train in steps that can be resumed

    def __init_subclass__(cls, method: str = "", **more):
        super().__init_subclass__(**more)
        cls.method = method or cls.method

    def __post_init__(self):
        for each in fields(self):
            check(each, getattr(self, each.name))

    @property
    def keep_needs(self):
        """What to change so that words to keep make a difference, "" if they do."""
        ways = [name for name in KEEPERS if hasattr(self, name)]
        if any(getattr(self, name) for name in ways) or (not ways and hasattr(self, "keep_list")):
            return ""
        return " or ".join(KEEPERS[name] for name in ways) or "use another method"


def check_limits(settings, limits):
    """Raise a ``ForgetError`` unless each field named in ``limits`` is within its (low, high)."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ForgetError(f"{name} is {value}: use {low} to {high}.")


def check(described, value):
    """Raise a ``ForgetError`` unless the value suits the field."""
    name, told, kind = described.name, described.metadata, type(described.default)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits and not (kind is float and type(value) is int):
        raise ForgetError(f"{name} is {value!r:.60}: it has to be like {described.default!r}.")
    if told["choices"] and value not in told["choices"]:
        raise ForgetError(f"{name} is '{value:.60}': choose one of {', '.join(told['choices'])}.")
    low, high, step = told["low"], told["high"], told["step"]
    if low is not None and not low <= value <= high:
        raise ForgetError(f"{name} is {value}: use {low:g} to {high:g}.")
    if step and kind is int and value % step:
        raise ForgetError(f"{name} is {value}: use a multiple of {step}.")


HOW = ("concatenate", "joint")
PRESERVE = 10.0  # of joint merging: weight of kept prompts
