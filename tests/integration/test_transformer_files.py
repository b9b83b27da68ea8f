"""Patches of transformers through diffusers' own conversion, onto its own modules."""

import diffusers
import pytest
import torch
from diffusers.loaders import lora_pipeline

from fmn.models.families import layers
from fmn.models.transformer_layers import place_of
from fmn.models.transformers import TRANSFORMERS
from fmn.models.unknown_family import family_of_model
from fmn.patches.patch import ForgetPatch

from ..unit.tiny import make_patch

ONE = {"num_layers": 1, "num_single_layers": 1}
# Lumina 2 is missing: diffusers reads no LoRA of it but with all layers of all blocks.
DIFFUSERS = {
    "z_image": ("ZImage", "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "flux": ("Flux", "FluxTransformer2DModel", ONE),
    "flux2": ("Flux2", "Flux2Transformer2DModel", ONE),
    "chroma": ("Flux", "ChromaTransformer2DModel", ONE),
    "qwen_image": ("QwenImage", "QwenImageTransformer2DModel", {"num_layers": 1}),
    "krea2": ("Krea2", "Krea2Transformer2DModel", {"num_layers": 1}),
    "anima": ("Anima", "CosmosTransformer3DModel", {"num_layers": 1}),
    "sd3": ("SD3", "SD3Transformer2DModel", {"num_layers": 1}),
    "hidream": ("HiDreamImage", "HiDreamImageTransformer2DModel",
                ONE | {"patch_size": 2, "llama_layers": [0, 0], "caption_channels": [8, 8]}),
    "ernie": ("ErnieImage", "ErnieImageTransformer2DModel", {"num_layers": 1}),
    "wan": ("Wan", "WanTransformer3DModel", {"num_layers": 1}),
}  # fmt: skip
ENTRIES = [entry for entry in TRANSFORMERS if entry.key in DIFFUSERS]
PATHS = (
    "flux2",
    "qwen_image",
    "krea2",
    "anima",
    "hidream",
    "ernie",
    "wan",
)  # read by ComfyUI's names
# Halves are swapped there, in Stable Diffusion 3 those of the last block.
NOT_READ = {
    "flux": {"norm_out.linear"}, "flux2": {"norm_out.linear"},
    "sd3": {"norm_out.linear", "transformer_blocks.0.norm1_context.linear"},
    "chroma": {f"distilled_guidance_layer.layers.{i}.linear_{j}" for i in range(5) for j in (1, 2)},
}  # fmt: skip


def modules_of(entry):
    _, network, config = DIFFUSERS[entry.key]
    with torch.device("meta"):
        return dict(getattr(diffusers, network)(**config).named_modules())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_every_key_reaches_the_module_of_diffusers(entry):
    modules = modules_of(entry)
    paths = dict(entry.diffusers_paths(modules))
    known = {reader for _, reader in entry.paths((*entry.readers, *entry.text), paths)}
    assert known == {*entry.readers, *entry.text}
    shapes = {path: modules[other].weight.shape for path, other in paths.items()}
    family = family_of_model("Model", shapes, entry=entry)
    generator = torch.Generator().manual_seed(0)
    changes = {
        layer.name: (
            torch.randn(layer.shape[0], 2, generator=generator),
            torch.randn(2, layer.shape[1], generator=generator),
        )
        for layer in layers(family)
    }
    patch = ForgetPatch(family, changes, make_patch().info)
    loader = getattr(lora_pipeline, f"{DIFFUSERS[entry.key][0]}LoraLoaderMixin")
    found = loader.lora_state_dict(patch.lora(torch.float32))
    for layer in layers(family):
        name = f"transformer.{paths[layer.compvis]}"
        down, up = (found.pop(f"{name}.lora_{part}.weight") for part in "AB")
        torch.testing.assert_close((up @ down)[:8], patch.change_of(layer.name)[:8])
    assert not found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_names_of_all_layers_at_diffusers_are_known(entry):
    """And mean what diffusers' conversion of ComfyUI's names says, where it has one."""
    linear = {name for name, module in modules_of(entry).items() if hasattr(module, "in_features")}
    places = {name: place_of(entry, f"transformer.{name}") for name in linear}
    assert {name for name, place in places.items() if place is None} == NOT_READ.get(
        entry.key, set()
    )
    whole = {place.path: name for name, place in places.items() if place and place.parts == 1}
    if entry.key in PATHS:
        loader = getattr(lora_pipeline, f"{DIFFUSERS[entry.key][0]}LoraLoaderMixin")
        numbers = {path: torch.full((1, 1), i) for i, path in enumerate(whole)}
        found = loader.lora_state_dict(
            {
                f"diffusion_model.{path}.lora_{x}.weight": numbers[path]
                for path in whole
                for x in "AB"
            }
        )
        for path, name in whole.items():
            assert all(
                found.pop(f"transformer.{name}.lora_{x}.weight") == numbers[path] for x in "AB"
            )
        assert not found
