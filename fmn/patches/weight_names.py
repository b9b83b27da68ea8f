"""Where files keep a model's weights: names of CompVis, OpenCLIP, diffusers and ComfyUI.

A place is the key of a tensor, and which third of its rows is meant: OpenCLIP's encoders hold
query, key and value as rows of one matrix.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import cache

import torch

from ..models.families import Family, Layer, layers

Place = tuple[str, int | None]
UNET_PREFIX = "model.diffusion_model."
UNET_PREFIXES = UNET_PREFIX, "unet.", "diffusion_model.", "model.model.", "model.", ""
EMA_PREFIX = "model_ema.diffusion_model"  # its names have no dots
# ComfyUI's name of a text encoder -> what its keys may begin with
TEXT_PREFIXES = {
    "clip_l": (
        "cond_stage_model.transformer.", "cond_stage_model.model.transformer.",
        "cond_stage_model.model.", "cond_stage_model.", "conditioner.embedders.0.transformer.",
        "text_encoder.", "clip_l.transformer.", "",
    ),
    "clip_h": (
        "cond_stage_model.model.", "cond_stage_model.transformer.", "cond_stage_model.",
        "conditioner.embedders.0.model.", "text_encoder.", "clip_h.transformer.", "",
    ),
    "clip_g": (
        "conditioner.embedders.1.model.", "conditioner.embedders.1.transformer.", "text_encoder_2.",
        "clip_g.transformer.",
    ),
}  # fmt: skip
FUSED = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
OPENCLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",  # transposed, see ``take``
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# Norms lie beside layers: end of a layer's names in diffusers and CompVis -> those of the norm.
NORMS = {
    (".conv1", ".in_layers.2"): [(".norm1", ".in_layers.0")],
    (".conv2", ".out_layers.3"): [(".norm2", ".out_layers.0")],
    (".proj_in", ".proj_in"): [(".norm", ".norm")],
    (".attn1.to_q", ".attn1.to_q"): [(f".norm{n}", f".norm{n}") for n in "123"],
    ("conv_out", "out.2"): [("conv_norm_out", "out.0")],
}


def places(layer: Layer, part: str = "weight") -> Iterator[Place]:
    """Where a file may keep a layer's weight or bias, likeliest first."""
    if layer.is_text:
        encoder, _, path = layer.compvis.partition(".transformer.")
        return text_places(encoder, f"{path}.{part}")
    return unet_places(f"{layer.name}.{part}", f"{layer.compvis}.{part}")


def unet_places(name: str, compvis: str | None) -> Iterator[Place]:
    """Of a U-Net's tensor by its names in diffusers and in CompVis' code."""
    names = [each for each in (compvis, name) if each]
    yield from ((prefix + each, None) for prefix in UNET_PREFIXES for each in names)
    if compvis:
        yield EMA_PREFIX + compvis.replace(".", ""), None


def text_places(encoder: str, path: str) -> Iterator[Place]:
    """Of a text encoder's tensor by its name in transformers, from "text_model." on.

    Args:
        encoder: ComfyUI's name of the encoder.
    """
    names: list[Place] = [(path, None), (path.removeprefix("text_model."), None)]
    if encoder != "clip_l":
        names.append(_openclip(path))
    for prefix in TEXT_PREFIXES[encoder]:
        yield from ((prefix + name, third) for name, third in names)


def _openclip(path: str) -> Place:
    module, _, kind = path.rpartition(".")
    third = next((i for i, name in enumerate(FUSED) if module.endswith(name)), None)
    if third is not None:
        path = f"{module.removesuffix(FUSED[third])}attn.in_proj_{kind}"
    for theirs, ours in OPENCLIP.items():
        path = path.replace(theirs, ours)
    return path, third


def find(keys: Collection[str], candidates: Iterator[Place]) -> Place | None:
    """The first place that a file has."""
    return next((place for place in candidates if place[0] in keys), None)


def take(tensors: Mapping[str, torch.Tensor], place: Place) -> torch.Tensor:
    """The tensor at a place, a view of the file's own."""
    key, third = place
    tensor = tensors[key]
    if key.endswith("text_projection"):
        return tensor.mT
    return tensor.tensor_split(3)[third] if third is not None and tensor.dim() else tensor


@cache
def compvis_modules(family: Family) -> dict[str, str]:
    """diffusers' name of each module of a U-Net that has weights -> CompVis' name."""
    names = {layer.name: layer.compvis for layer in layers(family)}
    norms = {
        layer.name.removesuffix(name) + norm: layer.compvis.removesuffix(compvis) + theirs
        for (name, compvis), beside in NORMS.items()
        for layer in layers(family)
        if layer.name.endswith(name)
        for norm, theirs in beside
    }
    return names | norms
