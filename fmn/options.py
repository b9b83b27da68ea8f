"""Options that several commands share: a method with its settings."""

import argparse
import sys
from dataclasses import fields

from .methods import DEFAULT, PRESETS, default_settings, settings_of

WITH_METHOD = ("forget", "batch")  # commands that take a method


def add_method(parser, asked):
    """``--method`` and ``--keep``, and the settings of the method ``asked`` for."""
    parser.add_argument("--method", choices=list(PRESETS), help=f"({DEFAULT})")
    parser.add_argument(
        "--keep", action="append", default=[], help="words or a prompt that shall not change"
    )
    if asked:
        _add_settings(parser, asked)


def asked_method(arguments):
    """The method of a command line, whose settings become options; None if it takes none."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] not in [[command] for command in WITH_METHOD]:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=DEFAULT)
    asked = parser.parse_known_args(arguments)[0].method
    return asked if asked in PRESETS else None


def _add_settings(parser, preset):
    """Each setting of a method as an option, such as ``--steps 100`` or ``--no-full-weights``."""
    group = parser.add_argument_group(f"settings of {preset}")
    defaults = settings_of(preset, {})
    for each in fields(defaults):
        option, default = f"--{each.name.replace('_', '-')}", getattr(defaults, each.name)
        how = {"dest": f"set_{each.name}", "help": f"{each.metadata['help']} ({default})"}
        how["help"] = how["help"].replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, **how)
        elif each.metadata["choices"]:
            group.add_argument(option, choices=each.metadata["choices"], **how)
        else:
            group.add_argument(option, type=type(default), metavar="X", **how)


def given_settings(options, concepts=()):
    """The settings that a parsed command line asks for.

    Args:
        concepts: what goes into one patch, which decides if neither method nor settings are given.
    """
    given = {
        name.removeprefix("set_"): value
        for name, value in vars(options).items()
        if name.startswith("set_") and value is not None
    }
    if options.method is None and not given:
        return default_settings(concepts)
    return settings_of(options.method or DEFAULT, given)
