"""Options that several commands share, such as a method with its settings, and those that do not
fit."""

import argparse
from dataclasses import fields
from difflib import get_close_matches

from ..errors import ForgetError
from ..methods import DEFAULT, check_keep, check_preset, default_settings, settings_of

WITH_METHOD = ("forget", "batch")  # commands that take a method


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a ``ForgetError`` instead of printing its usage. Names of options
    are not to be shortened, for the method's settings depend on the one that is spelled out."""

    def __init__(self, **options):
        super().__init__(**({"allow_abbrev": False} | options))

    def error(self, message):
        raise ForgetError(f"{message}: see {self.prog} --help.")


def add_method(parser, asked):
    """``--method`` and ``--keep``, and the settings of the method ``asked`` for."""
    parser.add_argument(
        "--method", type=_preset, metavar="NAME",
        help=f"one of those that 'python -m fmn methods' lists ({DEFAULT})",
    )  # fmt: skip
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="WORDS",
        help="words or a prompt that shall not change; several times if you like",
    )
    if asked:
        add_settings(parser.add_argument_group(f"settings of {asked}"), settings_of(asked, {}))


def _preset(name):
    check_preset(name)
    return name


def asked_method(arguments):
    """The method of a command line, whose settings become options; None if it takes none."""
    if arguments[:1] not in [[command] for command in WITH_METHOD]:
        return None
    parser = Parser(add_help=False, prog=f"python -m fmn {arguments[0]}")
    parser.add_argument("--method", type=_preset, default=DEFAULT)
    return parser.parse_known_args(arguments)[0].method


def add_settings(parser, defaults):
    """Each field of a ``settings.Settings`` as an option, such as ``--steps 100`` or
    ``--no-full-weights``."""
    for each in fields(defaults):
        option, default = f"--{each.name.replace('_', '-')}", getattr(defaults, each.name)
        told = each.metadata
        limits = "" if told["low"] is None else f"; {told['low']:g} to {told['high']:g}"
        help = f"{told['help']} ({default}{limits})".replace("%", "%%")
        how = {"dest": f"set_{each.name}"}
        if isinstance(default, bool):
            how |= {"action": argparse.BooleanOptionalAction}
        elif told["choices"]:
            how |= {"choices": told["choices"]}
        else:
            how |= {"type": type(default), "metavar": "N" if isinstance(default, int) else "X"}
        parser.add_argument(option, help=help, **how)
        if told["formerly"]:
            formerly = f"--{told['formerly'].replace('_', '-')}"
            parser.add_argument(formerly, help=argparse.SUPPRESS, **how)


def given_options(options):
    """What ``add_settings`` added and the command line gives: field -> value."""
    return {
        name.removeprefix("set_"): value
        for name, value in vars(options).items()
        if name.startswith("set_") and value is not None
    }


def given_settings(options, concepts=()):
    """The settings that a parsed command line asks for.

    Args:
        concepts: what goes into one patch, which decides if neither method nor settings are given.
    """
    given = given_options(options)
    if options.method is None and not given:
        settings = default_settings(concepts)
    else:
        settings = settings_of(options.method or DEFAULT, given)
    check_keep(settings, options.keep)
    return settings


def refuse_unknown(options, unknown):
    """Say which of the arguments that were left over does not fit.

    Args:
        options: what could be read. unknown: the words that were left.
    """
    command = f"python -m fmn {options.command}"
    word = next((word for word in unknown if word.startswith("--")), None)
    if word is None:
        raise ForgetError(f"'{unknown[0]:.80}' is one argument too many: see {command} --help.")
    name = word.partition("=")[0].removeprefix("--")
    known = [each.removeprefix("set_").replace("_", "-") for each in vars(options)]
    close = get_close_matches(name, known, 1)
    meant = f"did you mean --{close[0]}? See" if close else "see"
    if options.command in WITH_METHOD:
        method = options.method or DEFAULT
        what, command = f"{method} has no setting", f"{command} --method {method}"
    else:
        what = f"{options.command} has no option"
    raise ForgetError(f"{what} '{name:.80}': {meant} {command} --help.")
