"""The state that a training run is resumed from, in a file beside the patch.

The patch itself is not enough: its factors are rounded to 16 bits and it has no AdamW moments.
Random numbers are not stored. They follow from the seed and from how many batches were drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ..concepts.concept_list import concept_of
from ..errors import ForgetError
from ..files import MAX_HEADER, STATE_ENDING, open_safetensors, write_whole
from .loop import MAX_LOSS_SCALE, LoopState, Moments

FORMAT = "1"
MOMENTS = "exp_avg", "exp_avg_sq", "step"  # AdamW's, of each parameter
BEST, EXTRA = "best.", "beside."  # prefixes of tensor names
RAISABLE = "steps", "robust_steps"  # settings that may be raised to resume
MAX_STEPS = 1_000_000
RECORD: dict[str, type | tuple[type, ...]] = {
    "method": str, "settings": dict, "concepts": list, "family": str, "fingerprint": str,
    "prediction": str, "tries": int, "scale": float, "best": (list, type(None)),
}  # fmt: skip
# What learns and is no part of the patch: name -> (tensor, its moments or None)
ExtraState = Mapping[str, tuple[torch.Tensor, Moments | None]]


class Best(NamedTuple):
    """The best step so far: see ``run.TrainingOptions.keep_best``."""

    loss: float  # the mean that was lowest
    step: int
    parameters: dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingState:
    """A training run after one of its steps.

    Attributes:
        record: plain data; ``RECORD`` lists it. ``tries`` and ``scale`` are the loop's attempts
            and loss scale, ``best`` is [loss, step] or None.
        losses: one a finished step.
        tensors: name -> float32 tensor: "LAYER.PART" of every trained parameter, its moments as
            "LAYER.PART.exp_avg" and so on, "best.LAYER.PART" if the best was kept, and what else
            learns, which is no part of the patch, as "beside.NAME" and "beside.NAME.exp_avg".
        name: of its file, for messages.
    """

    record: dict[str, Any]
    losses: list[float]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    name: str = "the training state"

    @classmethod
    def of(
        cls,
        record: dict[str, Any],
        parameters: Mapping[str, torch.Tensor],
        loop: LoopState,
        best: Best | None = None,
        extra: ExtraState | None = None,
    ) -> TrainingState:
        """The state of a run; its tensors are copies on the CPU.

        Args:
            record: of ``Task.record``.
            parameters: by name, in the order of ``loop.moments``.
        """
        trained = {name: (p, m) for (name, p), m in zip(parameters.items(), loop.moments)}
        trained |= {EXTRA + name: both for name, both in (extra or {}).items()}
        tensors = {}
        for name, (tensor, moments) in trained.items():
            tensors[name] = tensor
            tensors |= {f"{name}.{part}": moments[part] for part in MOMENTS if moments}
        if best:
            tensors |= {BEST + name: tensor for name, tensor in best.parameters.items()}
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        record = record | {
            "tries": loop.attempts,
            "scale": loop.loss_scale,
            "best": [best.loss, best.step] if best else None,
        }
        return cls(record, list(loop.losses), tensors)

    def check(
        self,
        record: dict[str, Any],
        current: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Raise a ``ForgetError`` unless this is a state of what would be trained now.

        Args:
            record: of ``Task.record``.
            current: function from saved settings to the same under their present names.
        """
        for key, what in (
            ("method", "the method"), ("concepts", "concepts"), ("family", "a model of family"),
            ("prediction", "a model of prediction"), ("fingerprint", "a base model of fingerprint"),
        ):  # fmt: skip
            saved = self.record[key]
            if key == "concepts":
                saved = list(map(_normalised, saved))
            if record[key] != saved:
                raise ForgetError(
                    f"'{self.name}' was made with {what} {_shown(key, self.record[key])}, and this "
                    f"is {_shown(key, record[key])}: use the same, or start anew."
                )
        then, now = current(self.record["settings"]), record["settings"]
        for key in sorted(then):  # a setting that it lacks is newer
            # More steps may be added. Any other change gives another training.
            if then[key] != now.get(key) and not (key in RAISABLE and now.get(key)):
                raise ForgetError(
                    f"'{self.name}' was made with {key[:40]} {str(then[key])[:40]}, "
                    f"and this is {str(now.get(key, 'unset'))[:40]}: only steps may differ."
                )

    def restore(self, parameters: Mapping[str, torch.Tensor]) -> LoopState:
        """Set parameters, by name as in ``tensors``, to their state."""
        moments = self._copy_into(parameters, extra=False)
        attempts, scale = self.record["tries"], self.record["scale"]
        return LoopState(self.losses, attempts, scale, list(moments.values()))

    def restore_extra(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Moments | None]:
        """Set what else learns, by name, to its state; returns the moments of each."""
        tensors = {EXTRA + name: tensor for name, tensor in tensors.items()}
        moments = self._copy_into(tensors, extra=True)
        return {name.removeprefix(EXTRA): each for name, each in moments.items()}

    def _copy_into(
        self, parameters: Mapping[str, torch.Tensor], extra: bool
    ) -> dict[str, Moments | None]:
        saved = {name for name in _trained(self.tensors) if name.startswith(EXTRA) == extra}
        if saved != parameters.keys():
            odd = sorted(saved ^ parameters.keys())[0]
            raise ForgetError(
                f"'{self.name}' does not fit what is trained: '{odd[:80]}' is in one of them only."
            )
        for name, parameter in parameters.items():
            tensor = self.tensors[name]
            if tensor.shape != parameter.shape:
                raise ForgetError(
                    f"'{self.name}' has '{name}' of shape {list(tensor.shape)}, and "
                    f"{list(parameter.shape)} is trained: use the state that this run saved."
                )
            with torch.no_grad():
                parameter.copy_(tensor)
        return {name: self._moments(name, p.device) for name, p in parameters.items()}

    def _moments(self, name: str, device: torch.device) -> Moments | None:
        if f"{name}.step" not in self.tensors:
            return None
        # AdamW keeps its step count on the CPU.
        return {
            part: self.tensors[f"{name}.{part}"].to("cpu" if part == "step" else device, copy=True)
            for part in MOMENTS
        }

    def best(self) -> Best | None:
        if self.record["best"] is None:
            return None
        names = [name for name in self.tensors if name.startswith(BEST)]
        kept = {name.removeprefix(BEST): self.tensors[name] for name in names}
        loss, step = self.record["best"]
        return Best(loss, step, kept)


def _normalised(concept: Any) -> Any:
    """A saved concept as names are read now; older versions kept invisible characters."""
    try:
        return concept_of(concept).describe()
    except ForgetError:
        return concept  # another one than is trained


def _trained(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of trained tensors: neither moments nor kept as the best."""
    names = [name for name in tensors if not name.startswith(BEST)]
    return {name for name in names if name.rpartition(".")[2] not in MOMENTS}


def _shown(key: str, value: Any) -> str:
    if key == "concepts":
        value = ", ".join(str(c.get("name")) if isinstance(c, dict) else "?" for c in value)
    return f"'{str(value)[:60]}'"


def state_path(path: str | Path) -> Path:
    """The file of a patch's training state: itself, if it is one already."""
    path = Path(path)
    if path.name.endswith(STATE_ENDING):
        return path
    stem = path.stem if path.suffix.lower() == ".safetensors" else path.name
    return path.with_name(stem + STATE_ENDING)


def save_state(state: TrainingState, path: str | Path) -> Path:
    """Write the file; see ``files.write_whole``."""
    losses = torch.tensor(state.losses, dtype=torch.float64)
    metadata = {"fmn.train.format": FORMAT, "fmn.train": json.dumps(state.record)}
    tensors = state.tensors | {"losses": losses}
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))
    return Path(path)


def load_state(path: str | Path) -> TrainingState:
    """Read and check a file that anyone may have made.

    Raises:
        ForgetError: it is not a whole, well-formed training state.
    """
    path = Path(path)
    with open_safetensors(path, "start anew", MAX_HEADER) as file:
        record = _record(path.name, file.metadata() or {})
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        wrong = [key for key in dtypes if dtypes[key] != ("F64" if key == "losses" else "F32")]
        if wrong or "losses" not in dtypes or len(dtypes) == 1:
            what = f"tensor '{wrong[0]:.60}'" if wrong else "list of tensors"
            raise _damaged(path.name, what)
        tensors = {key: file.get_tensor(key) for key in dtypes}
    losses = tensors.pop("losses")
    _check_tensors(path.name, record, losses, tensors)
    return TrainingState(record, losses.tolist(), tensors, path.name)


def _damaged(name: str, what: str) -> ForgetError:
    return ForgetError(f"'{name}' is damaged: its {what} cannot come from training; start anew.")


def _record(name: str, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("fmn.train.format") != FORMAT:
        other = metadata.get("fmn.train.format", "none")
        raise ForgetError(
            f"'{name}' is no training state (format {other:.20}, this version reads {FORMAT}): "
            f"choose the file that ends in {STATE_ENDING} beside a patch."
        )
    try:
        record = json.loads(metadata["fmn.train"])
        for key, kind in RECORD.items():
            if not isinstance(record[key], kind) or isinstance(record[key], bool):
                raise TypeError(key)
        best = record["best"]
        if best is not None and [type(value) for value in best] != [float, int]:
            raise TypeError("best")
        if best is not None and not (math.isfinite(best[0]) and best[1] > 0):
            raise ValueError("best")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ForgetError(
            f"The record in '{name}' is damaged ({type(error).__name__}): start anew."
        ) from error
    return {key: record[key] for key in RECORD}


def _check_tensors(
    name: str, record: dict[str, Any], losses: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    steps, attempts = losses.numel(), record["tries"]
    if losses.dim() != 1 or not 0 < steps <= MAX_STEPS or not torch.isfinite(losses).all():
        raise _damaged(name, "list of losses")
    # An attempt that is no step halves the scale. Resuming draws the batch of each attempt again.
    if not steps <= attempts <= steps + math.log2(MAX_LOSS_SCALE):
        raise _damaged(name, f"number of attempts, {attempts} for {steps} steps,")
    extra = tensors.get(EXTRA + "scale")
    scales = [record["scale"], *(extra.flatten().tolist() if extra is not None else [])]
    if not all(1 <= s <= MAX_LOSS_SCALE and math.log2(s).is_integer() for s in scales):
        raise _damaged(name, "loss scale")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _damaged(name, f"tensor '{key[:60]}', which is not finite,")
        owner, _, part = key.rpartition(".")
        if part in MOMENTS:
            _check_moments(name, owner, part, tensors, attempts)
    kept = {key.removeprefix(BEST) for key in tensors if key.startswith(BEST)}
    parameters = {key for key in _trained(tensors) if not key.startswith(EXTRA)}
    best = record["best"]
    if kept != (parameters if best else set()) or (best and best[1] > steps):
        raise _damaged(name, "list of best parameters")
    if any(tensors[BEST + key].shape != tensors[key].shape for key in kept):
        raise _damaged(name, "shapes of the best parameters")


def _check_moments(
    name: str, owner: str, part: str, tensors: dict[str, torch.Tensor], attempts: int
) -> None:
    if any(key not in tensors for key in (owner, *(f"{owner}.{other}" for other in MOMENTS))):
        raise _damaged(name, f"set of moments of '{owner[:60]}', which is not complete,")
    tensor = tensors[f"{owner}.{part}"]
    if part == "step":
        fits = tensor.dim() == 0 and 0 < float(tensor) <= attempts and float(tensor).is_integer()
    else:
        fits = tensor.shape == tensors[owner].shape
        fits = fits and (part == "exp_avg" or not (tensor < 0).any())
    if not fits:
        raise _damaged(name, f"{part} of '{owner[:60]}'")
