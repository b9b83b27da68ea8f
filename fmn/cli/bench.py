"""``python -m fmn bench``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.names import ANY_MODEL, MEASURES, QUICK, SCALE
from ..errors import ForgetError
from ..methods import DEFAULT, check_family
from ..patches.scores import Source, check_targets, scores_of, write_scores
from ..settings import MAX_SEED
from ..text import printable
from .options import MODEL, add_executor, add_model_options, load_model

if TYPE_CHECKING:  # these load torch, which --help does not need
    from ..bench.running.cells import Method, Setup
    from ..bench.suite import Suite, Target
    from ..models.families import Family

EPILOG = """\
SUITE is demo, stable-diffusion, or a .yaml file. METHOD is a preset, with settings if you like
(resteer, resteer-released, "resteer:steps=100,lr=0.001"), a patch file, FILE or FILE:STRENGTH, that
is tried on every target named, or a FOLDER of patches, each tried on what it forgets: other tools'
erasers, made into patches by 'import', become a row of the table. The untouched model is always
measured too.

Finished pieces are kept in OUT/cells.sqlite: run the same command again to go on after a stop.

examples:
  python -m fmn bench --target "santa claus" dog "ink drawing"
  python -m fmn bench --method dog.safetensors --write-scores
  python -m fmn bench --method reread uce published/uce
  python -m fmn bench --measure all --scale many sequence --out out/full
  python -m fmn bench --suite stable-diffusion --model sd15.safetensors --judge clip:clip-vit-large
"""


def add_bench(
    commands: "argparse._SubParsersAction", formatter: type[argparse.HelpFormatter]
) -> None:
    """Add the command to an ``argparse`` subparsers object."""
    parser = commands.add_parser(
        "bench",
        help="measure forgetting: what is gone, what is kept, how robust, at what cost",
        usage="%(prog)s [--method METHOD ...] [--target TARGET ...] [--out FOLDER] [option ...]",
        description="Measure forgetting: what is gone, what is kept, how robust, at what cost.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    _add_questions(parser)
    _add_judges(parser)
    _add_sampling(parser)
    add_executor(parser, 0)
    parser.add_argument(
        "--write-scores", action="store_true",
        help="write the means into the patch files that were measured, where the patch shelf and "
        "'inspect' show them; without --target, targets are those that the patches forget",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), metavar="FOLDER",
        help="for the report and finished pieces (%(default)s)",
    )  # fmt: skip


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", default="demo", help="what is asked: demo, stable-diffusion, or FILE.yaml (demo)"
    )
    parser.add_argument(
        "--model", default="",
        help=f"{MODEL}; default: the suite's",
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument(
        "--method", nargs="+", default=[DEFAULT], metavar="METHOD",
        help=f"what is measured, see below ({DEFAULT})",
    )  # fmt: skip
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="TARGET",
        help="what is forgotten, by the suite's names; default: all of them",
    )  # fmt: skip
    parser.add_argument("--split", choices=("tune", "report"), help="only targets of this half")
    parser.add_argument(
        "--measure", nargs="+", default=list(QUICK), choices=("all", *MEASURES), metavar="MEASURE",
        help=f"{', '.join(MEASURES)}, or all that the model allows ({' '.join(QUICK)})",
    )  # fmt: skip
    parser.add_argument(
        "--scale", nargs="*", default=[], choices=SCALE, help="many: 1 to 100 patches added; "
        "sequence: twelve one after another, in both orders",
    )  # fmt: skip


def _add_judges(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge", default="",
        help="who says what a picture shows: demo, clip:FOLDER; default: the suite's",
    )  # fmt: skip
    parser.add_argument("--check", help="a second judge; '' for none; default: the suite's")
    parser.add_argument("--clip", default="", help="clip:FOLDER, for CLIP scores")
    parser.add_argument(
        "--controls", default="", help="folder of strips of pictures that the model never saw"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--count", type=int, default=12, metavar="N",
        help="pictures a question, 2 to 1000 (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of everything drawn at random (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps, 1 to 1000; default: the suite's"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="X",
        help="guidance scale, 0 to 100; 1: none; default: the suite's",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="N",
        help="pixels a side, a multiple of 64; 0: the model's own; default: the suite's",
    )  # fmt: skip


def run_bench(options: argparse.Namespace) -> tuple[dict, str]:
    """Run what the options say; returns (data, text) for the command line."""
    from ..bench.reporting.report import markdown_table
    from ..bench.running.cells import parse_method, plan
    from ..bench.running.lab import check_domains, judge_for
    from ..bench.running.runner import bench, failures
    from ..files import check_folder
    from ..jobs.executors import open_executor
    from .progress import CellBar

    check_folder(options.out)
    methods = [parse_method(text) for text in dict.fromkeys(options.method)]
    _check_names(methods)
    setup, suite, family = _make_setup(options)
    measures = _measures(options, family)
    for method in methods:
        if preset := method.settings.get("preset"):
            check_family(family, preset)
    targets = covered(_targets(options, suite), methods, bool(options.target))
    if options.write_scores:
        targets = _scored_targets(targets, options, suite, methods)
    check_domains(judge_for(setup.judge, suite), targets)
    names = [target.name for target in targets]
    cells = plan(setup, suite, names, methods, measures, options.scale)
    command = shlex.join(["python", "-m", "fmn", *sys.argv[1:]])
    executor = open_executor(options.workers, options.ray)
    with CellBar() as bar:
        summary, paths, failed = bench(
            setup, suite, cells, methods, options.out, executor, bar, command
        )
    if failed:
        raise ForgetError(failures(failed, paths))
    files = {name: str(path) for name, path in paths.items()}
    text = f"{markdown_table(summary)}\nreport: {files['html']}"
    for method in methods if options.write_scores else ():
        source = _source(method)
        write_scores(source, *scores_of(summary, setup, method.name))
        text += f"\nscores written into {source.path}"
    tables = {key: value for key, value in summary.items() if key != "grids"}
    return {"summary": tables, "files": files}, text


def _make_setup(options: argparse.Namespace) -> tuple["Setup", "Suite", "Family"]:
    """Setup and suite of the options, and the model's family; loads it for its fingerprint."""
    from ..bench.running.lab import make_setup
    from ..bench.suite import parse_suite, read_suite

    if not 2 <= options.count <= 1000:
        raise ForgetError(f"--count is {options.count}: use 2 to 1000 pictures.")
    if not 0 <= options.seed <= MAX_SEED:
        raise ForgetError(f"--seed is {options.seed}: use 0 to {MAX_SEED}.")
    data, name = read_suite(options.suite), Path(options.suite).stem
    given = {name: getattr(options, name) for name in ("steps", "guidance", "size")}
    changed = {name: value for name, value in given.items() if value is not None}
    sampling = replace(parse_suite(data, name).sampling, **changed)
    data = data | {"sampling": asdict(sampling)}
    suite = parse_suite(data, name)
    options.model = options.model or suite.model
    if not options.model:
        raise ForgetError(f"Suite '{suite.name}' names no default for --model: give one.")
    # Who names a judge gets no second one that was not asked for.
    check = options.check if options.check is not None or not options.judge else ""
    model = load_model(options)
    setup = make_setup(
        data, suite, model.fingerprint(), options.model, options.judge, check, options.clip,
        options.controls, options.count, options.seed, str(options.vae or ""),
        options.prediction or "",
    )  # fmt: skip
    return setup, suite, model.family


def _measures(options: argparse.Namespace, family: "Family") -> tuple[str, ...]:
    known = MEASURES if family.known else tuple(name for name in MEASURES if name in ANY_MODEL)
    if "all" in options.measure:
        return known
    for name in options.measure:
        if name not in known:
            raise ForgetError(
                f"The measure {name} is for U-Nets, and {family.title} is none: choose among "
                f"{', '.join(known)}."
            )
    return tuple(dict.fromkeys(options.measure))


def _check_names(methods: Sequence["Method"]) -> None:
    """Refuse two that a report could not tell apart."""
    known: dict[str, dict] = {}
    for method in methods:
        if known.setdefault(method.name, method.settings) != method.settings:
            raise ForgetError(
                f"Two different patches are both named '{method.name:.80}', and a report tells "
                "methods apart by name: rename one of the files."
            )


def _targets(options: argparse.Namespace, suite: "Suite") -> list["Target"]:
    targets = [suite.find(name) for name in dict.fromkeys(options.target)] or list(suite.targets)
    return _of_split(targets, options.split)


def covered(targets: list["Target"], methods: Sequence["Method"], named: bool) -> list["Target"]:
    """The targets that every folder of patches has one for; those named must be among them."""
    for method in filter(lambda one: one.files, methods):
        missing = [target.name for target in targets if target.name not in method.files]
        if missing and (named or len(missing) == len(targets)):
            known = printable(", ".join(method.files))
            raise ForgetError(
                f"'{method.name:.60}' holds no patch for {', '.join(missing):.60}: name targets of "
                f"the suite that it forgets ({known:.80})."
            )
        targets = [target for target in targets if target.name in method.files]
    return targets


def _of_split(targets: list["Target"], split: str | None) -> list["Target"]:
    chosen = [target for target in targets if split in (None, target.split)]
    if not chosen:
        names = ", ".join(target.name for target in targets)
        raise ForgetError(f"None of {names:.200} is in the half '{split}': name others.")
    return chosen


def _scored_targets(
    targets: list["Target"],
    options: argparse.Namespace,
    suite: "Suite",
    methods: Sequence["Method"],
) -> list["Target"]:
    """The targets whose scores can be written: those named, or what the patches forget."""
    from ..patches.patch import load_patch

    patches = [load_patch(_source(method).path) for method in methods]
    if not options.target:
        names = [name for patch in patches for name in patch.concepts]
        targets = _of_split(suite.targets_of(names), options.split)
    for method, patch in zip(methods, patches, strict=True):
        check_targets(method.name, patch.info, [target.name for target in targets])
    return targets


def _source(method: "Method") -> Source:
    """The file that scores are written into."""
    if method.source is None or method.settings["strength"] != 1:
        raise ForgetError(
            f"--write-scores is for patch files at strength 1, and '{method.name:.80}' is "
            "none: name files such as dog.safetensors with --method."
        )
    return method.source
