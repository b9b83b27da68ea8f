"""The forget patch: low-rank changes with a record of what they forget, kept as a LoRA file."""

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from .. import __version__
from ..errors import ForgetError, NonFiniteLoss
from ..files import write_whole
from ..linalg import full_change
from ..models import unknown_family
from ..models.families import FAMILIES, Family, layers_by_name
from .lora_keys import PARTS, file_name, known_names
from .metadata import FORMAT, THUMBNAIL, check_header_size, info_of
from .scores import Source

MAX_RANK = 1024


@dataclass
class ForgetPatch:
    """Low-rank changes to a U-Net of one family, to its text encoders, or to both.

    Attributes:
        changes: layer name -> (up [out, r], down [r, in]), CPU tensors whose product is added to
            the weight at strength 1. Conv2d factors carry their kernel dimensions.
        info: plain data about it, JSON-able; ``new_info`` lists the fields.
        source: ``scores.Source``, where it is known which file this is the content of.
    """

    family: Family
    changes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    info: dict = field(default_factory=dict)
    source: Source | None = None

    @property
    def concepts(self):
        return [concept["name"] for concept in self.info.get("concepts", [])]

    @property
    def ranks(self):
        return sorted({down.shape[0] for _, down in self.changes.values()})

    def check_family(self, family):
        """Refuse a model of another family. Another base of the same one is fine: patches
        transfer between fine-tunes."""
        if not self.family.is_same(family):
            raise ForgetError(
                f"This patch is for {self.family.title}, the model is {family.title}: "
                "use a patch made for the model's family."
            )

    @property
    def layers(self):
        """The ``Layer`` of each change, in the family's order."""
        known = layers_by_name(self.family).items()
        return [layer for name, layer in known if name in self.changes]

    @property
    def changes_text(self):
        """Whether it changes a text encoder, and so has to be put on the CLIP too."""
        return any(layer.is_text for layer in self.layers)

    @property
    def changes_unet(self):
        return any(not layer.is_text for layer in self.layers)

    def check_shapes(self, weight_of, text=False):
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

    def lora(self, dtype=torch.float16):
        """The tensors of a LoRA file: lora_down [r, in], lora_up [out, r] and alpha a layer."""
        tensors = {}
        for layer in self.layers:
            up, down = self.changes[layer.name]
            prefix = file_name(self.family, layer)
            up, down = _balance(up.float(), down.float())
            values = down.to(dtype), up.to(dtype), torch.tensor(float(down.shape[0]), dtype=dtype)
            for part, value in zip(PARTS, values):
                tensors[f"{prefix}.{part}"] = value.contiguous()
        return tensors

    def change_of(self, name, device="cpu"):
        """The full float32 change of one layer."""
        up, down = self.changes[name]
        return full_change(up.to(device), down.to(device))


def _balance(up, down):
    # Equal norms keep both factors far from float16's underflow.
    up_norm, down_norm = up.norm(), down.norm()
    if up_norm == 0 or down_norm == 0:
        return torch.zeros_like(up), down
    scale = (down_norm / up_norm).sqrt()
    return up * scale, down / scale


def new_info(model, fingerprint, method, settings, concepts, losses, truncation_error):
    """The record that goes into a patch file.

    Args:
        truncation_error: largest relative error of the reduction to low rank, over layers.
    """
    return {
        "concepts": [concept.describe() for concept in concepts],
        "method": method,
        "settings": settings,
        "base.fingerprint": fingerprint,
        "base.prediction": model.prediction,
        "loss": {"first": losses[0], "last": losses[-1], "steps": len(losses)} if losses else {},
        "truncation_error": truncation_error,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }


def rounding_error(patch, tensors):
    """Relative Frobenius error of the file's changes against the patch's own, over all layers."""
    difference = total = 0.0
    for layer in patch.layers:
        prefix = file_name(patch.family, layer)
        down, up, _ = (tensors[f"{prefix}.{part}"] for part in PARTS)
        own_up, own_down = patch.changes[layer.name]
        difference += _square_norm(
            torch.cat([own_up, -up.to(own_up)], 1), torch.cat([own_down, down.to(own_down)])
        )
        total += _square_norm(own_up, own_down)
    return (difference / total) ** 0.5 if total > 0 else 0.0


def _square_norm(up, down):
    """|up @ down|^2 without the product: a small file can stand for a huge matrix."""
    up, down = up.flatten(1).double(), down.flatten(1).double()
    return max(float(((up.mT @ up) * (down @ down.mT)).sum()), 0.0)


def _metadata(patch, tensors):
    """Strings for the header: our record, and what other programs read to label the file."""
    # A patch that was loaded has been rounded before; rounding it again loses nothing.
    lost = max(rounding_error(patch, tensors), patch.info.get("rounding_error", 0.0))
    info = patch.info | {"rounding_error": lost}
    # A command line can hand us bytes that are no text.
    names = ", ".join(patch.concepts).encode("utf-8", "replace").decode()
    rank = str(max(patch.ranks))
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
        "ss_network_dim": rank if len(patch.ranks) == 1 else "Dynamic",
        "ss_network_alpha": rank if len(patch.ranks) == 1 else "Dynamic",
        "ss_output_name": f"forget {names}",
    }


def save_patch(patch, path, thumbnail=None):
    """Write the file; nothing half-written stays behind, whatever happens.

    Args:
        thumbnail: a picture for lists of patches, as ``thumbnail.data_uri`` gives it.

    Raises:
        ForgetError: the folder cannot be written to, or the disk is full.
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


def file_size(patch):
    """Bytes of the file that ``save_patch`` writes."""
    tensors = patch.lora()
    return len(save(tensors, metadata=_metadata(patch, tensors)))


def rescue(error, path):
    """Save the last good patch of a training that blew up; the error to tell the user instead.

    Args:
        error: NonFiniteLoss; without a patch it comes back as it is.
    """
    if error.patch is None:
        return error
    try:
        told = f"The patch of the last good step is {save_patch(error.patch, path)}."
    except ForgetError as failed:
        told = str(failed)
    return NonFiniteLoss(f"{error} {told}", error.losses)


def load_patch(path):
    """Read and check a file that anyone may have made.

    Raises:
        ForgetError: it is not a whole, well-formed forget patch.
    """
    path = Path(path)
    check_header_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            family = _family(path, metadata, found)
            modules = _check_shapes(path, family, found)
            tensors = {key: file.get_tensor(key) for key in found}
    except SafetensorError as error:
        raise ForgetError(
            f"'{path.name}' is damaged or not a safetensors file ({error}): get it again."
        ) from error
    changes = {}
    for prefix, layer in modules.items():
        down, up, alpha = (tensors[f"{prefix}.{part}"].float() for part in PARTS)
        up = up * (alpha / down.shape[0])
        # The product of the norms bounds every entry of the change, and alpha may make up infinite
        # where it does not make their product.
        if not torch.isfinite(down.norm() * up.norm()):
            raise ForgetError(
                f"'{path.name}' holds NaN or infinite values in '{prefix}': "
                "its training failed, so do not use it."
            )
        changes[layer.name] = up, down
    return ForgetPatch(family, changes, info_of(path, metadata))


def _family(path, metadata, found):
    if "fmn.train.format" in metadata:
        raise ForgetError(
            f"'{path.name}' is what a training needs to be resumed, not a patch: "
            "choose the patch beside it."
        )
    if "fmn.format" not in metadata:
        raise ForgetError(
            f"'{path.name}' is not a forget patch: it lacks our metadata. "
            "Use Load LoRA for other LoRA files."
        )
    if metadata["fmn.format"] != FORMAT:
        raise ForgetError(
            f"'{path.name}' has patch format {metadata['fmn.format']!r:.20}, this version reads "
            f"{FORMAT}: update Forget-Me-Not."
        )
    key = metadata.get("fmn.base.family")
    if key == unknown_family.KEY:
        shapes = {name: found[name].get_shape() for name in found}
        return unknown_family.family_of_file(path.name, metadata.get("fmn.base.model"), shapes)
    family = FAMILIES.get(key)
    if family is None:
        raise ForgetError(
            f"'{path.name}' is for the unknown model family "
            f"{key!r:.40}; known are {', '.join(FAMILIES)}, {unknown_family.KEY}."
        )
    return family


def _check_shapes(path, family, found):
    """Every key known, every layer complete, every shape fitting, before anything is loaded."""
    known = known_names(family)
    prefixes, taken = {}, set()
    for key in found:
        prefix, _, part = key.partition(".")
        if prefix not in known or part not in PARTS:
            raise ForgetError(
                f"'{path.name}' holds the tensor {key!r:.80}, which {family.title} does not have: "
                "it is for another model, or no forget patch."
            )
        if prefix not in prefixes and known[prefix].name in taken:
            raise ForgetError(f"'{path.name}' names the layer '{prefix}' twice: get another file.")
        taken.add(known[prefix].name)
        prefixes[prefix] = known[prefix]
    if not prefixes:
        raise ForgetError(f"'{path.name}' holds no layers: it would change nothing.")
    for prefix, layer in prefixes.items():
        missing = [part for part in PARTS if f"{prefix}.{part}" not in found]
        if missing:
            raise ForgetError(f"'{path.name}' lacks '{prefix}.{missing[0]}': get it again.")
        _check_layer(path, layer, *(found[f"{prefix}.{part}"] for part in PARTS))
    return prefixes


def _check_layer(path, layer, *slices):
    for tensor in slices:
        if tensor.get_dtype() not in ("F16", "BF16", "F32"):
            raise ForgetError(
                f"'{path.name}' stores '{layer.name}' as {tensor.get_dtype()}; "
                "a patch has 16- or 32-bit floating-point numbers only."
            )
    down, up, alpha = (tuple(tensor.get_shape()) for tensor in slices)
    rank = down[0] if down else 0
    one = (1,) * (len(layer.shape) - 2)
    fits = (
        0 < rank <= MAX_RANK
        and down == (rank, *layer.shape[1:])
        and up == (layer.shape[0], rank, *one)
        and alpha in ((), (1,))
    )
    if not fits:
        raise ForgetError(
            f"'{path.name}' does not fit '{layer.name}' of shape {list(layer.shape)}: "
            f"it has lora_down {list(down)}, lora_up {list(up)}, alpha {list(alpha)}."
        )
