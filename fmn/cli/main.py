"""The command line: ``python -m fmn``."""

import argparse
import json
import os
import sys
from pathlib import Path

from .. import __version__
from ..errors import ForgetError, NonFiniteLoss, memory_ran_out
from ..text import printable
from .apply import add_apply, run_apply
from .batch import add_batch, add_merge, run_batch, run_merge
from .bench import add_bench, run_bench
from .forget import add_forget, run_forget
from .options import Parser, asked_method, refuse_unknown
from .signals import sigterm_cancels

OK, FAILED, BAD_INPUT, NOT_FINITE, PARTLY, CANCELLED = 0, 1, 2, 3, 4, 130

EPILOG = """\
MODEL is 'demo' (the small model that comes along), a Stable Diffusion 1.x, 2.x or XL checkpoint
(.safetensors), or a diffusers folder.

examples:
  python -m fmn demo
  python -m fmn forget demo "dog" --out dog.safetensors
  python -m fmn forget sd15.safetensors "style:van gogh" "identity:elon musk" --method uce
  python -m fmn apply demo dog.safetensors --prompt "a photo of a dog" --out dog.png
  python -m fmn apply sd15.safetensors a.safetensors b.safetensors:0.7 --checkpoint safe.safetensors
  python -m fmn inspect dog.safetensors --json
  python -m fmn batch list.csv --model sd15.safetensors --method uce --out patches
  python -m fmn merge "patches/*" dog.safetensors:0.8 --out all.safetensors --budget-kb 2000

exit codes: 0 done, 1 a fault of ours, 2 wrong input or too little memory, 3 training blew up (the
last good patch is kept), 4 some concepts of a batch failed, 130 cancelled
"""


def build_parser(asked=None):
    """The parser of all commands; ``asked`` is the method whose settings ``forget`` takes."""
    parser = Parser(
        prog="python -m fmn",
        description="Make a text-to-image model forget a concept.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_forget(commands, asked)
    add_apply(commands)
    add_batch(commands, asked)
    add_merge(commands)
    about = "tell what a patch file forgets"
    inspect = commands.add_parser("inspect", help=about, description=f"{about.capitalize()}.")
    inspect.add_argument("patch", type=Path, help="a patch file")
    commands.add_parser("methods", help="list the methods", description="List the methods.")
    about = "forget an identity, an object and a style of the demo model, with pictures"
    demo = commands.add_parser("demo", help=about, description=f"{about.capitalize()}.")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="FOLDER", help="(%(default)s)"
    )
    add_bench(commands, argparse.RawDescriptionHelpFormatter)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def parse(arguments):
    """The options of a command line.

    Raises:
        ForgetError: something is missing, or is no option of the command or setting of the method.
    """
    parser = build_parser(asked_method(arguments))
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command == "forget" and not any(word.startswith("-") for word in rest):
        options.concept += rest  # concepts behind an option, which argparse has not waited for
    elif rest:
        refuse_unknown(options, rest)
    return options


def main(arguments=None):
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show is no reason to fail after the work.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    as_json = "--json" in arguments
    # transformers tells at import which image processors it would rather use.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands = {
        "forget": run_forget, "apply": run_apply, "inspect": _inspect, "demo": _demo,
        "methods": _methods, "batch": run_batch, "merge": run_merge, "bench": run_bench,
    }  # fmt: skip
    try:
        with sigterm_cancels():
            options = parse(arguments)
            result, text, *partly = commands[options.command](options)
    except NonFiniteLoss as error:
        return _fail(as_json, error, NOT_FINITE)
    except ForgetError as error:
        return _fail(as_json, error, BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        told = memory_ran_out(error)
        if told is None:
            raise
        return _fail(as_json, told, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail(as_json, "Cancelled; no unfinished file was left.", CANCELLED)
    print(json.dumps(result, indent=1) if as_json else text)
    return PARTLY if any(partly) else OK


def _fail(as_json, error, code):
    if as_json:
        print(json.dumps({"error": str(error)}))
    # A list or a patch can be a stranger's, whose control codes a terminal would obey.
    print("fmn: " + "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
    return code


def _methods(options):
    from ..methods import METHODS, method

    about = {presets: method(presets[0]).ABOUT for presets in METHODS.values()}
    lines = [f"{', '.join(presets)}\n    {text}" for presets, text in about.items()]
    lines.append("\npython -m fmn forget --method NAME --help lists the settings of one")
    return {name: text for presets, text in about.items() for name in presets}, "\n".join(lines)


def _inspect(options):
    from ..methods.describe import describe
    from ..patches.patch import load_patch

    patch = load_patch(options.patch)
    result = {"family": patch.family.key, "layers": len(patch.changes), "ranks": patch.ranks}
    return result | {"info": patch.info}, describe(patch)


def _demo(options):
    from ..files import check_folder
    from ..jobs.demo import run_demo

    check_folder(options.out)
    return run_demo(options.out)
