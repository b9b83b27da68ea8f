"""One patch a concept for a whole list, into a folder: what is there already is not made again."""

import hashlib
import json
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import __version__
from ..concepts.concept import Concept, Prompt
from ..errors import ForgetError
from ..methods import check_keep, forget
from ..models.families import layers
from ..models.token_positions import CHUNK
from ..patches.metadata import FORMAT
from ..patches.patch import load_patch, save_patch
from ..text import printable
from .sources import code_of

MEMO_BYTES = 1 << 30
NAME_LETTERS = 40  # of a concept's name in a file's
PROBE = Prompt("a photo", "a photo")
SHOWN = 50  # failures in a report


@dataclass(frozen=True)
class Place:
    """Where a batch is: at concept ``index`` of ``count``, from 1.

    Attributes:
        step: the method's ``train.Step``; None before its first.
        seconds_left: for the rest of the batch; None before the first step.
    """

    name: str
    index: int
    count: int
    step: object = None
    seconds_left: float | None = None

    @property
    def done(self):
        """Concepts done, with the part of this one that is."""
        return self.index - 1 + (self.step.index / self.step.total if self.step else 0)


@dataclass
class Batch:
    """What became of a list.

    Attributes:
        files: the patches, in the list's order. there: those of them that were there before.
        failed: (concept, reason). again: (file, why it was made again).
    """

    files: list[Path] = field(default_factory=list)
    there: list[Path] = field(default_factory=list)
    failed: list[tuple[Concept, str]] = field(default_factory=list)
    again: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0

    def report(self):
        """A few lines of text."""
        count = len(self.files) + len(self.failed)
        lines = [
            f"{len(self.files)} of {count} concepts have a patch, {len(self.there)} of them from "
            f"before; {len(self.failed)} failed; {self.seconds:.1f} s"
        ]
        lines += [f"made again: {path.name}: {reason}" for path, reason in self.again[:SHOWN]]
        lines += [f"failed: {each.name}: {reason}" for each, reason in self.failed[:SHOWN]]
        if len(self.failed) > SHOWN:
            lines.append(f"and {len(self.failed) - SHOWN} more failed")
        return "\n".join(printable(line) for line in lines)


def forget_each(model, concepts, settings, folder, on_place=lambda place: None, keep=()):
    """Make a patch file for each concept; returns a ``Batch``.

    A file's name and its metadata hold the hash of all that decides the patch (``recipe``). Whoever
    runs the same again, perhaps after a stop, gets the files that are there and makes the others.

    Args:
        settings: of the method. folder: of the files; made if need be.
        on_place: gets a ``Place`` before each concept and after each step; may raise to cancel.
        keep: words or prompts to protect, see ``methods.forget``.

    Raises:
        ForgetError: there is no concept, or a file cannot be written. What a single concept raises
            is in the ``Batch``.
    """
    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    check_keep(settings, keep)
    start, state = time.monotonic(), state_of(model)
    queue = {}
    for concept in concepts:
        key = recipe(state, concept, settings, keep)
        queue.setdefault(Path(folder) / _file_name(concept, key), (concept, key))
    batch, memo = Batch(), Memo(model)
    progress = _Progress(on_place, len(queue), sum(not path.exists() for path in queue))
    for path, (concept, key) in queue.items():
        progress.begin(concept.name)
        if path.exists():
            wrong = _why_not(path, key, model.family)
            if wrong is None:
                batch.files.append(path)
                batch.there.append(path)
                continue
            batch.again.append((path, wrong))
        try:
            patch = forget(memo, [concept], settings, progress, keep)
        except ForgetError as error:
            batch.failed.append((concept, str(error)))
        else:
            patch.info["recipe"] = key
            batch.files.append(save_patch(patch, path))
        progress.made += 1
    batch.seconds = time.monotonic() - start
    return batch


class _Progress:
    """Turns the steps of one method after another into places in the batch."""

    def __init__(self, on_place, count, missing):
        self.on_place, self.count, self.missing = on_place, count, missing
        self.index = self.made = 0
        self.start, self.name = None, ""

    def begin(self, name):
        self.name = name
        self.index += 1
        self.on_place(Place(name, self.index, self.count))
        self.start = self.start or time.monotonic()

    def __call__(self, step):
        made = self.made + step.index / step.total
        left = (time.monotonic() - self.start) / made * max(self.missing - made, 0)
        self.on_place(Place(self.name, self.index, self.count, step, left))


def _why_not(path, key, family):
    """Why a file is not the patch that is wanted; None if it is."""
    try:
        patch = load_patch(path)
    except ForgetError as error:
        return str(error)
    if patch.info.get("recipe") != key or not patch.family.is_same(family):
        return "another patch was there under this name."
    return None


def _file_name(concept, key):
    plain = "".join(c if c.isalnum() else "_" for c in concept.name.strip()[:NAME_LETTERS])
    return f"{plain}_{key[:12]}.safetensors"


def recipe(state, concept, settings, keep=()):
    """A hash of all that decides a patch, 64 hex digits.

    The VAE that encodes reference pictures is not part of it.

    Args:
        state: of ``state_of``.
    """
    told = {
        "format": FORMAT,
        "version": __version__,
        "code": code_of(type(settings).__module__),
        "model": state,
        "method": settings.method,
        "settings": asdict(settings),
        "concept": concept.describe(),
        "pictures": None if concept.images is None else _digest([concept.images]),
        "learned": _digest(concept.learned),
        "keep": list(keep),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{tuple(values.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def state_of(model):
    """Tells a model with the LoRAs and the text encoder it wears from another: 64 hex digits.

    From a row of every layer, what a prompt is encoded as, the noise schedule, and the host's code.
    """
    parts = [model.encode(PROBE).context]
    with model.borrow() as borrowed:
        parts += [borrowed.module(layer.name).weight[:1] for layer in layers(model.family)]
        rows = [part.detach().to("cpu", torch.float16) for part in parts]
        alphas = borrowed.alphas_cumprod
        # In float32: in half precision the schedule's ends are all alike.
        rows.append(borrowed.sigmas if alphas is None else alphas)
    told = f"{model.family.key} {model.family.title} {model.prediction} {model.fingerprint()} "
    told += f"{code_of(type(model).__module__)} "
    return hashlib.sha256((told + _digest(rows)).encode()).hexdigest()


class Memo:
    """A ``Model`` that remembers contexts. Of a closed form's time nearly all goes into encoding
    the keep-list, which is much the same for each concept.

    Not while the text encoder is borrowed: what borrows it may hook it to see each text go
    through, or change what it gives.

    Args:
        limit: bytes; what was not asked for longest is dropped first.
    """

    def __init__(self, model, limit=MEMO_BYTES):
        self._model, self._limit, self._bytes = model, limit, 0
        self._known, self._device, self._borrowed = OrderedDict(), "cpu", 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    @contextmanager
    def borrow_text(self, words=True):
        self._borrowed += 1
        try:
            with self._model.borrow_text(words) as borrowed:
                yield borrowed
        finally:
            self._borrowed -= 1

    def encode_all(self, texts, length=CHUNK):
        if self._borrowed:
            return self._model.encode_all(texts, length)
        # What is known of a text may be longer than is asked for now: tokens in front are the same.
        missing = [
            text
            for text in dict.fromkeys(texts)
            if text not in self._known or len(self._known[text]) < length
        ]
        if missing:
            fresh = self._model.encode_all(missing, length)
            self._device = fresh.device
            for text, row in zip(missing, fresh):
                self._bytes -= self._known[text].nbytes if text in self._known else 0
                # Copies, or each would keep its whole batch alive.
                self._known[text] = row.cpu().clone()
                self._bytes += row.nbytes
        for text in texts:
            self._known.move_to_end(text)
        found = torch.stack([self._known[text][:length] for text in texts]).to(self._device)
        while self._bytes > self._limit:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return found
