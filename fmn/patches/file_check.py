"""What a patch file claims to be and holds, checked before any of its tensors is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ForgetError
from ..models import unknown_family
from ..models.families import FAMILIES, Family, Layer
from ..models.transformers import BY_KEY
from .file_kind import LORA, kind_of
from .lora_keys import ALPHA, known_names, split_key
from .metadata import FORMAT

MAX_RANK = 1024
DTYPES = "F16", "BF16", "F32"  # that a file may have
Slices = Mapping[str, Any]  # tensor name -> slice of ``safetensors.safe_open``
Keys = Mapping[str, Mapping[str, str]]  # prefix of a layer -> part -> key, see ``split_key``


def claimed_family(name: str, metadata: Mapping[str, str], factors: Keys, slices: Slices) -> Family:
    """The family that the metadata name.

    Raises:
        ForgetError: it is no forget patch, or for no family that we know.
    """
    if "fmn.train.format" in metadata:
        raise ForgetError(
            f"'{name}' is a training state, from which a training is resumed, and no patch: "
            "choose the patch beside it."
        )
    if "fmn.format" not in metadata:
        kind = kind_of(slices)
        what = f" but {kind}" if kind else ""
        use = "Use Load LoRA, or 'python -m fmn import', for other LoRA files."
        raise ForgetError(
            f"'{name}' is not a forget patch{what}: it lacks our metadata. "
            f"{use if kind in (LORA, None) else 'Choose a file that Save Forget Patch wrote.'}"
        )
    if metadata["fmn.format"] != FORMAT:
        raise ForgetError(
            f"'{name}' has patch format {metadata['fmn.format']!r:.20}, this version reads "
            f"{FORMAT}: update Forget-Me-Not."
        )
    key = metadata.get("fmn.base.family", "")
    if key == unknown_family.KEY:
        shapes = {
            prefix: {part: slices[key].get_shape() for part, key in keys.items()}
            for prefix, keys in factors.items()
        }
        entry = BY_KEY.get(metadata.get("fmn.base.transformer", ""))
        return unknown_family.family_of_file(name, metadata.get("fmn.base.model"), entry, shapes)
    if key not in FAMILIES:
        raise ForgetError(
            f"'{name}' is for the unknown model family "
            f"{key!r:.40}; known are {', '.join(FAMILIES)}, {unknown_family.KEY}."
        )
    return FAMILIES[key]


def split_keys(name: str, keys: Iterable[str]) -> Keys:
    """The keys of a file by layer and part."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        prefix, part = split_key(key)
        if part in layers.setdefault(prefix, {}):
            raise ForgetError(f"'{name}' names the layer '{prefix:.80}' twice: get another file.")
        layers[prefix][part] = key
    return layers


def check_tensors(name: str, family: Family, factors: Keys, slices: Slices) -> dict[str, Layer]:
    """Prefix in the file -> layer, if every key is known, every layer complete and fitting."""
    known = known_names(family)
    for prefix, keys in factors.items():
        if prefix not in known or "" in keys:
            key = keys.get("", next(iter(keys.values())))
            raise ForgetError(
                f"'{name}' holds the tensor {key!r:.80}, which {family.title} does not have: "
                "it is for another model, or no forget patch."
            )
    layers = {prefix: known[prefix] for prefix in factors}
    if not layers:
        raise ForgetError(f"'{name}' holds no layers: it would change nothing.")
    seen = set()
    for prefix, layer in layers.items():
        if layer.name in seen:
            raise ForgetError(f"'{name}' names the layer '{prefix}' twice: get another file.")
        seen.add(layer.name)
        keys = factors[prefix]
        missing = [part for part in ("down", "up") if part not in keys]
        if missing:
            raise ForgetError(f"'{name}' lacks '{prefix}.lora_{missing[0]}.weight': get it again.")
        parts = [slices[keys[part]] if part in keys else None for part in ("down", "up", ALPHA)]
        _check_layer(name, layer, parts)
    return layers


def _check_layer(name: str, layer: Layer, slices: Sequence[Any]) -> None:
    for tensor in filter(None, slices):
        if tensor.get_dtype() not in DTYPES:
            raise ForgetError(
                f"'{name}' stores '{layer.name}' as {tensor.get_dtype()}; "
                "a patch has 16- or 32-bit floating-point numbers only."
            )
    down, up, alpha = (tuple(tensor.get_shape()) if tensor else () for tensor in slices)
    rank = down[0] if down else 0
    kernel = (1,) * (len(layer.shape) - 2)
    fits = (
        0 < rank <= MAX_RANK
        and down == (rank, *layer.shape[1:])
        and up == (layer.shape[0], rank, *kernel)
        and alpha in ((), (1,))
    )
    if not fits:
        raise ForgetError(
            f"'{name}' does not fit '{layer.name}' of shape {list(layer.shape)}: "
            f"it has lora_down {list(down)!s:.40}, lora_up {list(up)!s:.40}, alpha "
            f"{list(alpha)!s:.40}."
        )
