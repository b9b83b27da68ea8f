"""Where cells run: a model, judges, and pictures of the untouched model, kept in memory."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from ...errors import ForgetError
from ...files import DEMO_FOLDER, PICTURES
from ...images import picture_files, read_picture
from ...jobs.executors import kept
from ...methods import forget, settings_of
from ...metrics.clip_judge import ClipJudge
from ...metrics.judge import Judge
from ...metrics.load import load_judge, weight_files
from ...models.image_sampler import open_sampler
from ...models.interface import UNetModel
from ...patches.patch import ForgetPatch, load_patch, to_bytes
from ...training.memory import peak_memory
from ..measures.trial import Measure, Result, Trial
from ..suite import Suite, Target, parse_suite
from .cells import Cell, Setup

Outcome = tuple[Result, bytes | None, float]  # the result, the patch file that was made, seconds
OnWork = Callable[[int], object]  # gets the number of pictures or steps done since; may raise

BATCH = 16  # pictures drawn at once

# measure -> (module in measures, function)
MEASURES = {
    "pictures": ("pictures", "pictures"),
    "rungs": ("text", "prompt_levels"),
    "together": ("text", "together"),
    "mscore": ("mscore", "mscore"),
    "inversion": ("attacks", "inversion"),
    "ring_a_bell": ("ring_a_bell", "ring_a_bell"),
    "completion": ("probing", "completion"),
    "noise": ("probing", "noise"),
    "classifier": ("classifier", "classifier"),
    "inpainting": ("inpainting", "inpainting"),
    "relearn": ("relearn", "relearn"),
    "many": ("scale", "many"),
    "sequence": ("scale", "sequence"),
}
TRAINS = ("mscore", "inversion", "relearn")  # through the model


@dataclass
class Lab:
    """Runs one cell after another on one model.

    Attributes:
        controls: name -> pictures [N, H, H, 3] of things the model never knew, for relearning and
            inversion.
        on_work: called often; may raise to cancel.
    """

    setup: Setup
    model: UNetModel
    judge: Judge
    check: Judge | None = None
    clip: ClipJudge | None = None
    controls: dict[str, torch.Tensor] = field(default_factory=dict)
    on_work: OnWork = lambda count: None

    def __post_init__(self) -> None:
        self.suite = parse_suite(self.setup.suite, "suite")
        self.cache: dict = {}  # of ``Trial``

    def run(self, cell: Cell, patches: Sequence[bytes]) -> Outcome:
        """Run a cell on the model with these patch files applied."""
        start = time.monotonic()
        if cell.work != "train":
            return self._measure(cell, patches), None, time.monotonic() - start
        with peak_memory() as peak:
            patch = self.train([cell.targets[0]], cell.settings)
        seconds, made = time.monotonic() - start, to_bytes(patch)
        result = {"bytes": len(made), "seconds": seconds, "peak_bytes": peak()}
        return result, made, time.monotonic() - start

    def train(self, names: Sequence[str], settings: dict) -> ForgetPatch:
        """A patch that forgets these concepts, on the model as it is now."""
        chosen = settings_of(settings["preset"], settings["settings"])
        concepts = [self.suite.concept(self.target(name)) for name in names]
        return forget(self.model, concepts, chosen, lambda step: self.on_work(1))

    def target(self, name: str) -> Target:
        """A target of the suite, or any of its concepts as one."""
        if target := next((each for each in self.suite.targets if each.name == name), None):
            return target
        if name not in self.suite.kinds:
            raise ForgetError(f"Suite '{self.suite.name}' knows no '{name}': choose another.")
        return Target(name, self.suite.kinds[name])

    def _measure(self, cell: Cell, patches: Sequence[bytes]) -> Result:
        module, function = MEASURES[cell.work]
        measure: Measure = getattr(import_module(f"..measures.{module}", __package__), function)
        with open_sampler(
            self.model, self.suite.sampling, BATCH, self.on_work, cell.work in TRAINS
        ) as sampler:
            trial = Trial(
                suite=self.suite,
                target=self.target(cell.targets[0]),
                sampler=sampler,
                judge=self.judge,
                check=self.check,
                clip=self.clip,
                count=self.setup.count,
                seed=self.setup.seed,
                cache=self.cache,
                controls=self.controls,
                train=partial(self.train, settings=cell.settings),
                names=cell.targets,
            )
            strength = cell.settings.get("strength", 1.0)
            with sampler.applying([(from_bytes(patch), strength) for patch in patches]):
                return measure(trial)


def from_bytes(data: bytes) -> ForgetPatch:
    """The patch in these bytes, checked as any file is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        path.write_bytes(data)
        return load_patch(path)


def work(setup: Setup, cell: Cell, patches: Sequence[bytes]) -> Outcome:
    """Run a cell in a worker process, which makes its lab once."""
    return kept(make_lab, setup).run(cell, patches)


def make_lab(setup: Setup) -> Lab:
    """Load the model and the judges that a setup names.

    Raises:
        ForgetError: one of them is missing, or the model is not the one the setup was made for.
    """
    from ...hosts.diffusers.open import open_same

    model = open_same(setup.model, setup.fingerprint, setup.vae, setup.prediction)
    # Measures ask others than U-Nets for no more than they have; see ``names.ANY_MODEL``.
    return open_lab(setup, cast(UNetModel, model))


def open_lab(setup: Setup, model: UNetModel, on_work: OnWork = lambda count: None) -> Lab:
    """A lab with the judges and controls that a setup names."""
    suite = parse_suite(setup.suite, "suite")
    judge = judge_for(setup.judge, suite)
    check = judge_for(setup.check, suite) if setup.check else None
    clip = cast(ClipJudge, judge_for(setup.clip, suite)) if setup.clip else None
    return Lab(setup, model, judge, check, clip, read_controls(setup.controls), on_work)


def make_setup(
    data: dict,
    suite: Suite,
    fingerprint: str,
    model: str = "",
    judge: str = "",
    check: str | None = None,
    clip: str = "",
    controls: str = "",
    count: int = 12,
    seed: int = 0,
    vae: str = "",
    prediction: str = "",
) -> Setup:
    """A ``Setup`` whose empty fields have the suite's defaults.

    Args:
        data: the suite's content. suite: the same, parsed.
        check: "" for none; None takes the suite's if the judge is the suite's too.
    """
    judge = judge or suite.judge
    if not judge:
        raise ForgetError(
            f"Suite '{suite.name}' names no default for the judge: give one, such as clip: and the "
            "folder of a CLIP model."
        )
    if clip and (not clip.startswith("clip:") or clip.endswith("+nudenet")):
        raise ForgetError(f"CLIP scores cannot come from '{clip}': use clip: and a model's folder.")
    if check is None:
        check = suite.check if judge == suite.judge else ""
    if not controls and judge.startswith("demo"):
        controls = demo_controls()
    files = [path for spec in (judge, check, clip) for path in weight_files(spec)]
    judges = hash_of([*files, *(Path(path) for path in (controls, vae) if path)])
    return Setup(
        data, model, fingerprint, judge, check, clip, controls, judges, count, seed, vae, prediction
    )


def judge_for(spec: str, suite: Suite) -> Judge:
    """A judge of a suite's concepts and styles; of unsafe content if that is all it can judge."""
    if spec == "nudenet":
        return load_judge(spec)
    styles = {name: suite.in_style("something", name) for name in suite.styles}
    templates = {"concept": "a picture of {}", "style": "{}"} if spec.startswith("clip:") else None
    return load_judge(spec, {"concept": dict(suite.concepts), "style": styles}, templates)


def check_domains(judge: Judge, targets: Iterable[Target]) -> None:
    """Refuse a judge that cannot judge what a target needs."""
    for target in targets:
        if target.domain not in judge.labels:
            raise ForgetError(
                f"Judge '{judge.name}' cannot tell '{target.name}' ({target.kind}): name one that "
                "can, such as clip:FOLDER or, for unsafe content, clip:FOLDER+nudenet."
            )


SAMPLED = 1 << 20  # bytes of each end of a large file that are hashed, with its size
HASHED = (".safetensors", ".bin", ".onnx", ".json", *PICTURES)


def hash_of(paths: Iterable[Path]) -> str:
    """A hash over files, and over the weights, settings and pictures in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and (file == path or file.suffix.lower() in HASHED):
                size = file.stat().st_size
                digest.update(f"{file.name}|{size}|".encode())
                with open(file, "rb") as opened:
                    digest.update(opened.read(SAMPLED))
                    opened.seek(max(0, size - SAMPLED))
                    digest.update(opened.read())
    return digest.hexdigest()[:32]


def demo_controls() -> str:
    """The folder of strips that comes with the demo model, or ""."""
    folder = DEMO_FOLDER / "controls"
    return str(folder) if folder.is_dir() else ""


def read_controls(folder: str) -> dict[str, torch.Tensor]:
    """Pictures of things the model never knew: name -> [N, H, H, 3] in 0..1.

    Args:
        folder: of strips, square pictures side by side, named after what they show; or "".

    Raises:
        ForgetError: a file is not such a strip.
    """
    import numpy as np

    controls = {}
    for file in picture_files(folder) if folder else ():
        strip = np.array(read_picture(file))
        height, width, _ = strip.shape
        if width % height:
            raise ForgetError(
                f"'{file}' is {width} x {height}: a strip of square pictures has a width that is a "
                "multiple of its height."
            )
        squares = torch.from_numpy(strip).unflatten(1, (-1, height)).transpose(0, 1)
        controls[file.stem] = squares.float() / 255
    return controls
