"""Cells: the smallest pieces of a bench, each known by a hash of all that decides its result."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors.torch import load

from ... import __version__
from ...errors import ForgetError
from ...files import file_and_strength
from ...methods import PRESETS, check_preset, settings_of
from ...patches.patch import load_patch
from ...patches.scores import Source, tensor_hash
from ..names import UNTOUCHED

FORMAT = 1  # raise it when a cell's meaning changes: stored results are then made anew


@dataclass(frozen=True)
class Setup:
    """What all cells of a run share. Plain data, so that it can go to another machine.

    Attributes:
        suite: the suite's content, as read from YAML.
        model: ``demo``, a checkpoint or a folder; fingerprint: of its weights.
        judge, check, clip: judge specs, "" for none; controls: folder of strips of pictures, or
            ""; judges: hash of all their files.
        count: pictures a question. seed: of everything drawn by chance.
    """

    suite: dict
    model: str
    fingerprint: str
    judge: str
    check: str = ""
    clip: str = ""
    controls: str = ""
    judges: str = ""
    count: int = 12
    seed: int = 0

    def told(self):
        """All of it that matters to results, as plain data; where files lie does not."""
        judges = {name: _without_folder(getattr(self, name)) for name in ("judge", "check", "clip")}
        return asdict(self) | {"model": "", "controls": ""} | judges

    def key(self):
        """Short hash of what ``told`` says."""
        return _hash(self.told())[:12]


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        work: ``train`` or a measure.
        method: as the user named it; settings: what that stands for, plain data.
        targets: names; one, but for measures of many at once.
        needs: keys of the cells whose patches this one wears.
        options: further settings of the measure.
    """

    work: str
    method: str
    settings: dict
    targets: tuple[str, ...]
    needs: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)

    def key(self, setup):
        """Hash of everything that matters to the result; where files lie does not."""
        told = {"format": FORMAT, "version": __version__, "setup": setup.told()}
        return _hash(told | {"cell": asdict(self)})[:32]


def _without_folder(judge):
    """``clip:FOLDER+nudenet`` as ``clip:+nudenet``; other specs as they are."""
    if not judge.startswith("clip:"):
        return judge
    return "clip:" + ("+nudenet" if judge.endswith("+nudenet") else "")


def _hash(told):
    text = json.dumps(told, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """A way to forget, under test.

    Attributes:
        name: as it stands in tables.
        settings: plain data: a preset and its settings, or the hash and strength of a patch.
        patch: bytes of the patch file, if there is one already.
        source: of that file, if it is known.
    """

    name: str
    settings: dict
    patch: bytes | None = field(default=None, repr=False)
    source: Source | None = field(default=None, repr=False)


def parse_method(text):
    """A ``Method`` from ``resteer``, ``resteer:steps=100,lr=0.001``, FILE or FILE:STRENGTH."""
    name, _, given = text.partition(":")
    if name not in PRESETS:
        return _file_method(text)
    changes = {}
    for part in filter(None, given.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ForgetError(f"'{part}' in method '{text}' is no setting: write name=value.")
        changes[key.strip()] = _value(value.strip())
    return trained(text, name, settings_of(name, changes))


def trained(name, preset, settings):
    """A ``Method`` that trains a patch for each target."""
    return Method(name, {"preset": preset, "settings": asdict(settings)})


def given(name, patch, strength=1.0):
    """A ``Method`` that is a patch file, as bytes: nothing is trained.

    Known by its tensors alone: the same patch made on another day is measured once.
    """
    return Method(name, {"sha256": tensor_hash(load(patch))[:32], "strength": strength}, patch)


def _value(text):
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def _file_method(text):
    file, strength = file_and_strength(text)
    path = Path(file)
    if not path.is_file():
        if path.suffix != ".safetensors" and len(path.parts) < 2:
            check_preset(text.partition(":")[0])
        raise ForgetError(f"There is no patch file '{file}': check the name and its folder.")
    source = load_patch(path).source  # refused now rather than in the middle of the run
    name = path.name if strength == 1 else f"{path.name}:{strength:g}"
    return replace(given(name, path.read_bytes(), strength), source=source)


def plan(setup, suite, targets, methods, measures, scale=()):
    """All cells of a run, those that others need first.

    Args:
        targets: names. methods: list of ``Method``.
        measures: of ``MEASURES``. scale: of ``SCALE``.
    """
    cells = []
    for method in [Method(UNTOUCHED, {}), *methods]:
        name, settings = method.name, method.settings
        for target in targets:
            needs = ()
            if name != UNTOUCHED:
                train = Cell("train", name, settings, (target,))
                cells.append(train)
                needs = (train.key(setup),)
            cells += [Cell(measure, name, settings, (target,), needs) for measure in measures]
        if "preset" in settings:
            cells += _scale(setup, suite, name, settings, scale)
    return cells


MANY = (1, 5, 20, 100)
IN_SEQUENCE = 12


def _scale(setup, suite, method, settings, scale):
    """Cells that forget many concepts: patches made apart and added, or one after another."""
    cells, order = [], spread(suite)
    if "many" in scale:
        trains = [Cell("train", method, settings, (name,)) for name in order[: max(MANY)]]
        cells += trains
        keys = [train.key(setup) for train in trains]
        for number in MANY:
            if number <= len(order):
                names, needs = tuple(order[:number]), tuple(keys[:number])
                cells.append(Cell("many", method, settings, names, needs))
    if "sequence" in scale:
        first = tuple(order[:IN_SEQUENCE])
        cells.append(Cell("sequence", method, settings, first))
        cells.append(Cell("sequence", method, settings, first[::-1]))
    return cells


def spread(suite):
    """All concepts that may be forgotten, not the far ones, in an order that mixes them."""
    names = [name for name in suite.concepts if name not in suite.far]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
