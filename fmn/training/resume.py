"""Training that goes on later: everything that it needs, in a file beside the patch.

The patch itself would not do: its factors are rounded to 16 bits and AdamW's memory is not in it.
Random numbers need no place here. They follow from the seed and from how many were drawn.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ForgetError
from ..files import MAX_HEADER, STATE_ENDING, open_safetensors, write_whole
from ..patches.patch import save_patch
from .loop import TOP_SCALE, Loop

FORMAT = "1"
MOMENTS = "exp_avg", "exp_avg_sq", "step"  # AdamW's, of each parameter
BEST, BESIDE = "best.", "beside."
GROW = "steps", "robust_steps"  # settings that may be raised to go on
MAX_STEPS = 1_000_000
RECORD = {
    "method": str, "settings": dict, "concepts": list, "family": str, "fingerprint": str,
    "prediction": str, "tries": int, "scale": float, "best": (list, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A training that can go on.

    Attributes:
        record: plain data; ``RECORD`` lists it. ``best`` is [loss, step] or None.
        losses: one a finished step.
        tensors: name -> float32 tensor: "LAYER.PART" of every trained parameter, its moments as
            "LAYER.PART.exp_avg" and so on, "best.LAYER.PART" if the best was kept, and what else
            learns, which is no part of the patch, as "beside.NAME" and "beside.NAME.exp_avg".
        name: of its file, for messages.
    """

    record: dict
    losses: list
    tensors: dict = field(repr=False)
    name: str = "the training state"

    def check(self, record):
        """Refuse to go on with anything but what was begun.

        Args:
            record: what would be trained now, with the first keys of ``RECORD``.
        """
        for key, what in (
            ("method", "the method"), ("concepts", "concepts"), ("family", "a model of family"),
            ("prediction", "a model of prediction"), ("fingerprint", "a base model of fingerprint"),
        ):  # fmt: skip
            if record[key] != self.record[key]:
                then, now = (_told(key, each[key]) for each in (self.record, record))
                raise ForgetError(
                    f"'{self.name}' was made with {what} {then}, and this is {now}: use the same, "
                    "or start anew."
                )
        then, now = self.record["settings"], record["settings"]
        for key in sorted(then.keys() | now.keys()):
            # More steps may be added. Any other change, and a falling rate, gives another training.
            if then.get(key) != now.get(key) and not (key in GROW and now.get(key)):
                raise ForgetError(
                    f"'{self.name}' was made with {key[:40]} {str(then.get(key, 'unset'))[:40]}, "
                    f"and this is {str(now.get(key, 'unset'))[:40]}: only steps may differ."
                )

    def put_on(self, parameters):
        """Set parameters as they were; returns the ``Loop`` to go on with.

        Args:
            parameters: name -> parameter, as in ``tensors``.
        """
        moments = self._put_on(parameters, beside=False)
        return Loop(self.losses, self.record["tries"], self.record["scale"], list(moments.values()))

    def put_beside(self, learned):
        """The same for what else learns; returns the moments of each, None for those without.

        Args:
            learned: name -> tensor, without "beside.".
        """
        learned = {BESIDE + name: tensor for name, tensor in learned.items()}
        moments = self._put_on(learned, beside=True)
        return {name.removeprefix(BESIDE): each for name, each in moments.items()}

    def _put_on(self, parameters, beside):
        trained = {name for name in _owners(self.tensors) if name.startswith(BESIDE) == beside}
        if trained != parameters.keys():
            odd = sorted(trained ^ parameters.keys())[0]
            raise ForgetError(
                f"'{self.name}' does not fit what is trained: '{odd[:80]}' is in one of them only."
            )
        for name, parameter in parameters.items():
            saved = self.tensors[name]
            if saved.shape != parameter.shape:
                raise ForgetError(
                    f"'{self.name}' has '{name}' of shape {list(saved.shape)}, and "
                    f"{list(parameter.shape)} is trained: use the state that this run saved."
                )
            with torch.no_grad():
                parameter.copy_(saved)
        return {name: self._moments(name, p.device) for name, p in parameters.items()}

    def _moments(self, name, device):
        found = {part: self.tensors.get(f"{name}.{part}") for part in MOMENTS}
        if found["step"] is None:
            return None
        step = found.pop("step").clone()
        return {part: each.to(device, copy=True) for part, each in found.items()} | {"step": step}

    def best(self):
        """(loss, step, name -> tensor) of the best so far, or None."""
        if self.record["best"] is None:
            return None
        start = len(BEST)
        kept = {name[start:]: t for name, t in self.tensors.items() if name.startswith(BEST)}
        return *self.record["best"], kept


def _owners(tensors):
    """Names of what is trained: neither moments nor kept as the best."""
    names = [name for name in tensors if not name.startswith(BEST)]
    return {name for name in names if name.rpartition(".")[2] not in MOMENTS}


def _told(key, value):
    if key == "concepts":
        value = ", ".join(str(c.get("name")) if isinstance(c, dict) else "?" for c in value)
    return f"'{str(value)[:60]}'"


def record_of(model, fingerprint, settings, concepts):
    """What has to be the same for a training to go on."""
    return {
        "method": settings.method,
        "settings": asdict(settings),
        "concepts": [concept.describe() for concept in concepts],
        "family": model.family.key if model.family.known else model.family.title,
        "fingerprint": fingerprint,
        "prediction": model.prediction,
    }


def state_of(record, parameters, loop, best=None, beside=None):
    """The ``State`` of a training; its tensors are copies on the CPU.

    Args:
        parameters: name -> parameter, in the order of ``loop.moments``.
        best: (loss, step, name -> tensor) or None.
        beside: name -> (tensor, its moments or None) of what else learns.
    """
    trained = {name: (own, each) for (name, own), each in zip(parameters.items(), loop.moments)}
    trained |= {BESIDE + name: both for name, both in (beside or {}).items()}
    tensors = {}
    for name, (own, moments) in trained.items():
        tensors[name] = own
        tensors |= {f"{name}.{part}": moments[part] for part in MOMENTS if moments}
    if best:
        tensors |= {BEST + name: tensor for name, tensor in best[2].items()}
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    more = {"tries": loop.tries, "scale": loop.scale, "best": list(best[:2]) if best else None}
    return State(record | more, list(loop.losses), tensors)


def state_path(path):
    """The file of a patch's training state: itself, if it is one already."""
    path = Path(path)
    if path.name.endswith(STATE_ENDING):
        return path
    return path.with_name(path.name.removesuffix(".safetensors") + STATE_ENDING)


def save_state(state, path):
    """Write the file; see ``files.write_whole``."""
    losses = torch.tensor(state.losses, dtype=torch.float64)
    metadata = {"fmn.train.format": FORMAT, "fmn.train": json.dumps(state.record)}
    tensors = state.tensors | {"losses": losses}
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))
    return Path(path)


def load_state(path):
    """Read and check a file that anyone may have made.

    Raises:
        ForgetError: it is not a whole, well-formed training state.
    """
    path = Path(path)
    with open_safetensors(path, "start anew", MAX_HEADER) as file:
        record = _record(path.name, file.metadata() or {})
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        wrong = [key for key in kinds if kinds[key] != ("F64" if key == "losses" else "F32")]
        if wrong or "losses" not in kinds or len(kinds) == 1:
            raise _damaged(path.name, f"tensors ({wrong[0]:.60})" if wrong else "tensors")
        tensors = {key: file.get_tensor(key) for key in kinds}
    losses = tensors.pop("losses")
    _check_tensors(path.name, record, losses, tensors)
    return State(record, losses.tolist(), tensors, path.name)


class Saves:
    """A step callback that writes the patch and the training's state every some steps.

    The state is several times as large as the patch, so only the newest of a run stays.

    Args:
        every: steps; 0 writes nothing.
        path_of: function from a step's index to the file of the patch.
    """

    def __init__(self, every, path_of):
        self.every, self.path_of, self.state = every, path_of, None

    def __call__(self, step):
        last = step.index == step.total
        if not self.every or step.training is None or (step.index % self.every and not last):
            return
        path = save_patch(step.training.patch(), self.path_of(step.index))
        state = save_state(step.training.state(), state_path(path))
        if self.state and self.state != state:
            self.state.unlink(missing_ok=True)
        self.state = state


def _damaged(name, what):
    return ForgetError(f"The {what} in '{name}' cannot be those of a training: start anew.")


def _record(name, metadata):
    if metadata.get("fmn.train.format") != FORMAT:
        found = metadata.get("fmn.train.format", "none")
        raise ForgetError(
            f"'{name}' is no training state (format {found:.20}, this version reads {FORMAT}): "
            f"choose the file that ends in {STATE_ENDING} beside a patch."
        )
    try:
        record = json.loads(metadata["fmn.train"])
        for key, kind in RECORD.items():
            if not isinstance(record[key], kind) or isinstance(record[key], bool):
                raise TypeError(key)
        best = record["best"]
        if best is not None and [type(each) for each in best] != [float, int]:
            raise TypeError("best")
        if best is not None and not (math.isfinite(best[0]) and best[1] > 0):
            raise ValueError("best")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ForgetError(
            f"The record in '{name}' is damaged ({type(error).__name__}): start anew."
        ) from error
    return {key: record[key] for key in RECORD}


def _check_tensors(name, record, losses, tensors):
    steps, scale = losses.numel(), record["scale"]
    if losses.dim() != 1 or not 0 < steps <= MAX_STEPS or not torch.isfinite(losses).all():
        raise _damaged(name, "losses")
    # A try that is no step halves the scale; each try is drawn again before the first step.
    if not steps <= record["tries"] <= steps + math.log2(TOP_SCALE):
        raise _damaged(name, f"{record['tries']} tries of {steps} steps")
    beside = tensors.get(BESIDE + "scale")
    scales = [scale] if beside is None else [scale, *beside.flatten().tolist()]
    if not all(1 <= each <= TOP_SCALE and math.log2(each).is_integer() for each in scales):
        raise _damaged(name, "scale")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _damaged(name, f"values of '{key[:60]}', not all finite,")
        owner, _, part = key.rpartition(".")
        if part in MOMENTS:
            _check_moments(name, owner, part, tensors, record["tries"])
    kept = {key.removeprefix(BEST) for key in tensors if key.startswith(BEST)}
    own = {key for key in _owners(tensors) if not key.startswith(BESIDE)}
    best = record["best"]
    if kept != (own if best else set()) or (best and best[1] > steps):
        raise _damaged(name, "best parameters")
    if any(tensors[BEST + key].shape != tensors[key].shape for key in kept):
        raise _damaged(name, "shapes of the best parameters")


def _check_moments(name, owner, part, tensors, tries):
    every = [tensors.get(f"{owner}.{each}") for each in MOMENTS]
    if owner not in tensors or any(each is None for each in every):
        raise _damaged(name, f"moments of '{owner[:60]}', which are not complete,")
    tensor = tensors[f"{owner}.{part}"]
    if part == "step":
        fits = tensor.dim() == 0 and 0 < float(tensor) <= tries and float(tensor).is_integer()
    else:
        fits = tensor.shape == tensors[owner].shape
        fits = fits and (part == "exp_avg" or not (tensor < 0).any())
    if not fits:
        raise _damaged(name, f"{part} of '{owner[:60]}'")
