"""LoRAs of other tools for transformers, imported, against ComfyUI's Load LoRA of the same file."""

import re

import pytest
import torch
from safetensors.torch import save_file

from .others import CONFIGS
from .parts import concept
from .test_transformer_table import KEYS, encoded, latents, predictions

# Of a style: what names in a file begin with, and the ends of the factors' names.
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
STYLES = {
    "lora_unet_": KOHYA, "diffusion_model.": PEFT, "transformer.": PEFT, "lora_transformer_": KOHYA,
    "": PEFT,
}  # fmt: skip
# ComfyUI's table splits linear1 where the feed-forward part is four times as wide as the block.
WIDE = {"Flux": {"mlp_ratio": 4.0}, "Chroma": {"mlp_ratio": 4.0}}
# Parts of names that ComfyUI knows and the import refuses: another joined part, a matrix whose
# halves are swapped at diffusers, and names of a relative that diffusers does not have.
SWAPPED = r"linear1_qkv|norm_out[._]linear"
FLUX_1 = rf"{SWAPPED}|single_.*(to_qkv_mlp|to_out)"
REFUSED = {
    "Flux": FLUX_1, "Chroma": FLUX_1,
    "Flux2": rf"{SWAPPED}|[._]net[._]\d|single_.*(to_[qkv]$|proj_mlp|proj_out)|time_text",
    "SD3": rf"{SWAPPED}|norm1_context",  # of the last block alone
    "Lumina2": r"attention[._]to_|all_",  # Z-Image's, with as many rows for keys as for queries
}  # fmt: skip


def names_of(host, start):
    """(name, layer's path, first row or None, rows) of each name of the style in ComfyUI's map."""
    import comfy.lora

    layers = {layer.compvis: layer.shape for layer in host.family.listed}
    for name, target in comfy.lora.model_lora_keys_unet(host.patcher.model, {}).items():
        key, offset = target[:2] if isinstance(target, tuple) else (target, None)
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        bare = not start and name.split(".")[0] in ("layers", "transformer_blocks", "txtfusion")
        if path in layers and (bare or (start and name.startswith(start))):
            rows = layers[path][0] if offset is None else offset[2]
            yield name, path, offset and offset[1], (rows, *layers[path][1:])


def file_of(names, parts, path):
    """A LoRA of these names: a layer's parts where they have names, and no layer twice."""
    generator, tensors, seen = torch.Generator().manual_seed(0), {}, set()
    joined = {layer for _, layer, first, _ in names if first is not None}
    for name, layer, first, shape in names:
        if (layer, first) in seen or (first is None and layer in joined):
            continue
        seen.add((layer, first))
        rank = 1 + len(seen) % 3
        down, up = (rank, *shape[1:]), (shape[0], rank, *(1,) * (len(shape) - 2))
        for part, size in zip(parts, (down, up)):
            tensors[f"{name}.{part}"] = 0.1 * torch.randn(size, generator=generator)
        if parts == KOHYA:
            tensors[f"{name}.alpha"] = torch.tensor(0.5)
    save_file(tensors, path)
    return tensors, {layer for layer, _ in seen}


def weights(patcher):
    import comfy.lora

    plain = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, plain[key].clone(), key)
        for key, patches in patcher.patches.items()
    }


def check_style(pack, host, name, start, names, file):
    """The MODEL with a file on it by Load LoRA, and with its import, whose weights are equal."""
    import comfy.sd

    place_of = pack("fmn.models.transformer_layers").place_of
    for each, path, first, _ in names:
        place = place_of(host.family.entry, each)
        assert place and place.path == path and (place.parts > 1) == (first is not None), each
    tensors, paths = file_of(names, STYLES[start], file)
    importer = pack("fmn.patches.import_patch").import_patch
    patch = importer(file, [concept(pack)], family=KEYS[name]).patch
    assert {layer.compvis for layer in patch.layers} == paths and patch.family.is_same(host.family)
    stock, _ = comfy.sd.load_lora_for_models(host.patcher, None, tensors, 0.7, 0.0)
    ours = host.patched(patch, 0.7)
    wanted, found = weights(stock), weights(ours)
    assert wanted.keys() == found.keys() and len(wanted) == len(paths)
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)
    return stock, ours


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_lora_does_what_load_lora_does(pack, other_host, tmp_path, name):
    """In each style of names that ComfyUI has for the family, with all of these names."""
    host, checked = other_host(name, **WIDE.get(name, {})), {}
    refused = re.compile(REFUSED.get(name, "^$"))
    for start in STYLES:
        names = [one for one in names_of(host, start) if not refused.search(one[0])]
        if names:
            file = tmp_path / f"{len(checked)}.safetensors"
            checked[start] = check_style(pack, host, name, start, names, file)
    styles = 4 if name in ("Flux", "Chroma", "SD3") else 2
    assert [*checked][:styles] == [*STYLES][:styles]
    x, texts = latents(host, 1), encoded(pack, host, "a cat")
    stock, ours = map(type(host), checked["diffusion_model."])
    plain, exact, imported = (predictions(each, x, texts) for each in (host, stock, ours))
    assert (exact - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(imported, exact, rtol=1e-4, atol=1e-4)
