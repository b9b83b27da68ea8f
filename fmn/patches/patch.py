"""The forget patch: low-rank changes with a record of what they forget, kept as a LoRA file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from ..errors import ForgetError, NonFiniteLoss
from ..files import MAX_HEADER, AnyPath, data_hash, open_safetensors, write_whole
from ..linalg import full_change
from ..models import unknown_family
from ..models.families import FAMILIES, Family, Layer, layers_by_name
from .file_kind import LORA, kind_of
from .lora_keys import ALPHA, PARTS, file_name, known_names, tag_name
from .metadata import FORMAT, HASH, THUMBNAIL, Info, is_changed, read_info
from .padding import Factors, padded, ranks, without_padding
from .scores import SCORES, Source, tensor_hash

MAX_RANK = 1024
DTYPES = "F16", "BF16", "F32"  # that a file may have
Slices = Mapping[str, Any]  # tensor name -> slice of ``safetensors.safe_open``


@dataclass
class ForgetPatch:
    """Low-rank changes to a U-Net of one family, to its text encoders, or to both.

    Attributes:
        changes: layer name -> (up [out, r], down [r, in]), CPU tensors whose product is added to
            the weight at strength 1. Conv2d factors carry their kernel dimensions.
        info: the record, plain data for JSON; see ``metadata.new_info``.
        source: the file that this is the content of; None if there is none.
    """

    family: Family
    changes: dict[str, Factors]
    info: Info = field(default_factory=dict)
    source: Source | None = None

    @property
    def concepts(self) -> list[str]:
        """Names of the concepts that it forgets."""
        return [concept["name"] for concept in self.info.get("concepts", [])]

    @property
    def ranks(self) -> list[int]:
        """Different ranks of its layers, rising."""
        return sorted(ranks(self.changes))

    @property
    def layers(self) -> list[Layer]:
        """The ``Layer`` of each change, in the family's order."""
        known = layers_by_name(self.family).items()
        return [layer for name, layer in known if name in self.changes]

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder, and so has to be applied to the CLIP too."""
        return any(layer.is_text for layer in self.layers)

    @property
    def changes_unet(self) -> bool:
        return any(not layer.is_text for layer in self.layers)

    def check_family(self, family: Family) -> None:
        """Refuse a model of another family. Another base of the same family is fine: patches
        transfer between fine-tunes."""
        if not self.family.is_same(family):
            raise ForgetError(
                f"This patch is for {self.family.title}, the model is {family.title}: "
                "use a patch made for the model's family."
            )

    def check_shapes(self, weight_of: Callable[[Layer], torch.Tensor], text: bool = False) -> None:
        """Refuse a variant of the family whose layers have other shapes.

        Args:
            weight_of: function from a ``Layer`` to the model's weight.
            text: check the text encoders' layers, not the U-Net's.
        """
        for layer in self.layers:
            if layer.is_text == text and tuple(weight_of(layer).shape) != layer.shape:
                raise ForgetError(
                    f"The patch changes '{layer.compvis}' of shape {list(layer.shape)}, the model "
                    f"has {list(weight_of(layer).shape)}: use a patch made for this variant."
                )

    def change_of(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The full float32 change of one layer, [out, in] or [out, in, kh, kw]."""
        up, down = self.changes[name]
        return full_change(up.to(device), down.to(device))

    def lora(
        self, dtype: torch.dtype = torch.float16, layers: Sequence[Layer] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of a LoRA file: lora_down [r, in] and lora_up [out, r] of a layer, and alpha
        where ranks differ. Layers are those of ``padding.padded``.

        Args:
            layers: of ``self.layers`` those that are wanted, and no others; None: a whole file.
        """
        wanted = self.layers if layers is None else layers
        changes = {layer: _balanced(*self.changes[layer.name]) for layer in wanted}
        if layers is None:
            changes = padded(self.family, changes)
        tensors, ranks_differ = {}, len(ranks(changes)) > 1
        for layer, (up, down) in changes.items():
            prefix = file_name(self.family, layer)
            for part, value in zip(PARTS, (down, up)):
                tensors[f"{prefix}.{part}"] = value.to(dtype).contiguous()
            if ranks_differ:
                tensors[f"{prefix}.{ALPHA}"] = torch.tensor(float(len(down)), dtype=dtype)
        return tensors


def _balanced(up: torch.Tensor, down: torch.Tensor) -> Factors:
    """The same change by float32 factors of equal norm, both far from float16's underflow."""
    up, down = up.float(), down.float()
    up_norm, down_norm = up.norm(), down.norm()
    if up_norm == 0 or down_norm == 0:
        return torch.zeros_like(up), down
    scale = (down_norm / up_norm).sqrt()
    return up * scale, down / scale


def rounding_error(patch: ForgetPatch, tensors: Mapping[str, torch.Tensor]) -> float:
    """Relative Frobenius error of a file's changes, over all layers.

    Args:
        tensors: of ``patch.lora()``.
    """
    difference = total = 0.0
    for layer in patch.layers:
        prefix = file_name(patch.family, layer)
        down, up = (tensors[f"{prefix}.{part}"] for part in PARTS)
        exact_up, exact_down = patch.changes[layer.name]
        difference += square_norm(
            torch.cat([exact_up, -up.to(exact_up)], 1),
            torch.cat([exact_down, down.to(exact_down)]),
        )
        total += square_norm(exact_up, exact_down)
    return (difference / total) ** 0.5 if total > 0 else 0.0


def square_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """|up @ down|^2 without the product: a small file can stand for a huge matrix."""
    up, down = up.flatten(1).double(), down.flatten(1).double()
    return max(float(((up.mT @ up) * (down @ down.mT)).sum()), 0.0)


def _metadata(patch: ForgetPatch, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Texts of the header: our record, and the keys by which other programs label the file."""
    # A loaded patch was rounded before; rounding it again loses nothing.
    lost = max(rounding_error(patch, tensors), patch.info.get("rounding_error", 0.0))
    info = patch.info | {"rounding_error": lost}
    # A command line can pass undecodable bytes.
    names = ", ".join(patch.concepts).encode("utf-8", "replace").decode()
    rank = str(patch.ranks[0]) if len(patch.ranks) == 1 else "Dynamic"
    prediction = info.get("base.prediction", "epsilon")
    architecture, base_version = patch.family.architecture, patch.family.base_version
    if prediction == "v" and patch.family.key == "sd2":
        architecture, base_version = "stable-diffusion-v2-768-v", "sd_v2_v"
    side = patch.family.resolution
    metadata = {f"fmn.{key}": json.dumps(value) for key, value in info.items()}
    if not patch.family.known:
        metadata["fmn.base.model"] = patch.family.title
    return metadata | {
        "fmn.format": FORMAT,
        "fmn.base.family": patch.family.key,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": patch.family.implementation,
        "modelspec.title": f"Forget {names}",
        "modelspec.description": f"Makes {patch.family.title} forget: {names}",
        "modelspec.date": info.get("date", ""),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": prediction,
        "ss_base_model_version": base_version,
        "ss_v2": str(patch.family.key == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": tag_name(f"forget {names}"),
        HASH: data_hash(BytesIO(save(dict(tensors)))),
    }


def save_patch(patch: ForgetPatch, path: AnyPath, thumbnail: str | None = None) -> Path:
    """Write the file, whole or not at all.

    Args:
        thumbnail: a picture for lists of patches, see ``images.thumbnail_uri``.

    Raises:
        ForgetError: the folder cannot be written to, the disk is full, or the changes are too
            large for float16.
    """
    tensors = patch.lora()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ForgetError(
            "The patch's changes are too large for 16-bit numbers: train with fewer steps or a "
            "lower learning rate."
        )
    metadata = _metadata(patch, tensors)
    if thumbnail:
        metadata[THUMBNAIL] = thumbnail
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))
    return Path(path)


def file_size(patch: ForgetPatch) -> int:
    """Bytes of the file that ``save_patch`` writes."""
    tensors = patch.lora()
    return len(save(tensors, metadata=_metadata(patch, tensors)))


def rescue(error: NonFiniteLoss, path: AnyPath) -> NonFiniteLoss:
    """Save the last good patch of a training that diverged; returns the error to show instead."""
    if error.patch is None:
        return error
    try:
        message = f"The patch of the last good step is {save_patch(error.patch, path)}."
    except ForgetError as failed:
        message = str(failed)
    return NonFiniteLoss(f"{error} {message}", error.losses)


def load_patch(path: AnyPath) -> ForgetPatch:
    """Read and check an untrusted file. Nothing is loaded before all shapes are checked.

    Raises:
        ForgetError: it is not a whole, well-formed forget patch.
    """
    path = Path(path)
    with open_safetensors(path, max_header=MAX_HEADER) as file:
        metadata = file.metadata() or {}
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
        family = _family(path.name, metadata, slices)
        layers = _check_tensors(path.name, family, slices)
        tensors = {key: file.get_tensor(key) for key in slices}
        with open(path, "rb") as data:
            changed = is_changed(metadata, data_hash(data))
    changes = {}
    for prefix, layer in layers.items():
        down, up = (tensors[f"{prefix}.{part}"].float() for part in PARTS)
        if f"{prefix}.{ALPHA}" in tensors:
            up = up * (tensors[f"{prefix}.{ALPHA}"].float() / down.shape[0])
        # The product of the norms bounds every entry of the change. alpha may make up infinite
        # while their product is finite.
        if not torch.isfinite(down.norm() * up.norm()):
            raise ForgetError(
                f"'{path.name}' holds NaN or infinite values in '{prefix}': "
                "its training failed, so do not use it."
            )
        changes[layer.name] = up, down
    if HASH in metadata:  # older files have no padding
        changes = without_padding(family, changes)
    info = read_info(path.name, metadata)
    if changed:
        info = {key: info[key] for key in info if key not in SCORES} | {"changed": True}
    source = Source(path.resolve(), tensor_hash(tensors), changed is not None)
    return ForgetPatch(family, changes, info, source)


def _family(name: str, metadata: Mapping[str, str], slices: Slices) -> Family:
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
        shapes = {part: slices[part].get_shape() for part in slices}
        return unknown_family.family_of_file(name, metadata.get("fmn.base.model"), shapes)
    if key not in FAMILIES:
        raise ForgetError(
            f"'{name}' is for the unknown model family "
            f"{key!r:.40}; known are {', '.join(FAMILIES)}, {unknown_family.KEY}."
        )
    return FAMILIES[key]


def _check_tensors(name: str, family: Family, slices: Slices) -> dict[str, Layer]:
    """Prefix in the file -> layer, if every key is known, every layer complete and fitting."""
    known = known_names(family)
    layers: dict[str, Layer] = {}
    for key in slices:
        prefix, _, part = key.partition(".")
        if prefix not in known or part not in (*PARTS, ALPHA):
            raise ForgetError(
                f"'{name}' holds the tensor {key!r:.80}, which {family.title} does not have: "
                "it is for another model, or no forget patch."
            )
        layers[prefix] = known[prefix]
    if not layers:
        raise ForgetError(f"'{name}' holds no layers: it would change nothing.")
    seen = set()
    for prefix, layer in layers.items():
        if layer.name in seen:
            raise ForgetError(f"'{name}' names the layer '{prefix}' twice: get another file.")
        seen.add(layer.name)
        missing = [part for part in PARTS if f"{prefix}.{part}" not in slices]
        if missing:
            raise ForgetError(f"'{name}' lacks '{prefix}.{missing[0]}': get it again.")
        _check_layer(name, layer, [slices.get(f"{prefix}.{part}") for part in (*PARTS, ALPHA)])
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
