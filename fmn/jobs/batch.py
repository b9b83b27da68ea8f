"""One patch for each concept of a list, in a folder. Patches that exist are not made again."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ..concepts.concept import Concept
from ..errors import ForgetError
from ..files import write_whole
from ..methods import check_keep, forget
from ..models.families import Family
from ..models.interface import Model, TextEncoder, UNetModel
from ..models.token_positions import CHUNK
from ..patches.patch import load_patch, to_bytes
from ..progress import OnStep, StepProgress, ignore
from ..settings import Settings
from ..text import printable
from .executors import Executor, Here, Task, kept, run_tasks
from .recipe import hash_model, hash_model_0_1, recipe, recipe_0_1

CACHE_BYTES = 1 << 30
NAME_LETTERS = 40  # of a concept's name in a file's
FAILURES_SHOWN = 50


@dataclass(frozen=True)
class BatchProgress:
    """A batch is at concept ``index`` of ``count``, from 1."""

    name: str
    index: int
    count: int
    step: StepProgress | None = None  # what the method reported last
    seconds_left: float | None = None  # for the rest of the batch, after a first step

    @property
    def done(self) -> float:
        """Finished concepts, with the finished part of this one."""
        return self.index - 1 + (self.step.index / self.step.total if self.step else 0)


OnBatch = Callable[[BatchProgress], None]  # may raise to cancel


@dataclass
class BatchResult:
    """What became of a list."""

    files: list[Path] = field(default_factory=list)  # all patches, in the list's order
    existing: list[Path] = field(default_factory=list)  # those that were there before
    failed: list[tuple[Concept, str]] = field(default_factory=list)  # (concept, reason)
    remade: list[tuple[Path, str]] = field(default_factory=list)  # (file, why it was made again)
    seconds: float = 0.0

    def report(self) -> str:
        """A few lines of text."""
        lines = [
            f"{len(self.files)} of {len(self.files) + len(self.failed)} concepts have a patch, "
            f"{len(self.existing)} of them from before; {len(self.failed)} failed; "
            f"{self.seconds:.1f} s"
        ]
        lines += [f"made again: {path.name}: {why}" for path, why in self.remade[:FAILURES_SHOWN]]
        lines += [f"failed: {each.name}: {why}" for each, why in self.failed[:FAILURES_SHOWN]]
        if len(self.failed) > FAILURES_SHOWN:
            lines.append(f"and {len(self.failed) - FAILURES_SHOWN} more failed")
        return "\n".join(printable(line) for line in lines)


class Source(NamedTuple):
    """Where workers find the model; see ``hosts.diffusers.open.open_same``."""

    path: str
    fingerprint: str
    vae: str = ""
    prediction: str = ""


class _Target(NamedTuple):
    """A patch to make: its file, and the file that version 0.1 would have written."""

    concept: Concept
    recipe: str
    path: Path
    former: tuple[Path, str] | None  # with its recipe


def forget_each(
    model: Model,
    concepts: Sequence[Concept],
    settings: Settings,
    folder: str | Path,
    on_progress: OnBatch = lambda progress: None,
    keep: Sequence[str] = (),
    workers: tuple[Executor, Source] | None = None,
) -> BatchResult:
    """Make a patch file for each concept.

    A file's name and metadata hold its ``recipe``: running the same again, for example after a
    stop, keeps the files that exist and makes the others.

    Args:
        folder: of the files, which this process writes; made if need be.
        on_progress: called before each concept and after each step; with workers after each patch.
        workers: where patches are made, and of which model; None: here. The caller closes them.

    Raises:
        ForgetError: there is no concept, a file cannot be written, or a worker died or has no such
            model. Errors of a single concept are in the result.
    """
    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    check_keep(settings, keep)
    start, result = time.monotonic(), BatchResult()
    targets = _targets(model, concepts, settings, Path(folder), keep)
    missing = sum(not target.path.exists() for target in targets)
    tracker = _Tracker(on_progress, len(targets), missing)
    executor, source = workers or (Here(), None)
    here = partial(_make_here, _caching(model), tracker)
    make = partial(_make_there, source) if source else here
    waiting = iter(targets)
    outcomes: dict[_Target, Path | str] = {}  # the file, or why there is none

    def next_task() -> Task | None:
        for target in waiting:
            existing = _existing(target, model.family, result)
            if existing is None:
                return Task(target, make, (target.concept, target.recipe, settings, keep))
            tracker.begin(target.concept.name)
            result.existing.append(existing)
            outcomes[target] = existing
        return None

    for target, future in run_tasks(executor, next_task):
        made = future.result()
        if isinstance(made, bytes):
            write_whole(target.path, partial(Path.write_bytes, data=made))
        outcomes[target] = made if isinstance(made, str) else target.path
        if source:
            tracker.name, tracker.index = target.concept.name, tracker.index + 1
            tracker(StepProgress(1, 1, [], 0.0))
        tracker.made += 1
    ends = [(target.concept, outcomes[target]) for target in targets]
    result.files = [end for _, end in ends if isinstance(end, Path)]
    result.failed = [(concept, end) for concept, end in ends if isinstance(end, str)]
    result.seconds = time.monotonic() - start
    return result


def _caching(model: Model) -> Model:
    # Methods ask other models than U-Nets for nothing that is cached.
    return cast(Model, CachingModel(cast(UNetModel, model)))


def _make_here(model: Model, tracker: "_Tracker", concept: Concept, *request: Any) -> bytes | str:
    tracker.begin(concept.name)
    return _make(model, tracker, concept, *request)


def _make_there(source: Source, *request: Any) -> bytes | str:
    return _make(kept(_open, source), ignore, *request)


def _open(source: Source) -> Model:
    from ..hosts.diffusers.open import open_same

    return _caching(open_same(*source))


def _make(
    model: Model, on_step: OnStep, concept: Concept, key: str, settings: Settings,
    keep: Sequence[str],
) -> bytes | str:  # fmt: skip
    """A patch file's content, or why there is none."""
    try:
        patch = forget(model, [concept], settings, on_step, keep)
        patch.info["recipe"] = key
        return to_bytes(patch)
    except ForgetError as error:
        return str(error)


def _targets(
    model: Model, concepts: Sequence[Concept], settings: Settings, folder: Path, keep: Sequence[str]
) -> list[_Target]:
    """One for each different concept, in order."""
    model_hash, former_hash = hash_model(model), hash_model_0_1(model)
    targets: dict[Path, _Target] = {}
    for concept in concepts:
        key = recipe(model_hash, concept, settings, keep)
        former_key = former_hash and recipe_0_1(former_hash, concept, settings, keep)
        former = (folder / _file_name(concept, former_key), former_key) if former_key else None
        path = folder / _file_name(concept, key)
        targets.setdefault(path, _Target(concept, key, path, former))
    return list(targets.values())


def _existing(target: _Target, family: Family, result: BatchResult) -> Path | None:
    """The file that holds the patch already; a wrong one in its place is noted as remade."""
    if target.path.exists():
        wrong = _difference(target.path, target.recipe, family)
        if wrong is None:
            return target.path
        result.remade.append((target.path, wrong))
    elif target.former and target.former[0].exists():
        path, key = target.former
        return path if _difference(path, key, family) is None else None
    return None


def _difference(path: Path, key: str, family: Family) -> str | None:
    """Why a file is not the patch of a recipe; None if it is."""
    try:
        patch = load_patch(path)
    except ForgetError as error:
        return str(error)
    if patch.info.get("recipe") != key or not patch.family.is_same(family):
        return "another patch was there under this name."
    if patch.info.get("changed"):
        return "another program changed its weights."
    return None


def plain_name(concept: Concept) -> str:
    """A concept's name as a part of a file's."""
    name = concept.name.strip()[:NAME_LETTERS]
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _file_name(concept: Concept, key: str) -> str:
    return f"{plain_name(concept)}_{key[:12]}.safetensors"


class _Tracker:
    """Turns the steps of one method run after another into progress of the batch; a patch that a
    worker made is one step."""

    def __init__(self, on_progress: OnBatch, count: int, missing: int):
        self.on_progress, self.count, self.missing = on_progress, count, missing
        self.index, self.made, self.start, self.name = 0, 0, time.monotonic(), ""

    def begin(self, name: str) -> None:
        self.name, self.index = name, self.index + 1
        self.on_progress(BatchProgress(name, self.index, self.count))

    def __call__(self, step: StepProgress) -> None:
        made = self.made + step.index / step.total
        left = (time.monotonic() - self.start) / made * max(self.missing - made, 0)
        self.on_progress(BatchProgress(self.name, self.index, self.count, step, left))


class CachingModel:
    """A ``UNetModel`` that caches contexts: encoding the keep-list, much the same for each concept,
    takes nearly all of a closed form's time.

    While a method has the text encoder it caches nothing: the method may hook it to see each
    text, or change its output.

    Args:
        limit: bytes; the least recently used contexts are dropped first.
    """

    def __init__(self, model: UNetModel, limit: int = CACHE_BYTES):
        self._model, self._limit, self._bytes = model, limit, 0
        self._contexts: OrderedDict[str, torch.Tensor] = OrderedDict()  # [T, D] each
        self._device, self._lent = torch.device("cpu"), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def borrow_text_encoder(self, words: bool = True) -> Iterator[TextEncoder]:
        self._lent += 1
        try:
            with self._model.borrow_text_encoder(words) as text_encoder:
                yield text_encoder
        finally:
            self._lent -= 1

    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> torch.Tensor:
        """Contexts [len(texts), length, D]; see ``UNetModel.encode_all``."""
        if self._lent:
            return self._model.encode_all(texts, length)
        # A longer context serves as well: its first tokens are the same.
        missing = [
            text
            for text in dict.fromkeys(texts)
            if text not in self._contexts or len(self._contexts[text]) < length
        ]
        if missing:
            encoded = self._model.encode_all(missing, length)
            self._device = encoded.device
            for text, context in zip(missing, encoded):
                self._bytes -= self._contexts[text].nbytes if text in self._contexts else 0
                # A view would keep its whole batch alive.
                self._contexts[text] = context.cpu().clone()
                self._bytes += context.nbytes
        for text in texts:
            self._contexts.move_to_end(text)
        contexts = torch.stack([self._contexts[text][:length] for text in texts]).to(self._device)
        while self._bytes > self._limit:
            self._bytes -= self._contexts.popitem(last=False)[1].nbytes
        return contexts
