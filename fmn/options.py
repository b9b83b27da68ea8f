"""Options that several commands share: a method with its settings, and the progress bar."""

import argparse
import sys
from dataclasses import fields

from .methods import DEFAULT, PRESETS, settings_of

WITH_METHOD = ("forget", "batch")  # commands that take a method


def add_method(parser, asked):
    """``--method`` and ``--keep``, and the settings of the method ``asked`` for."""
    parser.add_argument("--method", choices=list(PRESETS), default=DEFAULT, help="(%(default)s)")
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


def given_settings(options):
    """The settings that a parsed command line asks for."""
    given = {
        name.removeprefix("set_"): value
        for name, value in vars(options).items()
        if name.startswith("set_") and value is not None
    }
    return settings_of(options.method, given)


class Bar:
    """A progress bar on standard error that is a step callback."""

    def __init__(self):
        self.bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.close()

    def __call__(self, step):
        from tqdm import tqdm

        if self.bar and self.bar.total != step.total:  # another part of the work begins
            self.bar.close()
            self.bar = None
        self.bar = self.bar or tqdm(total=step.total, unit="step")
        text = f"loss {step.losses[-1]:.4g}"
        if step.before:
            text += f", attention {step.before.share:.2%} -> {step.now.share:.2%}"
        self.bar.set_postfix_str(text)
        self.bar.update(1)


class BatchBar(Bar):
    """The same for the places of a batch: one unit a concept."""

    def __call__(self, place):
        from tqdm import tqdm

        self.bar = self.bar or tqdm(total=place.count, unit="concept")
        self.bar.set_postfix_str(f"{place.name:.40} {place.index}/{place.count}", refresh=False)
        self.bar.update(place.done - self.bar.n)
