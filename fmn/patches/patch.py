"""The forget patch: low-rank changes with a record of what they forget, kept as a LoRA file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save

from ..errors import ForgetError, NonFiniteLoss
from ..files import MAX_HEADER, AnyPath, data_hash, open_safetensors, write_whole
from ..linalg import full_change
from ..models.families import Family, Layer, layers_by_name
from ..models.unknown_family import UnknownFamily
from .file_check import check_tensors, claimed_family, split_keys
from .lora_keys import ALPHA, KOHYA, PARTS, file_names, tag_name
from .metadata import FORMAT, HASH, THUMBNAIL, Info, is_changed, read_info
from .padding import Factors, padded, ranks, without_padding
from .scores import SCORES, Source, tensor_hash


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
        where ranks differ (see ``lora_keys``). Layers are those of ``padding.padded``.

        Args:
            layers: of ``self.layers`` those that are wanted, and no others, by kohya's names, which
                every ComfyUI reads; None: a whole file.
        """
        wanted = self.layers if layers is None else layers
        changes = {layer: _balanced(*self.changes[layer.name]) for layer in wanted}
        if layers is None:
            changes = padded(self.family, changes)
        style = "" if layers is None else KOHYA
        names, tensors = file_names(self.family, changes, style), {}
        with_alpha = len(ranks(changes)) > 1 and names.parts == PARTS
        for layer, (up, down) in changes.items():
            for key, value in zip(names.keys(layer), (down, up)):
                tensors[key] = value.to(dtype).contiguous()
            if with_alpha:
                alpha = torch.tensor(float(len(down)), dtype=dtype)
                tensors[f"{names.names[layer]}.{ALPHA}"] = alpha
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
    names = file_names(patch.family, patch.layers)
    for layer in patch.layers:
        down, up = (tensors[key] for key in names.keys(layer))
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
    if isinstance(patch.family, UnknownFamily):
        metadata["fmn.base.model"] = patch.family.model
        if patch.family.entry:
            metadata["fmn.base.transformer"] = patch.family.entry.key
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


def to_bytes(patch: ForgetPatch, thumbnail: str | None = None) -> bytes:
    """What its file holds.

    Args:
        thumbnail: a picture for lists of patches, see ``images.thumbnail_uri``.

    Raises:
        ForgetError: the changes are too large for float16.
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
    return save(tensors, metadata=metadata)


def save_patch(patch: ForgetPatch, path: AnyPath, thumbnail: str | None = None) -> Path:
    """Write ``to_bytes``, whole or not at all.

    Raises:
        ForgetError: as there; or the folder cannot be written to, or the disk is full.
    """
    data = to_bytes(patch, thumbnail)
    write_whole(path, lambda file: file.write_bytes(data))
    return Path(path)


def file_size(patch: ForgetPatch) -> int:
    """Bytes of the file that ``save_patch`` writes."""
    return len(to_bytes(patch))


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
        factors = split_keys(path.name, slices)
        family = claimed_family(path.name, metadata, factors, slices)
        layers = check_tensors(path.name, family, factors, slices)
        tensors = {key: file.get_tensor(key) for key in slices}
        with open(path, "rb") as data:
            changed = is_changed(metadata, data_hash(data))
    changes = {}
    for prefix, layer in layers.items():
        keys = factors[prefix]
        down, up = (tensors[keys[part]].float() for part in ("down", "up"))
        if ALPHA in keys:
            up = up * (tensors[keys[ALPHA]].float() / down.shape[0])
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
