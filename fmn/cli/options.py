"""Options that several commands share, and errors about those that do not fit."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..concepts.concept import KINDS, Concept
from ..errors import ForgetError
from ..methods import DEFAULT, check_keep, check_preset, default_settings, settings_of
from ..settings import Settings, Value

if TYPE_CHECKING:  # loads torch, which --help does not need
    from ..hosts.diffusers.model import DiffusersModel
    from ..hosts.diffusers.transformer import DiffusersTransformer

WITH_METHOD = ("forget", "batch")  # commands that take a method
MODEL = "demo, demo-dit, a checkpoint such as a .safetensors file, or a diffusers folder"
PREDICTIONS = "epsilon", "v_prediction"
Commands = argparse._SubParsersAction  # argparse has no public name for it


class Parser(argparse.ArgumentParser):
    """Raises a ``ForgetError`` instead of printing its usage. Option names cannot be shortened,
    as the method's settings depend on the complete ``--method``."""

    def __init__(self, **options: Any):
        super().__init__(**({"allow_abbrev": False} | options))

    def error(self, message: str) -> NoReturn:
        raise ForgetError(f"{message}: see {self.prog} --help.")


def add_command(
    commands: Commands, name: str, run: Callable, about: str, **more: Any
) -> argparse.ArgumentParser:
    """A command's parser; its ``run`` gets the options and returns (data, text), in a batch also
    whether some of it failed. ``about`` is its help and, unless given, its description."""
    options = {"help": about, "description": f"{about[0].upper()}{about[1:]}."} | more
    parser = commands.add_parser(name, **options)
    parser.set_defaults(run=run)
    return parser


def add_out(parser: argparse.ArgumentParser, folder: str) -> None:
    """``--out`` of a command that writes into a folder."""
    parser.add_argument(
        "--out", type=Path, default=Path(folder), metavar="FOLDER", help="(%(default)s)"
    )


def add_repeated(parser: argparse._ActionsContainer, name: str, help: str, **more: Any) -> None:
    """An option that may be given several times."""
    help = f"{help}; may be repeated"
    parser.add_argument(name, action="append", help=help, **({"default": []} | more))


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """``--vae`` and ``--prediction``; see ``load_model``."""
    parser.add_argument(
        "--vae", type=Path, metavar="FILE",
        help="a VAE's file or folder, for models without one (the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--prediction", choices=PREDICTIONS,
        help="what the model was trained to predict (what the model's file says)",
    )  # fmt: skip


def add_executor(parser: argparse.ArgumentParser, workers: int) -> None:
    """``--workers`` and ``--ray``; see ``jobs.executors.open_executor``."""
    parser.add_argument(
        "--workers", type=int, default=workers, metavar="N",
        help="tasks at the same time, with --ray on each machine, up to 256; more than 1 have "
        "processes with a model each; 0: one a core, at most 4 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--ray", metavar="ADDRESS", help="use a Ray cluster: HOST:PORT or auto")


def load_model(options: argparse.Namespace) -> "DiffusersModel | DiffusersTransformer":
    """The model of a command line."""
    from ..hosts.diffusers.open import open_model

    return open_model(options.model, vae=options.vae, prediction=options.prediction)


def add_keep(parser: argparse._ActionsContainer, **more: Any) -> None:
    """``--keep``."""
    add_repeated(
        parser, "--keep", "words or a prompt that must not change", metavar="WORDS", **more
    )


def add_kind(parser: argparse.ArgumentParser) -> None:
    """``--kind``."""
    parser.add_argument(
        "--kind", choices=KINDS, default="object", help="for concepts that name none (%(default)s)"
    )


def add_method(parser: argparse.ArgumentParser, asked: str | None) -> None:
    """``--method`` and ``--keep``, and the settings of the method ``asked`` for."""
    parser.add_argument(
        "--method", type=_preset, metavar="NAME",
        help=f"one of those that 'python -m fmn methods' lists ({DEFAULT})",
    )  # fmt: skip
    add_keep(parser)
    if asked:
        groups: dict[str, argparse._ArgumentGroup] = {}
        defaults = settings_of(asked, {})
        for described in fields(defaults):
            name = described.metadata["group"] or "advanced" * described.metadata["advanced"]
            title = f"{name} settings of {asked}".strip()
            group = groups.get(title) or parser.add_argument_group(title)
            groups[title] = group
            add_setting(group, described, getattr(defaults, described.name))


def _preset(name: str) -> str:
    check_preset(name)
    return name


def asked_method(arguments: Sequence[str]) -> str | None:
    """The method of a command line, whose settings become options; None if it takes none."""
    if not arguments or arguments[0] not in WITH_METHOD:
        return None
    parser = Parser(add_help=False, prog=f"python -m fmn {arguments[0]}")
    parser.add_argument("--method", type=_preset, default=DEFAULT)
    return parser.parse_known_args(arguments)[0].method


def add_settings(parser: argparse._ActionsContainer, defaults: Settings) -> None:
    """Each field of a ``settings.Settings`` as an option; see ``add_setting``."""
    for described in fields(defaults):
        add_setting(parser, described, getattr(defaults, described.name))


def add_setting(parser: argparse._ActionsContainer, described: Field, default: Value) -> None:
    """A field as an option, such as ``--steps 100`` or ``--no-full-weights``."""
    limits = described.metadata
    between = "" if limits["low"] is None else f"; {limits['low']:g} to {limits['high']:g}"
    help = f"{limits['help']} ({default}{between})".replace("%", "%%")
    how: dict[str, Any] = {"dest": f"set_{described.name}"}
    if isinstance(default, bool):
        how |= {"action": argparse.BooleanOptionalAction}
    elif limits["choices"]:
        how |= {"choices": limits["choices"]}
    else:
        how |= {"type": type(default), "metavar": "N" if isinstance(default, int) else "X"}
    parser.add_argument(f"--{described.name.replace('_', '-')}", help=help, **how)
    if former := limits["formerly"]:
        parser.add_argument(f"--{former.replace('_', '-')}", help=argparse.SUPPRESS, **how)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_settings`` that the command line gives: field -> value."""
    return {
        name.removeprefix("set_"): value
        for name, value in vars(options).items()
        if name.startswith("set_") and value is not None
    }


def given_settings(options: argparse.Namespace, concepts: Sequence[Concept] = ()) -> Settings:
    """The settings that a parsed command line asks for.

    Args:
        concepts: of one patch; they decide if neither a method nor a setting is given.
    """
    given = given_options(options)
    if options.method is None and not given:
        settings = default_settings(concepts, unet=options.model != "demo-dit")
    else:
        settings = settings_of(options.method or DEFAULT, given)
    check_keep(settings, options.keep)
    return settings


def refuse_unknown(options: argparse.Namespace, unknown: Sequence[str]) -> NoReturn:
    """Explain which of the ``unknown`` words, left over by the parser, does not fit."""
    command = f"python -m fmn {options.command}"
    word = next((word for word in unknown if word.startswith("--")), None)
    if word is None:
        raise ForgetError(f"'{unknown[0]:.80}' is one argument too many: see {command} --help.")
    name = word.partition("=")[0].removeprefix("--")
    known = [each.removeprefix("set_").replace("_", "-") for each in vars(options)]
    close = get_close_matches(name, known, 1)
    meant = f"did you mean --{close[0]}? See" if close else "see"
    owner, what = options.command, "option"
    if options.command in WITH_METHOD:
        owner, what = options.method or DEFAULT, "setting"
        command += f" --method {owner}"
    raise ForgetError(f"{owner} has no {what} '{name:.80}': {meant} {command} --help.")
