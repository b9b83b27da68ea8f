"""The two hosts against each other, with objects in hand."""

import re
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from .conftest import ROOT
from .parts import concept, leftovers, settings, state

PROMPT = "a photo of a dog"
STEPS = 10  # 999 / 9 is whole: both hosts then sample at the same trained time steps


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


@pytest.mark.parametrize(
    ("load", "scheduler"), [("checkpoint", "normal"), ("transformer", "simple")]
)
def test_both_hosts_draw_the_same_picture(pack, pipeline_model, load, scheduler):
    """The same first noise, prompt, guidance and steps: pictures equal to float tolerance."""
    import comfy.sample

    other = pipeline_model
    if load == "transformer":
        other = pack("fmn.hosts.diffusers.transformer").DiffusersTransformer.load_demo()
    noise = other.initial_noise([3], 128)
    with torch.inference_mode():
        model, clip, vae = getattr(pack("nodes.demo"), f"load_demo_{load}")()
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")
        )
        latents = comfy.sample.sample(
            model, noise, STEPS, 3.5, "euler", scheduler, positive, negative,
            torch.zeros_like(noise), seed=3,
        )  # fmt: skip
        ours = vae.decode(latents).clone()
    theirs = other.decode(other.sample_latents([PROMPT], noise, STEPS, 3.5))
    assert ours.std() > 0.1
    # float32 rounding over ten steps; one grey level is 0.004.
    assert (ours - theirs).abs().max() < 2e-3


def test_many_pictures_are_drawn_a_few_at_a_time(pack, comfy_model, pipeline_model, monkeypatch):
    """The same as one by one, and the autoencoder of diffusers has a few at a time too."""
    hosts, pictures = pack("fmn.hosts.diffusers.pipeline_model"), torch.rand(5, 64, 64, 3)
    monkeypatch.setattr(hosts, "PIXELS_AT_ONCE", 2 * 64 * 64)
    sizes, prompt = {}, concept(pack).training_prompts()[0]

    def note(module, name):
        sizes[name] = []
        return module.register_forward_pre_hook(lambda _, args: sizes[name].append(len(args[0])))

    vae = pipeline_model.pipeline.vae
    parts = {
        "comfyui": comfy_model.patcher.model.diffusion_model, "diffusers": pipeline_model.unet,
        "encoder": vae.encoder, "decoder": vae.decoder,
    }  # fmt: skip
    with ExitStack() as hooks:
        for name, module in parts.items():
            hooks.enter_context(note(module, name))
        latents = [
            host.sample(prompt, range(5), 64, 1, 3.5) for host in (comfy_model, pipeline_model)
        ]
        back = pipeline_model.encode_images(pictures, 64)
        decoded = pipeline_model.decode(latents[1])
    assert sum(sizes["comfyui"]) == sum(sizes["diffusers"]) == 2 * 5  # with the empty prompt
    assert max(sizes["comfyui"]) <= 2 * 4 and sizes["diffusers"] == [8, 2]
    assert sizes["encoder"] == sizes["decoder"] == [2, 2, 1]
    for host, found in zip((comfy_model, pipeline_model), latents):
        alone = torch.cat([host.sample(prompt, [seed], 64, 1, 3.5) for seed in range(5)])
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
    alone = torch.cat([pipeline_model.encode_images(each[None], 64) for each in pictures])
    torch.testing.assert_close(back, alone, rtol=1e-3, atol=1e-3)
    alone = torch.cat([pipeline_model.decode(each[None]) for each in latents[1]])
    torch.testing.assert_close(decoded, alone, rtol=1e-3, atol=1e-3)


def test_both_hosts_train_the_same_patch(pack, comfy_model, pipeline_model):
    """Loss by loss, and the same base fingerprint."""
    run = pack("fmn.methods.resteer").run
    records = []
    for model in (comfy_model, pipeline_model):
        steps = []
        patch = run(model, [concept(pack)], settings(pack), steps.append)
        records.append((steps[-1].losses, patch))
    (first, one), (second, two) = records
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert one.info["base.fingerprint"] == two.info["base.fingerprint"]
    for name in one.changes:
        difference = (one.change_of(name) - two.change_of(name)).norm()
        # Adam divides by the gradient's size, which lifts rounding noise where gradients vanish.
        assert difference <= 0.05 * one.change_of(name).norm()


def with_more_inputs(pack, demo, channels):
    """Both hosts over the demo model with a wider first layer of equal weights, and this layer's
    empty picture: what its extra inputs are to be."""
    import comfy.model_base

    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(64, channels - 4, 3, 3, generator=generator) / 9
    pipeline = pack("fmn.hosts.diffusers.load").load_pipeline("demo")
    conv = pipeline.unet.conv_in
    conv.weight = torch.nn.Parameter(torch.cat([conv.weight.detach(), extra], 1))
    pipeline.unet.register_to_config(in_channels=channels)

    model = demo[0].model
    model.diffusion_model.in_channels = channels
    first = model.diffusion_model.input_blocks[0][0]
    first.weight = torch.nn.Parameter(torch.cat([first.weight.detach(), extra.to(first.weight)], 1))
    if channels == 9:
        model.set_inpaint()
    else:
        model.process_ip2p_image_in = lambda image: image
        own = comfy.model_base.IP2P.concat_cond
        model.concat_cond = lambda **given: own(model, **given)
    hosts = (
        pack("fmn.hosts.comfyui.model").ComfyModel(*demo),
        pack("fmn.hosts.diffusers.model").DiffusersModel,
    )
    return hosts[0], hosts[1](pipeline)


@pytest.mark.parametrize("channels", [8, 9])
def test_variants_with_more_inputs_are_trained_alike(pack, demo, channels):
    """Instruct (8) and inpainting (9) models: their extra inputs are those of no picture."""
    run = pack("fmn.methods.resteer").run
    hosts = with_more_inputs(pack, demo, channels)
    before, records = state(demo[0]), []
    for model in hosts:
        steps = []
        patch = run(model, [concept(pack)], settings(pack, layers="unet"), steps.append)
        assert "conv_in" not in patch.changes and "conv_out" in patch.changes
        records.append(steps[-1].losses)
        latents = model.sample(concept(pack).training_prompts()[0], [1], 64, 2, 3.5)
        assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all()
    np.testing.assert_allclose(*records, rtol=1e-4)
    after = state(demo[0])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_patch_does_the_same_in_comfyui_and_diffusers(pack, comfy_model, tmp_path):
    """Our Apply node, stock Load LoRA, diffusers load_lora_weights and our merged checkpoint."""
    import comfy.sd
    from diffusers.utils import logging
    from safetensors.torch import load_file

    patches = pack("fmn.patches.patch")
    patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack, steps=20))
    file = patches.save_patch(patch, tmp_path / "dog.safetensors")
    patch = patches.load_patch(file)
    probe = pack("fmn.models.interface"), pack("fmn.concepts.concept").Prompt(PROMPT, "dog")
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500])

    def output(model):
        text = model.encode(probe[1])
        with model.borrow_denoiser() as denoiser, torch.no_grad():
            return denoiser.predict_noise(x_t, t, text)

    ComfyModel = type(comfy_model)
    plain = output(comfy_model)
    apply = ComfyModel(comfy_model.patched(patch, 1.0), comfy_model.clip)
    stock, _ = comfy.sd.load_lora_for_models(comfy_model.patcher, None, load_file(file), 1.0, 0.0)
    outputs = {"apply": output(apply), "load lora": output(ComfyModel(stock, comfy_model.clip))}

    DiffusersModel = pack("fmn.hosts.diffusers.model").DiffusersModel
    fused = DiffusersModel.load("demo")
    logging.set_verbosity_error()
    fused.pipeline.load_lora_weights(load_file(file))
    fused.pipeline.fuse_lora()
    fused.pipeline.unload_lora_weights()
    outputs["diffusers"] = output(fused)

    checkpoint = tmp_path / "merged.safetensors"
    source = pack("fmn.hosts.diffusers.load").DEMO_FILE
    pack("fmn.patches.checkpoint").merge_into_checkpoint(source, [(patch, 1.0)], checkpoint)
    outputs["merged file"] = output(DiffusersModel.load(checkpoint))

    assert (outputs["apply"] - plain).abs().max() > 0.1
    for name, result in outputs.items():
        difference = float((result - outputs["apply"]).abs().max())
        print(f"{name}: {difference:.1e} of {float(plain.abs().max()):.1f}")
        # All read the same float16 factors. ComfyUI and diffusers add the change in float32 up to
        # the order of products; the merged file is rounded to float16 once more.
        assert difference < (1e-3 if name == "merged file" else 1e-4), name


def test_first_tokens_alone_are_encoded_as_within_the_whole(pack, comfy_model, pipeline_model):
    texts = ["", "a dog", "a photo of a dog on the beach"]
    encoder = comfy_model.clip.cond_stage_model
    for model in (comfy_model, pipeline_model):
        whole, short = model.encode_all(texts), model.encode_all(texts, 10)
        assert short.shape == (3, 10, 128)
        torch.testing.assert_close(short, whole[:, :10], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.encode_all(texts), whole)
    assert leftovers(encoder) == leftovers(pipeline_model.pipeline.text_encoder) == []


@pytest.mark.parametrize("family, modules", [("SD1", 32), ("SD2", 32), ("SDXL", 140)])
def test_every_key_of_a_full_size_patch_is_known_to_the_loaders(pack, monkeypatch, family, modules):
    """ComfyUI's key map and diffusers' converter, on U-Nets without memory."""
    import json

    import comfy.lora
    import comfy.model_base
    import comfy.supported_models
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import random_checkpoint

    families, patches = pack("fmn.models.families"), pack("fmn.patches.patch")
    family = getattr(families, family)
    changes = {
        layer.name: (torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1]))
        for layer in families.layers(family)
        if layer.is_key_or_value
    }
    lora = patches.ForgetPatch(family, changes, {"concepts": []}).lora()
    assert len(lora) == 2 * modules

    if family is not families.SD2:  # ComfyUI tells SD 2.x from 1.x by the text width alone
        config = {"sd1": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}
        unet = random_checkpoint.UNETS["sd15" if family is families.SD1 else "sdxl"]
        config = config[family.key](random_checkpoint.COMMON | unet)
        config.set_inference_dtype(torch.float16, None)
        model = config.get_model({}, "", device=torch.device("meta"))
        names = comfy.lora.model_lora_keys_unet(model, {})
        assert len(comfy.lora.load_lora(dict(lora), names)) == modules

    assets = ROOT / "fmn" / "assets" / "pipelines.json"
    config = json.loads(assets.read_text())[family.key]["unet/config.json"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(dict(lora), unet_config=unet.config)
    inside = {f"unet.{name}" for name, _ in unet.named_modules()}
    ending = re.compile(r"\.processor\.(to_[kv])_lora\.(down|up)\.weight$")
    found = {ending.sub(r".\1", key) for key in converted}
    assert len(found) == modules and found <= inside
