"""The ConceptBench node."""

import os
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..fmn.bench.names import MEASURES, QUICK
from ..fmn.bench.reporting.report import in_short, markdown_table, missing_plots
from ..fmn.bench.running.cells import Setup, given, plan, trained
from ..fmn.bench.running.lab import Lab, check_domains, files_of, hash_of, judge_for, to_bytes
from ..fmn.bench.running.runner import Here, bench, failures
from ..fmn.bench.running.worker import demo_controls, read_controls
from ..fmn.bench.suite import SUITES, parse_suite, read_suite
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.methods import PRESETS, preset_of, settings_of
from ..fmn.patches import scores
from ..fmn.text import printable
from .common import image_of, lines_of
from .patch import DEMO_PATCHES, below_output
from .types import CATEGORY, Method, Patch, show_text, told

KIND = "forget_suites"


def _register_folder():
    """Suites that users write lie in models/forget_suites."""
    paths, _ = folder_paths.folder_names_and_paths.get(KIND, ([], set()))
    own = os.path.join(folder_paths.models_dir, KIND)
    found = paths if own in paths else [*paths, own]
    folder_paths.folder_names_and_paths[KIND] = (found, {".yaml", ".yml"})


def _suites():
    return [*sorted(f.stem for f in SUITES.glob("*.yaml")), *folder_paths.get_filename_list(KIND)]


class ConceptBench(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_ConceptBench",
            display_name="ConceptBench",
            category=CATEGORY,
            description="Measures forgetting: is the concept gone, is everything else still there, "
            "how robust is it, what did it cost. Compares with the untouched model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that is to forget, without patches."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Patch.Input(
                    "patch",
                    optional=True,
                    tooltip="A patch to measure, on those of the suite's targets that it forgets. "
                    "Empty: patches are trained by the method, one a target.",
                ),
                Method.Input(
                    "method",
                    optional=True,
                    tooltip="How to train. Empty, and no patch: reread with its defaults.",
                ),
                io.Combo.Input(
                    "suite",
                    options=_suites(),
                    default="demo",
                    tooltip="What is forgotten and what must stay. Your own go to "
                    f"models/{KIND} as YAML.",
                ),
                io.String.Input(
                    "targets",
                    default="",
                    multiline=True,
                    tooltip="Names of the suite's targets, one a line. Empty: those that the patch "
                    "forgets; without a patch all of them.",
                ),
                io.Combo.Input(
                    "measure",
                    options=["quick", "all", *MEASURES],
                    default="quick",
                    tooltip=f"quick: {' and '.join(QUICK)}, minutes on the demo model. all: every "
                    "attack too, hours. Or one measure alone.",
                ),
                io.String.Input(
                    "judge",
                    default="",
                    tooltip="Who says what a picture shows: demo, or clip: and a folder with a "
                    "CLIP model. Empty: the suite's own.",
                ),
                io.Int.Input(
                    "count",
                    default=12,
                    min=2,
                    max=1000,
                    tooltip="Pictures a question. More narrow the intervals and take longer; "
                    "2 shows only that it runs.",
                ),
                io.Int.Input(
                    "bench_seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="The same seed draws the same pictures.",
                ),
                io.String.Input(
                    "name",
                    default="bench",
                    tooltip="Folder below output/forget_bench for the report. What is measured "
                    "there already is not measured again.",
                ),
                io.Boolean.Input(
                    "write_scores",
                    default=False,
                    optional=True,
                    tooltip="On: the means are written into the patch's own file, where the patch "
                    "shelf shows them and whoever gets the file reads them. Its weights stay as "
                    "they are, but it is no longer the same file, byte by byte. Needs a patch "
                    "straight from Load or Save Forget Patch. Off: no patch file is touched.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "REPORT",
                    display_name="report",
                    tooltip="The table as text, and where report.html lies.",
                ),
                io.Image.Output(
                    "BARS",
                    display_name="bars",
                    tooltip="Each method's UA, IRA, CRA and mean with 95 % intervals, the best "
                    "method first.",
                ),
                io.Image.Output(
                    "SCATTER",
                    display_name="erased and kept",
                    tooltip="How much is gone against how much is kept. Right and up is good.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, suite, targets, measure, judge, count, bench_seed, name,
        write_scores=False, patch=None, method=None,
    ):  # fmt: skip
        data = read_suite(_suite_path(suite))
        world = parse_suite(data, Path(suite).stem)
        host = ComfyModel(model, clip, vae)
        setup = _setup(host, data, world, judge, count, bench_seed)
        targets = _targets(world, targets, patch)
        if write_scores:
            _check_scored(patch, targets)
        judges = {
            kind: judge_for(spec, world) if (spec := getattr(setup, kind)) else None
            for kind in ("judge", "check")
        }
        check_domains(judges["judge"], targets)
        measures = {"quick": QUICK, "all": MEASURES}.get(measure, (measure,))
        under_test = _method(patch, method, write_scores)
        names = [target.name for target in targets]
        cells = plan(setup, world, names, [under_test], measures)
        show = _Progress()
        controls = read_controls(setup.controls)
        lab = Lab(setup, host, **judges, controls=controls, on_work=show.work)
        stop = comfy.model_management.InterruptProcessingException
        folder = below_output(name.strip() or "bench", "forget_bench")
        summary, paths, failed = bench(
            setup, world, cells, [under_test], folder, Here(lab, (stop,)), show
        )
        if failed:
            raise ForgetError(failures(failed, paths))
        report = f"{markdown_table(summary)}\n\n{paths['html']}"
        result = f"{in_short(summary)}\n{paths['html']}"
        if missing := missing_plots():
            report, result = f"{report}\n\n{missing}", f"{result}\n{missing}"
        if write_scores:
            scores.write_scores(patch.source, *scores.scores_of(summary, setup, under_test.name))
            written = f"scores written into {printable(patch.source.path.name)}"
            report, result = f"{report}\n\n{written}", f"{result}\n{written}"
        shown = [_plot(paths, name) for name in ("bars", "erased-vs-kept")]
        return io.NodeOutput(report, *shown, ui=told(result, report))


def _plot(paths: dict[str, Path], name: str) -> torch.Tensor | ExecutionBlocker:
    """A plot of the report as IMAGE; nodes behind it do not run if there is none."""
    if name not in paths:
        return ExecutionBlocker(None)
    with Image.open(paths[name]) as image:
        return image_of(image)


def _suite_path(name):
    return folder_paths.get_full_path(KIND, name) or name


def _setup(host, data, suite, judge, count, seed):
    judge = judge or suite.judge
    if not judge:
        raise ForgetError(
            f"Suite '{suite.name}' has no judge of its own: type clip: and a folder with a CLIP "
            "model into judge."
        )
    check = suite.check if judge == suite.judge else ""
    controls = demo_controls() if judge.startswith("demo") else ""
    # Patches that are on the model change what is measured, and the fingerprint leaves them out.
    worn = f"+{host.patcher.patches_uuid}" if host.patcher.patches else ""
    return Setup(
        suite=data,
        model="",
        fingerprint=host.fingerprint() + worn,
        judge=judge,
        check=check,
        controls=controls,
        judges=hash_of([path for spec in (judge, check) for path in files_of(spec)] + [controls]),
        count=count,
        seed=seed,
    )


def _targets(suite, text, patch):
    """The suite's targets that are named; without names those that the patch forgets, or all."""
    names = lines_of(text)
    if names:
        return [suite.find(name) for name in dict.fromkeys(names)]
    if patch is None:
        return list(suite.targets)
    return suite.forgotten(patch.concepts)


def _check_scored(patch, targets):
    """Refuse before measuring what no scores could be written of."""
    if patch is None or patch.source is None:
        raise ForgetError(
            "write_scores is on, but what is measured is no file yet: connect the patch of Load "
            "Forget Patch or Save Forget Patch, or turn it off."
        )
    path = patch.source.path
    if path in [each.resolve() for each in DEMO_PATCHES.values()]:
        raise ForgetError(
            f"'{path.name}' belongs to this pack, so nothing is written into it: copy it to "
            "models/forget_patches and load it from there, or turn write_scores off."
        )
    scores.check_targets(path.name, patch.concepts, [target.name for target in targets])


def _method(patch, method, as_file):
    if patch is not None:
        if method is not None:
            raise ForgetError("A patch and a method are connected: remove one of them.")
        # A file's own numbers; written once more they would be rounded once more.
        return given("patch", scores.bytes_of(patch.source) if as_file else to_bytes(patch))
    preset = preset_of(method) if method is not None else next(iter(PRESETS))
    return trained(preset, preset, method or settings_of(preset, {}))


class _Progress:
    """Shows cells done, time left and the picture count on the node; ends the run on Cancel."""

    def __init__(self):
        self.start, self.units, self.shown = time.monotonic(), 0, 0.0
        self.bar, self.text, self.before = None, "measuring", None

    def work(self, count):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.units += count
        if time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            show_text(f"{self.text}; {self.units} pictures and steps so far")

    def __call__(self, progress):
        if self.bar is None:
            self.bar, self.before = comfy.utils.ProgressBar(progress.total), progress.done - 1
        self.bar.update_absolute(progress.done, progress.total)
        done = max(1, progress.done - self.before)
        left = (time.monotonic() - self.start) / done * (progress.total - progress.done)
        cell = progress.cell
        self.text = (
            f"{progress.done} of {progress.total} cells, about {left:.0f} s left; last: "
            f"{cell.work} of {cell.method} on {cell.targets[0]}"
        )
        show_text(self.text)


_register_folder()
NODES = [ConceptBench]
