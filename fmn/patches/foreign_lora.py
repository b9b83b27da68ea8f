"""LoRA files of any trainer, as changes of our layers.

Names differ in three ways: the path of a layer (diffusers' or CompVis', with dots or underscores),
what stands before it (``lora_unet_``, ``unet.``, ``base_model.model.``), and what the two factors
are called (kohya, PEFT, attention processors). Layers of transformers are in
``transformer_layers``.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from ..errors import ForgetError
from ..linalg import balanced_factors
from ..models.families import FAMILIES, Family, Layer, layers, text_layers
from ..models.transformer_layers import SHARES, place_of
from ..models.transformers import TRANSFORMERS, Transformer
from ..models.unknown_family import MAX_ENTRIES, family_of_model
from .file_check import MAX_RANK
from .file_kind import other_form, split_lora_key
from .foreign_file import ForeignFile
from .padding import Factors

MAX_CONFIG = 1 << 20  # bytes
PART = re.compile(r"^(unet|transformer)\.")  # of a pipeline
NO_DIRECTION = 1e-6  # of the largest singular value: float32's rounding
UNET_STARTS = ("lora_unet_", "diffusion_model.", "unet.", "model.diffusion_model.")
# Before the path in files of several encoders, and of one.
TEXT_STARTS = {
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
}  # fmt: skip


Modules = dict[str, dict[str, torch.Tensor]]  # name of a layer in a file -> factor -> tensor


@dataclass
class ForeignLora:
    """Changes by layer, and the keys that belong to no layer of the family.

    Attributes:
        changes: layer name -> (up [out, r], down [r, in]), float32, alpha taken in.
        unused: keys left out, such as biases.
    """

    family: Family
    changes: dict[str, Factors]
    unused: list[str] = field(default_factory=list)


def read_lora(file: ForeignFile, family: Family | Transformer | None = None) -> ForeignLora:
    """The changes that a LoRA file makes.

    Args:
        family: None takes the one whose layers fit.

    Raises:
        ForgetError: another kind of adapter, another kind of model, or factors that fit no layer.
    """
    name, tensors = file.name, file.tensors
    form = next(filter(None, map(other_form, tensors)), None)
    if form:
        raise ForgetError(
            f"'{name}' is a {form} file, whose change is no product of two matrices: merge it into "
            "a checkpoint with the program that made it, and import the checkpoint with --base."
        )
    modules: Modules = {}
    unused = []
    for key in tensors:
        split = split_lora_key(key)
        if split:
            modules.setdefault(split[0], {})[split[1]] = tensors[key]
        else:
            unused.append(key)
    if isinstance(family, Transformer):
        return _read_transformer(file, modules, unused, family)
    fits = [one for one in ([family] if family else FAMILIES.values()) if _fits(one, modules)]
    if not fits and not family and (entry := _transformer_of(file, modules)):
        return _read_transformer(file, modules, unused, entry)
    if len(fits) != 1:
        raise ForgetError(_no_family(name, list(modules), family, fits))
    changes: dict[str, Factors] = {}
    alpha = _alpha_beside(file)
    for module, parts in modules.items():
        layer = _layer(fits[0], module)
        if layer is None:
            unused += [f"{module}.{part}" for part in parts]
        elif layer.name in changes:
            raise ForgetError(f"'{name}' changes '{module:.80}' twice: get another file.")
        else:
            changes[layer.name] = _factors(name, module, layer, alpha | parts)
    return ForeignLora(fits[0], changes, sorted(unused))


@cache
def _unet_names(family: Family) -> dict[str, Layer]:
    names = {layer.name.replace(".", "_"): layer for layer in layers(family)}
    return names | {layer.compvis.replace(".", "_"): layer for layer in layers(family)}


@cache
def _text_names(family: Family, encoder: str) -> dict[str, Layer]:
    own = [layer for layer in text_layers(family) if layer.name.startswith(encoder + ".")]
    names = {layer.name.removeprefix(encoder + ".").replace(".", "_"): layer for layer in own}
    # Text encoders of newer transformers have no "text_model" in their paths.
    return names | {name.removeprefix("text_model_"): layer for name, layer in names.items()}


def _layer(family: Family, module: str) -> Layer | None:
    """The layer that a file calls ``module``, or None."""
    module = module.removeprefix("base_model.model.")
    for start, encoder in TEXT_STARTS.items():
        if module.startswith(start):
            return _text_names(family, encoder).get(_path(module[len(start) :]))
    for start in UNET_STARTS:
        module = module.removeprefix(start)
    names = _unet_names(family)
    path = _path(module)
    return names.get(path) or names.get(f"{path}_0")  # attention processors: to_out for to_out.0


def _path(module: str) -> str:
    return module.replace(".processor.", ".").removeprefix("base_model.model.").replace(".", "_")


def _fits(family: Family, modules: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    """Whether at least half of a file's layers are the family's, in the family's shapes."""
    known = [(layer, parts) for m, parts in modules.items() if (layer := _layer(family, m))]
    right = sum(_shape(parts) == (layer.shape[0], layer.shape[1]) for layer, parts in known)
    return bool(known) and right == len(known) and 2 * len(known) >= len(modules)


def _shape(parts: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """(outputs, inputs) of a change."""
    if "difference" in parts:
        return tuple(parts["difference"].shape[:2])
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None or down.dim() < 2 or up.dim() < 2:
        return ()
    return up.shape[0], down.shape[1]


def _no_family(
    name: str, modules: list[str], family: Family | None, fits: Sequence[Family | Transformer]
) -> str:
    if fits:
        titles = " or ".join(one.title for one in fits)
        return f"'{name}' fits {titles}: say which with --family."
    wanted = family.title if family else "any model that we know"
    return (
        f"'{name}' names layers such as '{modules[0]:.60}', which are not those of {wanted} in the "
        "right shapes: check which model it was made for."
    )


def _transformer_of(file: ForeignFile, modules: Modules) -> Transformer | None:
    """The transformer with the most of a file's layers, or None if there are none.

    Raises:
        ForgetError: several have all of them, and the metadata do not say which is meant.
    """
    counts = {
        entry: sum(place_of(entry, name) is not None for name in modules) for entry in TRANSFORMERS
    }
    most = max(counts.values())
    fits = [entry for entry, count in counts.items() if count == most]
    architecture = file.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    fits = [entry for entry in fits if entry.architecture == architecture] or fits
    if most and len(fits) > 1:
        raise ForgetError(_no_family(file.name, list(modules), None, fits))
    return fits[0] if most else None


def _read_transformer(
    file: ForeignFile, modules: Modules, unused: Sequence[str], entry: Transformer
) -> ForeignLora:
    name, alpha = file.name, _alpha_beside(file)
    places = {module: place_of(entry, module) for module in modules}
    unread = [*unused, *(module for module, place in places.items() if place is None)]
    if unread:
        raise ForgetError(
            f"'{name}' holds '{unread[0]:.80}', which is no layer of {entry.title} that can be "
            "imported: use Load LoRA in ComfyUI, or take it out of the file."
        )
    parts: dict[str, dict[int, Factors]] = {}  # by path, of the joined matrix
    counts: dict[str, int] = {}
    for module, place in places.items():
        assert place is not None
        found = parts.setdefault(place.path, {})
        if place.part in found or counts.setdefault(place.path, place.parts) != place.parts:
            raise ForgetError(f"'{name}' changes '{module:.80}' twice: get another file.")
        layer = Layer(module, place.path, _own_shape(name, module, modules[module]))
        found[place.part] = _factors(name, module, layer, alpha | modules[module])
    changes = {path: _joined(name, path, parts[path], count) for path, count in counts.items()}
    shapes = {path: (len(up), *down.shape[1:]) for path, (up, down) in changes.items()}
    family = family_of_model(entry.model, shapes, entry)
    return ForeignLora(family, {each.name: changes[each.compvis] for each in family.listed})


def _own_shape(name: str, module: str, parts: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape of the weight that a change of a transformer is for, within bounds."""
    tensors = [parts[key] for key in ("difference", "up", "down") if key in parts]
    shape = (*_shape(parts), *tensors[-1].shape[2:]) if tensors else ()
    dims = {tensor.dim() for tensor in tensors}
    if dims not in ({2}, {4}) or not 0 < math.prod(shape) <= MAX_ENTRIES or len(shape) < 2:
        raise ForgetError(
            f"'{name}' has no two factors of a weight of 1 to {MAX_ENTRIES} numbers for "
            f"'{module:.80}': download it again."
        )
    return shape


def _joined(name: str, path: str, parts: Mapping[int, Factors], count: int) -> Factors:
    """One change of a matrix of which a file has ``count`` parts, or some of them, apart."""
    if count == 1:
        return parts[0]
    heights = {len(up) / SHARES[part] for part, (up, _) in parts.items()}
    widths = {down.shape[1:] for _, down in parts.values()}
    rank, height = sum(len(down) for _, down in parts.values()), int(max(heights))
    if heights != {height} or len(widths) > 1 or rank > MAX_RANK or len(max(widths)) > 1:
        raise ForgetError(
            f"'{name}' changes parts of '{path:.80}' that do not fit together, or of rank {rank} "
            f"in all, and {MAX_RANK} is the most: check which model it was made for."
        )
    ups = [
        parts[part][0] if part in parts else torch.zeros(height * SHARES[part], 0)
        for part in range(count)
    ]
    return torch.block_diag(*ups), torch.cat([parts[part][1] for part in sorted(parts)])


def _alpha_beside(file: ForeignFile) -> dict[str, torch.Tensor]:
    """The alpha that PEFT keeps beside its tensors, in adapter_config.json, and diffusers in the
    header; kohya's is among the tensors."""
    text = file.metadata.get("lora_adapter_metadata", "")
    config = file.paths[0].with_name("adapter_config.json") if file.paths else None
    if config and file.paths[0].stem == "adapter_model" and config.is_file():
        text = config.read_bytes()[:MAX_CONFIG].decode("utf-8", "replace")
    if not text:
        return {}
    try:
        found = {PART.sub("", key): value for key, value in json.loads(text).items()}
        alpha = torch.tensor(float(found["lora_alpha"]))
        patterns = found.get("alpha_pattern") or found.get("use_rslora")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ForgetError(
            f"The PEFT settings of '{file.name}' do not say its lora_alpha: get the file again."
        ) from error
    if patterns:
        raise ForgetError(
            f"'{file.name}' scales its layers by alpha_pattern or use_rslora of PEFT: merge it "
            "into a model with PEFT, and import that with --base."
        )
    return {"alpha": alpha}


def _exact_factors(matrix: torch.Tensor) -> Factors:
    """Factors of a full difference at the rank it has, at most ``MAX_RANK``."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(MAX_RANK, max(1, int((s > NO_DIRECTION * s[0]).sum())))
    return balanced_factors(u, s, vh, rank)


def _factors(name: str, module: str, layer: Layer, parts: Mapping[str, torch.Tensor]) -> Factors:
    """(up, down) in the layer's own dimensions, alpha / rank taken into up."""
    if not all(part.is_floating_point() for key, part in parts.items() if key != "alpha"):
        raise ForgetError(
            f"'{name}' holds '{module:.80}' in numbers that are no floating point: use a copy in "
            "16 or 32 bits."
        )
    if "difference" in parts:
        up, down = _exact_factors(parts["difference"].float().flatten(1))
    else:
        up, down = parts["up"].float().flatten(1), parts["down"].float().flatten(1)
        if up.shape[1] != len(down):
            raise ForgetError(
                f"'{name}' has factors of ranks {up.shape[1]} and {len(down)} for '{module:.80}': "
                "download it again."
            )
        alpha = parts.get("alpha", torch.tensor(len(down)))
        if alpha.numel() != 1 or not 0 < len(down) <= MAX_RANK:
            raise ForgetError(
                f"'{name}' has rank {len(down)} and an alpha of shape {list(alpha.shape)} in "
                f"'{module:.80}'; a rank of 1 to {MAX_RANK} and one number were expected: get it "
                "again."
            )
        up = up * (float(alpha) / len(down))
    if not torch.isfinite(down.norm() * up.norm()):
        raise ForgetError(
            f"'{name}' holds NaN or infinite values in '{module:.80}': do not use it."
        )
    kernel = layer.shape[1:]
    if down.shape[1] != math.prod(kernel):
        raise ForgetError(
            f"'{name}' changes '{module:.80}' with another kernel than the model has: check which "
            "model it was made for."
        )
    if len(kernel) == 1:
        return up, down
    return up[:, :, None, None], down.unflatten(1, kernel)
