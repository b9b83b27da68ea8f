"""The command line: ``python -m fmn``."""

import argparse
import json
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ForgetError, NonFiniteLoss, memory_ran_out
from ..text import printable
from .apply import add_apply
from .batch import add_batch, add_merge
from .bench import add_bench, run_bench
from .forget import add_forget
from .import_eraser import add_import
from .options import Commands, Parser, add_command, add_out, asked_method, refuse_unknown
from .signals import sigterm_cancels

OK, FAILED, BAD_INPUT, NOT_FINITE, PARTLY, CANCELLED = 0, 1, 2, 3, 4, 130
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

EPILOG = """\
MODEL is 'demo' (the small included model), 'demo-dit' (the small included transformer), a Stable
Diffusion 1.x, 2.x or XL checkpoint (.safetensors, or .ckpt with nothing but tensors), or a
diffusers folder.

examples:
  python -m fmn demo
  python -m fmn forget demo "dog" --out dog.safetensors
  python -m fmn forget sd15.safetensors "style:van gogh" "identity:elon musk" --method uce
  python -m fmn apply demo dog.safetensors --prompt "a photo of a dog" --out dog.png
  python -m fmn apply sd15.safetensors a.safetensors b.safetensors:0.7 --checkpoint safe.safetensors
  python -m fmn inspect dog.safetensors --json
  python -m fmn batch list.csv --model sd15.safetensors --method uce --out patches
  python -m fmn merge "patches/*" dog.safetensors:0.8 --out all.safetensors --budget-kb 2000
  python -m fmn import esd-dog.pt --base sd15.safetensors --concept dog --out dog.safetensors

exit codes: 0 done, 1 internal error, 2 wrong input or not enough memory, 3 training diverged (the
last good patch is kept), 4 some concepts of a batch failed, 130 cancelled (Ctrl-C or SIGTERM),
141 the reader of the output is gone
"""


def build_parser(asked: str | None = None) -> Parser:
    """The parser of all commands; ``asked`` is the method whose settings ``forget`` takes."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m fmn",
        description="Make a text-to-image model forget a concept.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands: Commands = parser.add_subparsers(dest="command", required=True)
    add_forget(commands, asked)
    add_apply(commands)
    add_batch(commands, asked)
    add_merge(commands)
    add_import(commands)
    inspect = add_command(commands, "inspect", _inspect, "show what a patch file forgets")
    inspect.add_argument("patch", type=Path, help="a patch file")
    add_command(commands, "methods", _methods, "list the methods")
    about = "forget an identity, an object and a style of the demo model, with pictures"
    add_out(add_command(commands, "demo", _demo, about), "out/demo")
    add_bench(commands, raw)
    commands.choices["bench"].set_defaults(run=run_bench)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        ForgetError: something is missing, or is no option of the command or setting of the method.
    """
    parser = build_parser(asked_method(arguments))
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command == "forget" and not any(word.startswith("-") for word in rest):
        options.concept += rest  # argparse does not take concepts that follow an option
    elif rest:
        refuse_unknown(options, rest)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # transformers reports at import which image processors it would prefer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show is no reason to fail after the work.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        try:
            with sigterm_cancels():
                return _run(arguments)
        finally:
            if sys.stdout:
                sys.stdout.flush()  # at exit it would be too late to handle errors
    except BrokenPipeError:
        if not _drop_closed_pipes():
            raise
        return CLOSED_PIPE


def _run(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments
    try:
        options = parse(arguments)
        result, text, *partly = options.run(options)
    except NonFiniteLoss as error:
        return _fail(as_json, error, NOT_FINITE)
    except ForgetError as error:
        return _fail(as_json, error, BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        memory_error = memory_ran_out(error)
        if memory_error is None:
            raise
        return _fail(as_json, memory_error, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail(as_json, "Cancelled; no unfinished file was left.", CANCELLED)
    print(json.dumps(result, indent=1) if as_json else text)
    return PARTLY if any(partly) else OK


def _fail(as_json: bool, error: object, code: int) -> int:
    if as_json:
        print(json.dumps({"error": str(error)}))
    # Names in lists and patches are untrusted, and a terminal would obey their control codes.
    print("fmn: " + "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
    return code


def _drop_closed_pipes() -> bool:
    """Redirect standard output and error to nowhere if their reader is gone, and say whether any
    was. Other pipes, as to worker processes, can break too."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    closed = [stream for stream, _ in poll.poll(0)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(closed)


def _methods(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..methods import METHODS, method

    about = {presets: method(presets[0]).ABOUT for presets in METHODS.values()}
    lines = [f"{', '.join(presets)}\n    {text}" for presets, text in about.items()]
    lines.append("\npython -m fmn forget --method NAME --help lists the settings of one")
    return {name: text for presets, text in about.items() for name in presets}, "\n".join(lines)


def _inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..methods.describe import describe
    from ..patches.patch import load_patch

    patch = load_patch(options.patch)
    result = {"family": patch.family.key, "layers": len(patch.changes), "ranks": patch.ranks}
    return result | {"info": patch.info}, describe(patch)


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..files import check_folder
    from ..jobs.demo import run_demo

    check_folder(options.out)
    return run_demo(options.out)
