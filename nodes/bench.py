"""The ConceptBench node."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..fmn.bench.names import MEASURES, QUICK
from ..fmn.bench.reporting.report import in_short, markdown_table, missing_plots
from ..fmn.bench.running import runner
from ..fmn.bench.running.cells import CellProgress, Setup, given, plan, trained
from ..fmn.bench.running.cells import Method as MethodUnderTest
from ..fmn.bench.running.lab import check_domains, make_setup, open_lab
from ..fmn.bench.suite import SUITES, Suite, Target, parse_suite, read_suite
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.jobs.executors import Here
from ..fmn.methods import PRESETS, preset_of, settings_of
from ..fmn.patches import scores
from ..fmn.patches.patch import ForgetPatch, to_bytes
from ..fmn.settings import Settings
from ..fmn.text import printable
from .common import clip_input, image_of, lines_of, schema, seed_input, vae_input
from .page import show_text, text_output
from .patch import DEMO_PATCHES, below_output
from .progress import Progress, stop_if_cancelled
from .types import Method, Patch

KIND = "forget_suites"


class ConceptBench(io.ComfyNode):
    """Measures forgetting: is the concept gone, is everything else still there, how robust is it,
    what did it cost? Compares with the untouched model.

    Inputs:
        model: The model that should forget, without patches.
        suite: What is forgotten and what must stay. Put your own into models/forget_suites as YAML.
        targets: Names of the suite's targets, one per line. Empty: those that the patch forgets;
            without a patch all of them.
        judge: What recognises concepts in pictures: demo, or clip: and a folder with a CLIP model.
            Empty: the suite's own judge.
        count: Pictures per question. More narrow the intervals and take longer; 2 shows only that
            it runs.
        bench_seed: The same seed draws the same pictures.
        name: Folder in output/forget_bench for the report. Existing measurements there are used
            again.
        patch: A patch to measure, on those of the suite's targets that it forgets. Empty: the
            method trains patches, one per target.
        method: How to train. Empty, and no patch: reread with its defaults.
        write_scores: On: writes the means into the patch's own file, where the patch shelf and
            whoever gets the file can read them. The weights stay, but the file's hash changes.
            Needs a patch directly from Load or Save Forget Patch. Off: no patch file is touched.

    Outputs:
        report: The table as text, and the path of report.html.
        bars: Each method's UA, IRA, CRA and mean with 95 % intervals, the best method first.
        erased and kept: How much is gone against how much is kept. Up and right is better.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            vae_input(),
            Patch.Input("patch", optional=True),
            Method.Input("method", optional=True),
            io.Combo.Input(
                "suite",
                options=[
                    *sorted(file.stem for file in SUITES.glob("*.yaml")),
                    *folder_paths.get_filename_list(KIND),
                ],
                default="demo",
            ),
            io.String.Input("targets", default="", multiline=True),
            io.Combo.Input(
                "measure",
                options=["quick", "all", *MEASURES],
                default="quick",
                tooltip=f"quick: {' and '.join(QUICK)}, minutes on the demo model. all: every "
                "attack too, hours. Or a single measure.",
            ),
            io.String.Input("judge", default=""),
            io.Int.Input("count", default=12, min=2, max=1000),
            seed_input("bench_seed", 2**31 - 1),
            io.String.Input("name", default="bench"),
            io.Boolean.Input("write_scores", default=False, optional=True),
        ]
        outputs = [
            io.String.Output("REPORT", "report"),
            io.Image.Output("BARS", "bars"),
            io.Image.Output("SCATTER", "erased and kept"),
        ]
        return schema(cls, "FMN_ConceptBench", "ConceptBench", inputs, outputs, is_output_node=True)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, suite: str, targets: str, measure: str,
        judge: str, count: int, bench_seed: int, name: str, write_scores: bool = False,
        patch: ForgetPatch | None = None, method: Settings | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        data = read_suite(folder_paths.get_full_path(KIND, suite) or suite)
        parsed = parse_suite(data, Path(suite).stem)
        host = ComfyModel(model, clip, vae)
        # Patches that are already on the model change the results, and the fingerprint omits them.
        applied = f"+{host.patcher.patches_uuid}" if host.patcher.patches else ""
        setup = make_setup(
            data, parsed, host.fingerprint() + applied, judge=judge, count=count, seed=bench_seed
        )
        chosen = _targets(parsed, targets, patch)
        source = _scored_file(patch, chosen) if write_scores else None
        under_test = _method_under_test(patch, method, source)
        measures = {"quick": QUICK, "all": MEASURES}.get(measure, (measure,))
        folder = below_output(name.strip() or "bench", "forget_bench")
        summary, paths = _run(host, setup, parsed, chosen, under_test, measures, folder)
        notes = [str(paths["html"]), missing_plots()]
        if source is not None:
            scores.write_scores(source, *scores.scores_of(summary, setup, under_test.name))
            notes.append(f"scores written into {printable(source.path.name)}")
        notes = [note for note in notes if note]
        report = "\n\n".join([markdown_table(summary), *notes])
        text = "\n".join([in_short(summary), *notes])
        shown = _plot(paths, "bars"), _plot(paths, "erased-vs-kept")
        return io.NodeOutput(report, *shown, ui=text_output(text, report))


def _plot(paths: dict[str, Path], name: str) -> torch.Tensor | ExecutionBlocker:
    """A plot of the report as IMAGE; nodes behind it do not run if there is none."""
    if name not in paths:
        return ExecutionBlocker(None)
    with Image.open(paths[name]) as image:
        return image_of(image)


def _targets(suite: Suite, text: str, patch: ForgetPatch | None) -> list[Target]:
    """The named targets of the suite; without names those that the patch forgets, or all."""
    if names := lines_of(text):
        return [suite.find(name) for name in dict.fromkeys(names)]
    return list(suite.targets) if patch is None else suite.targets_of(patch.concepts)


def _scored_file(patch: ForgetPatch | None, targets: Sequence[Target]) -> scores.Source:
    """Where the scores go; refuses before anything is measured if they could not be written."""
    if patch is None or patch.source is None:
        raise ForgetError(
            "write_scores is on, but the patch is not a file yet: connect the patch of Load Forget "
            "Patch or Save Forget Patch, or turn it off."
        )
    path = patch.source.path
    if path in [each.resolve() for each in DEMO_PATCHES.values()]:
        raise ForgetError(
            f"'{path.name}' belongs to this pack, so nothing is written into it: copy it to "
            "models/forget_patches and load it from there, or turn write_scores off."
        )
    scores.check_targets(path.name, patch.info, [target.name for target in targets])
    return patch.source


def _method_under_test(
    patch: ForgetPatch | None, method: Settings | None, source: scores.Source | None
) -> MethodUnderTest:
    if patch is not None:
        if method is not None:
            raise ForgetError("A patch and a method are connected: remove one of them.")
        # The numbers as the file has them; writing them again would round them again.
        return given("patch", to_bytes(patch) if source is None else scores.bytes_of(source))
    preset = preset_of(method) if method is not None else next(iter(PRESETS))
    return trained(preset, preset, method or settings_of(preset, {}))


def _run(
    host: ComfyModel, setup: Setup, suite: Suite, targets: Sequence[Target],
    method: MethodUnderTest, measures: Sequence[str], folder: Path,
) -> tuple[Any, dict[str, Path]]:  # fmt: skip
    """Summary, and the paths of the report's files."""
    progress = _CellProgress()
    lab = open_lab(setup, host, progress.work)
    check_domains(lab.judge, targets)
    cells = plan(setup, suite, [target.name for target in targets], [method], measures)
    executor = Here((InterruptProcessingException,))
    summary, paths, failed = runner.bench(
        setup, suite, cells, [method], folder, executor, progress.cell, lab=lab
    )
    if failed:
        raise ForgetError(runner.failures(failed, paths))
    return summary, paths


class _CellProgress:
    """Cells done, time left and the number of pictures."""

    def __init__(self) -> None:
        self.bar, self.text = Progress(), "measuring"
        self.start, self.units, self.shown = time.monotonic(), 0, 0.0
        self.before: int | None = None  # cells done in earlier runs

    def work(self, count: int) -> None:
        """The callback of a cell, after so many pictures or training steps."""
        stop_if_cancelled()
        self.units += count
        if time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            show_text(f"{self.text}; {self.units} pictures and steps so far")

    def cell(self, progress: CellProgress) -> None:
        """The callback after a cell."""
        if self.before is None:
            self.before = progress.done - 1
        done = max(1, progress.done - self.before)
        left = (time.monotonic() - self.start) / done * (progress.total - progress.done)
        cell = progress.cell
        self.text = (
            f"{progress.done} of {progress.total} cells, about {left:.0f} s left; last: "
            f"{cell.work} of {cell.method} on {cell.targets[0]}"
        )
        self.bar.show(progress.done, self.text, progress.total)


# Users' suites.
folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))
folder_paths.folder_names_and_paths[KIND][1].update({".yaml", ".yml"})
NODES = [ConceptBench]
