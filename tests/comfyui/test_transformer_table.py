"""The table of transformers against ComfyUI's own classes, tiny and with random weights.

A family that this version of ComfyUI lacks is skipped.
"""

from contextlib import ExitStack

import pytest
import torch

from .others import CONFIGS
from .parts import concept
from .test_transformers import reread_settings

# Of models whose double blocks mix text and picture first, without those.
ROWS = {
    "Lumina2": {}, "ZImage": {}, "Krea2": {}, "ErnieImage": {}, "Flux": {"depth": 0},
    "Flux2": {"depth": 0}, "Chroma": {"depth": 0},
    "HiDream": {"num_layers": 0, "llama_layers": [0]},
}  # fmt: skip
SIDE = 8  # of latents, in tokens of 2 x 2 or 1 x 1
KEYS = {
    "Lumina2": "lumina2", "ZImage": "z_image", "Krea2": "krea2", "ErnieImage": "ernie",
    "Flux": "flux", "Flux2": "flux2", "Chroma": "chroma", "HiDream": "hidream", "SD3": "sd3",
    "QwenImage": "qwen_image", "WAN21_T2V": "wan", "Anima": "anima",
}  # fmt: skip


def latents(host, count, seed=1):
    shape = count, host.family.latent_channels, SIDE, SIDE
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(pack, host, *texts):
    prompt = pack("fmn.concepts.concept").Prompt
    return [host.encode(prompt(text, "")) for text in texts]


def predictions(host, x, texts, adapters=None, adapter=None):
    """Of the watched model at pure noise, with adapters if there are any."""
    with host.watch(len(texts), SIDE) as watched, ExitStack() as stack:
        if adapters:
            stack.enter_context(adapter.attached(adapters, watched.module))
        return watched.predict_each(x, len(watched.schedule) - 1, texts)


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_fire_once_and_in_order(pack, other_host, name):
    """Also with texts of different lengths, each of which takes a forward of its own."""
    host = other_host(name)
    assert host.family.entry.key == KEYS[name] and host.family.resolution == 1024
    readers, calls = host.family.readers(), []
    tokens = (SIDE // host.family.entry.patch) ** 2
    with host.watch(3, SIDE) as watched, ExitStack() as hooks:
        for layer, reader in readers.items():

            def hook(module, args, output, layer=layer, reader=reader):
                calls.append(layer)
                shape = args[0].flatten(1, -2).shape if reader.tokens != "pooled" else ()
                if reader.tokens == "picture":
                    assert shape[1] == tokens

            hooks.enter_context(watched.module(layer).register_forward_hook(hook))
        texts = encoded(pack, host, "a dog", "a cat", "a picture of a big tree")
        x = latents(host, 3)
        together = watched.predict_each(x, len(watched.schedule) - 1, texts)
        forwards = 1 if name in ("Flux2", "Anima") else 2  # these pad all texts to one length
        assert calls == list(readers) * forwards
        assert {reader.tokens for reader in readers.values()} >= {
            reader.tokens for reader in host.family.entry.readers
        }
    for i, text in enumerate(texts):
        alone = predictions(host, x[i : i + 1], [text])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)


def changes_by_way(pack, host, path):
    """Predictions before, what a patch file adds to them by our adapters, and {way of loading: what
    it adds by that}."""
    import comfy.sd
    import comfy.utils

    adapters, loaded = pack("fmn.models.adapters"), pack("fmn.patches.patch").load_patch(path)
    lora = comfy.utils.load_torch_file(str(path))
    x, texts = latents(host, 2), encoded(pack, host, "a cat", "a cat here")
    plain = predictions(host, x, texts)
    fixed = adapters.fixed_adapters(loaded.changes, "cpu")
    exact = predictions(host, x, texts, fixed, adapters) - plain
    stock, _ = comfy.sd.load_lora_for_models(host.patcher, None, lora, 1.0, 0.0)
    patched = {"Apply Forget Patch": host.patched(loaded, 1.0), "Load LoRA": stock}
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):  # since ComfyUI 0.33
        beside, _ = comfy.sd.load_bypass_lora_for_models(host.patcher, None, lora, 1.0, 0.0)
        patched["Load LoRA (Bypass)"] = beside
    changes = {
        way: predictions(type(host)(each), x, texts) - plain for way, each in patched.items()
    }
    assert torch.equal(predictions(host, x, texts), plain)  # loads the unpatched model again
    return plain, exact, changes


@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_read_once_and_whole(pack, other_host, name):
    """Each layer of the text alone gets as many rows as the prompt has, and the same for any
    picture; where they run before all others, the forward ends there."""
    host = other_host(name)
    readers, text_rows = host.family.text_readers(), pack("fmn.models.recording").text_rows
    entry, calls = host.family.entry, []
    tokens = [reader.tokens for reader in readers.values()]
    assert set(tokens) == {reader.tokens for reader in entry.text_readers} and "text" in tokens
    (text,) = encoded(pack, host, "a dog in a park")
    with host.watch(1, SIDE) as watched, ExitStack() as hooks:
        for layer in host.family.readers():
            module = watched.module(layer)
            hooks.enter_context(
                module.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
            )
        first, second = (
            text_rows(watched, readers, latents(host, 1, seed), text) for seed in (1, 2)
        )
    assert first.keys() == readers.keys()
    for layer, reader in readers.items():
        assert torch.equal(first[layer].inputs, second[layer].inputs)
        # Flux.2 and Anima fill texts up to 512 tokens.
        assert len(first[layer].inputs) in ((1,) if reader.tokens == "pooled" else (7, 512))
    before = {layer for layer, reader in readers.items() if reader.tokens == "pooled"}
    assert name == "Anima" or set(calls) <= before
    assert not any(module._forward_hooks for module in host.patcher.model.modules())


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_picture_are_where_the_table_says(pack, other_host, name):
    """Another picture changes these rows of the first joint block's input, and no others."""
    host = other_host(name, **ROWS[name])
    entry, readers = host.family.entry, host.family.readers()
    name, reader = next((n, r) for n, r in readers.items() if r.tokens not in ("picture", "pooled"))
    path = next(layer.compvis for layer in host.family.listed if layer.name == name)
    block = path.removesuffix(".0").rpartition(".")[0]
    seen, (text,) = [], encoded(pack, host, "a dog in a park")

    def hook(module, args, kwargs):
        seen.append(args[0].clone())

    module = host.patcher.model.diffusion_model.get_submodule(block)
    with module.register_forward_pre_hook(hook, with_kwargs=True):
        for seed in (1, 2):
            predictions(host, latents(host, 1, seed), [text])
    moved = (seen[0] - seen[1]).abs().amax((0, 2)) > 1e-6
    tokens = (SIDE // entry.patch) ** 2
    place = entry.picture(reader.tokens, tokens, len(moved))
    assert moved[place].all() and int(moved.sum()) - tokens < entry.pad
    padded = -(-tokens // entry.pad) * entry.pad
    assert not moved[: place.start].any() and not moved[place.start + padded :].any()
    assert len(moved) - padded > 0  # there is text


@pytest.mark.parametrize("method", ["reread", "uce"])
@pytest.mark.parametrize("name", CONFIGS)
def test_patches_by_every_way_of_loading(pack, other_host, tmp_path, name, method):
    """The file by ComfyUI's loader, by our node and by our adapters gives one prediction."""
    import comfy.lora
    import comfy.utils

    patches = pack("fmn.patches.patch")
    host = other_host(name)
    before = {key: value.clone() for key, value in host.patcher.model.state_dict().items()}
    settings = reread_settings(pack, size=128)
    if method == "uce":
        settings = pack("fmn.methods.uce").Settings(keep_list="none")
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(host, [concept(pack)], settings)
    after = host.patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in host.patcher.model.modules())
    family = host.family
    layers = family.readers() if method == "reread" else family.text_readers()
    assert patch.changes.keys() == layers.keys()
    assert patch.info["loss"]["last"] < 0.9

    path = patches.save_patch(patch, tmp_path / "patch.safetensors")
    tensors = comfy.utils.load_torch_file(str(path))
    known = comfy.lora.model_lora_keys_unet(host.patcher.model, {})
    prefixes = {key.rsplit(".", 2)[0] for key in tensors}
    assert prefixes <= known.keys() and len(prefixes) == len(patch.changes)

    plain, exact, changes = changes_by_way(pack, host, path)
    rounding = 1e-6 * plain.norm()
    assert exact.norm() > 100 * rounding
    for change in changes.values():
        assert (change - exact).norm() < 1e-3 * exact.norm() + rounding
