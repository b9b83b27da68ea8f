"""Where cells are done: a model, judges, and pictures of the untouched model, kept in memory."""

import hashlib
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path

from ...concepts.prompt_templates import fill
from ...errors import ForgetError
from ...methods import forget, settings_of
from ...metrics.judge import find_labels
from ...metrics.load import load_judge
from ...models.image_sampler import open_sampler
from ...patches.patch import load_patch, save_patch
from ...training.memory import peak_memory
from ..measures.trial import Trial
from ..suite import Target, parse_suite

# measure -> (module in measures, function)
FUNCTIONS = {
    "pictures": ("pictures", "pictures"),
    "rungs": ("text", "rungs"),
    "together": ("text", "together"),
    "mscore": ("mscore", "mscore"),
    "inversion": ("attacks", "inversion"),
    "ring_a_bell": ("attacks", "ring_a_bell"),
    "completion": ("beyond", "completion"),
    "noise": ("beyond", "noise"),
    "classifier": ("beyond", "classifier"),
    "inpainting": ("beyond", "inpainting"),
    "relearn": ("relearn", "relearn"),
    "many": ("scale", "many"),
    "sequence": ("scale", "sequence"),
}


class Lab:
    """Does one cell after another on one model.

    Args:
        setup: a ``cells.Setup``.
        model: a ``Model``. judge, check, clip: judges, or None.
        controls: name -> pictures of things the model never knew, for relearning.
        on_work: called often with the number of units done (pictures or steps); may raise.
    """

    def __init__(
        self,
        setup,
        model,
        judge,
        check=None,
        clip=None,
        controls=None,
        on_work=lambda count: None,
        batch=16,
    ):
        self.setup, self.model = setup, model
        self.suite = parse_suite(setup.suite, "suite")
        self.judge, self.check, self.clip = judge, check, clip
        self.controls, self.on_work, self.batch = controls or {}, on_work, batch
        self.cache = {}

    def run(self, cell, patches):
        """Do a cell; returns (result, patch file as bytes or None, seconds).

        Args:
            patches: bytes of the patch files that the cell needs.
        """
        start = time.monotonic()
        if cell.work == "train":
            result, made = self._train(cell)
        else:
            result, made = self._measure(cell, patches), None
        return result, made, time.monotonic() - start

    def _train(self, cell):
        start = time.monotonic()
        with peak_memory() as peak:
            patch = self.train([cell.targets[0]], cell.settings)
        seconds, made = time.monotonic() - start, to_bytes(patch)
        return {"bytes": len(made), "seconds": seconds, "peak_bytes": peak()}, made

    def train(self, names, settings):
        """A patch that forgets these concepts, on the model as it is now."""
        chosen = settings_of(settings["preset"], settings["settings"])
        concepts = [self.suite.concept(self.target(name)) for name in names]
        return forget(self.model, concepts, chosen, lambda progress: self.on_work(1))

    def target(self, name):
        """A target of the suite, or any of its concepts as one."""
        for target in self.suite.targets:
            if target.name == name:
                return target
        if name not in self.suite.kinds:
            raise ForgetError(f"Suite '{self.suite.name}' knows no '{name}': choose another.")
        return Target(name, self.suite.kinds[name])

    def _measure(self, cell, patches):
        module, function = FUNCTIONS[cell.work]
        measure = getattr(import_module(f"..measures.{module}", __package__), function)
        with open_sampler(self.model, self.suite.sampling, self.batch, self.on_work) as sampler:
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
            worn = [(from_bytes(patch), strength) for patch in patches]
            with sampler.applying(worn):
                return measure(trial)


def to_bytes(patch):
    """A patch as the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        return save_patch(patch, Path(folder) / "patch.safetensors").read_bytes()


def from_bytes(data):
    """The patch in these bytes, checked as any file is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        path.write_bytes(data)
        return load_patch(path)


SAMPLED = 1 << 20  # bytes of each end of a large file that are hashed, with its size
WEIGHTS = (".safetensors", ".bin", ".onnx", ".json", ".png")


class Joined:
    """Several judges as one: each domain by the first that knows it, features by the first."""

    def __init__(self, judges):
        self.judges = judges
        self.name = "+".join(judge.name for judge in judges)
        self.labels = {}
        for judge in reversed(judges):
            self.labels |= judge.labels

    def probabilities(self, images, domain):
        find_labels(self, domain)
        judge = next(judge for judge in self.judges if domain in judge.labels)
        return judge.probabilities(images, domain)

    def features(self, images):
        return self.judges[0].features(images)


def judge_for(spec, suite):
    """A judge of a suite's concepts and styles; ``A+nudenet`` adds unsafe content to A."""
    first, plus, second = spec.rpartition("+")
    if plus and second == "nudenet":
        return Joined([judge_for(first, suite), load_judge(second)])
    if spec == "nudenet":
        return load_judge(spec)
    labels = {
        "concept": dict(suite.concepts),
        "style": {name: fill(text, "something") for name, text in suite.styles.items()},
    }
    if not spec.startswith("clip:"):
        return load_judge(spec, labels)
    return load_judge(spec, labels, {"concept": "a picture of {}", "style": "{}"})


def check_domains(judge, targets):
    """Refuse a judge that cannot tell what a target needs.

    Raises:
        ForgetError
    """
    for target in targets:
        if target.domain not in judge.labels:
            raise ForgetError(
                f"Judge '{judge.name}' cannot tell '{target.name}' ({target.kind}): name one that "
                "can, such as clip:FOLDER or, for unsafe content, clip:FOLDER+nudenet."
            )


def hash_of(paths):
    """A hash over files, and over the weights and settings in folders; "" paths are skipped."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix in WEIGHTS:
                digest.update(f"{file.name}|{file.stat().st_size}|".encode())
                with open(file, "rb") as opened:
                    digest.update(opened.read(SAMPLED))
                    opened.seek(max(0, file.stat().st_size - SAMPLED))
                    digest.update(opened.read())
    return digest.hexdigest()[:32]


def files_of(spec):
    """Where a judge's weights lie; nothing for NudeNet, whose version is its package's."""
    from ...metrics.demo_judge import FILE

    paths = []
    for part in spec.split("+"):
        kind, _, rest = part.partition(":")
        paths += {"demo": [FILE], "clip": [rest]}.get(kind, [])
    return paths
