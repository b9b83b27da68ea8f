"""Cells: the smallest pieces of a bench, each known by a hash of all that decides its result."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from safetensors.torch import load

from ... import __version__
from ...errors import ForgetError
from ...files import file_and_strength
from ...methods import PRESETS, check_preset, revision, settings_of
from ...patches.patch import load_patch
from ...patches.scores import Source, tensor_hash
from ...settings import Settings
from ..names import UNTOUCHED
from ..suite import Suite

FORMAT = 2  # raise it when cells' meaning changes: stored results are then made anew
FORMATS = {"train": 1, "mscore": 1, "inversion": 3}  # of work that changed at other times


@dataclass(frozen=True)
class Setup:
    """What all cells of a run share. Plain data, so that it can go to another machine.

    Attributes:
        suite: the suite's content, as read from YAML.
        model: ``demo``, a checkpoint or a folder.
        fingerprint: of the model's weights.
        judge, check, clip: judge specs, "" for none.
        controls: folder of strips of pictures, or "".
        judges: hash of all files of judges, controls and VAE.
        count: pictures a question.
        seed: of everything drawn at random.
        vae, prediction: as given for the model, or "".
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
    vae: str = ""
    prediction: str = ""

    def identity(self) -> dict:
        """All of it that decides results, as plain data; where files lie does not."""
        judges = {
            name: re.sub(r"^clip:.*?(\+nudenet)?$", r"clip:\1", getattr(self, name))
            for name in ("judge", "check", "clip")
        }
        data = asdict(self) | {"model": "", "controls": ""} | judges
        del data["vae"]
        if not self.prediction:
            del data["prediction"]  # as in stores that are older
        return data

    def key(self) -> str:
        """Short hash of ``identity``."""
        return _hash(self.identity())[:12]


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        work: ``train`` or a measure.
        method: as the user named it.
        settings: of ``Method``.
        targets: names; one, except for measures of many concepts at once.
        needs: keys of the cells whose patches are applied.
        options: further settings of the measure.
    """

    work: str
    method: str
    settings: dict
    targets: tuple[str, ...]
    needs: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)

    def key(self, setup: Setup) -> str:
        """Hash of everything that decides the result; where files lie does not."""
        number = FORMATS.get(self.work, FORMAT)
        identity = {"format": number, "version": __version__, "setup": setup.identity()}
        return _hash(identity | {"cell": asdict(self)})[:32]


@dataclass(frozen=True)
class CellProgress:
    """What the callback gets after each cell."""

    done: int  # cells of this run and earlier ones
    total: int
    cell: Cell
    seconds: float | None  # None: it failed
    error: str = ""


def _hash(data: dict) -> str:
    text = json.dumps(data, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """A way to forget that is measured.

    Attributes:
        name: as it stands in tables.
        settings: plain data: a preset and its settings, or the hash and strength of a patch.
        patch: bytes of the patch file, if there is one already.
        source: of that file, if it is known.
        files: of a folder of patches: name of a target -> the one that forgets it.
    """

    name: str
    settings: dict
    patch: bytes | None = field(default=None, repr=False)
    source: Source | None = field(default=None, repr=False)
    files: dict[str, "Method"] = field(default_factory=dict, repr=False)

    def on(self, target: str) -> "Method":
        """What is measured on a target: this, or the folder's patch for it."""
        return self.files[target] if self.files else self


def parse_method(text: str) -> Method:
    """A ``Method`` from ``resteer``, ``resteer:steps=100,lr=0.001``, FILE, FILE:STRENGTH or
    FOLDER."""
    name, _, assignments = text.partition(":")
    if name not in PRESETS:
        return _file_method(text)
    changes = {}
    for assignment in filter(None, assignments.split(",")):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ForgetError(
                f"'{assignment}' in method '{text}' is not a setting: write name=value."
            )
        changes[key.strip()] = _value(value.strip())
    return trained(text, name, settings_of(name, changes))


def trained(name: str, preset: str, settings: Settings) -> Method:
    """A ``Method`` that trains a patch for each target."""
    # Former names of settings, and no revision 1: so stores that exist keep their cells.
    values = {
        f.metadata.get("formerly") or f.name: getattr(settings, f.name) for f in fields(settings)
    }
    data: dict = {"preset": preset, "settings": values}
    number = revision(preset)
    return Method(name, data | {"revision": number} if number > 1 else data)


def given(name: str, patch: bytes, strength: float = 1.0) -> Method:
    """A ``Method`` that is a patch file, as bytes: nothing is trained.

    It is identified by its tensors alone: the same patch made on another day is measured once.
    """
    return Method(name, {"sha256": tensor_hash(load(patch))[:32], "strength": strength}, patch)


def _value(text: str) -> object:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def _file_method(text: str) -> Method:
    if text and Path(text).is_dir():
        return _folder_method(Path(text))
    file, strength = file_and_strength(text)
    path = Path(file)
    if not path.is_file():
        if path.suffix.lower() != ".safetensors" and len(path.parts) < 2:
            check_preset(text.partition(":")[0])
        raise ForgetError(f"There is no patch file '{file}': check the name and its folder.")
    source = load_patch(path).source  # refused now rather than in the middle of the run
    name = path.name if strength == 1 else f"{path.name}:{strength:g}"
    return replace(given(name, path.read_bytes(), strength), source=source)


def _folder_method(folder: Path) -> Method:
    """A folder of patches as one method: each is measured on what it forgets."""
    files: dict[str, Method] = {}
    for path in sorted(folder.glob("*.safetensors")):
        patch, method = load_patch(path), given(path.name, path.read_bytes())
        for concept in patch.concepts:
            if concept in files:
                raise ForgetError(
                    f"'{folder.name}' has two patches that forget '{concept:.80}': leave one there."
                )
            files[concept] = method
    if not files:
        raise ForgetError(
            f"'{folder}' holds no patches: put forget patches there, one a target; 'python -m fmn "
            "import' makes them of other tools' files."
        )
    settings = {concept: method.settings for concept, method in files.items()}
    return Method(folder.resolve().name, settings, files=files)


def plan(
    setup: Setup,
    suite: Suite,
    targets: Sequence[str],
    methods: Sequence[Method],
    measures: Sequence[str],
    scale: Sequence[str] = (),
) -> list[Cell]:
    """All cells of a run, those that others need first.

    Args:
        targets: names.
        measures: of ``names.MEASURES``.
        scale: of ``names.SCALE``.
    """
    cells = []
    for method in [Method(UNTOUCHED, {}), *methods]:
        name = method.name
        for target in targets:
            settings = method.on(target).settings
            needs: tuple[str, ...] = ()
            if name != UNTOUCHED:
                train = Cell("train", name, settings, (target,))
                cells.append(train)
                needs = (train.key(setup),)
            cells += [Cell(measure, name, settings, (target,), needs) for measure in measures]
        if "preset" in method.settings:
            cells += _scale(setup, suite, method, scale)
    return cells


MANY = (1, 5, 20, 100)
IN_SEQUENCE = 12


def _scale(setup: Setup, suite: Suite, method: Method, scale: Sequence[str]) -> list[Cell]:
    """Cells that forget many concepts: patches made apart and added, or one after another."""
    cells, names = [], shuffled_concepts(suite)
    if "many" in scale:
        trains = [Cell("train", method.name, method.settings, (n,)) for n in names[: max(MANY)]]
        cells += trains
        keys = tuple(train.key(setup) for train in trains)
        cells += [
            Cell("many", method.name, method.settings, tuple(names[:number]), keys[:number])
            for number in MANY
            if number <= len(names)
        ]
    if "sequence" in scale:
        first = tuple(names[:IN_SEQUENCE])
        for order in (first, first[::-1]):
            cells.append(Cell("sequence", method.name, method.settings, order))
    return cells


def shuffled_concepts(suite: Suite) -> list[str]:
    """All concepts except the far ones, in an order that mixes them and never changes."""
    names = [name for name in suite.concepts if name not in suite.far]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
