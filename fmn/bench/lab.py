"""Where cells are done: a model, judges, and pictures of the untouched model, kept in memory."""

import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path

from ..errors import ForgetError
from ..memory import peak_memory
from ..methods import method, settings_of
from ..patch import load_patch, save_patch
from ..studio import open_studio
from .suite import Target, parse_suite
from .trial import Trial

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
        run = method(settings["preset"]).run
        return run(self.model, concepts, chosen, lambda step: self.on_work(1))

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
        measure = getattr(import_module(f".measures.{module}", __package__), function)
        with open_studio(self.model, self.suite.sampling, self.batch, self.on_work) as studio:
            trial = Trial(
                suite=self.suite,
                target=self.target(cell.targets[0]),
                studio=studio,
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
            with studio.wearing(worn):
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
