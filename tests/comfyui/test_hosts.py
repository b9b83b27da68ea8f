"""The two hosts against each other, and what borrowing leaves behind, with objects in hand."""

import re
import sys

import numpy as np
import pytest
import torch

from .conftest import ROOT
from .parts import concept, settings

PROMPT = "a photo of a dog"
STEPS = 10  # 999 / 9 is whole: both hosts then sample at the same trained time steps


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers").DiffusersModel.load("demo")


def state(patcher):
    return {key: value.clone() for key, value in patcher.model.state_dict().items()}


def gradient_flags(patcher):
    return {name: parameter.requires_grad for name, parameter in patcher.model.named_parameters()}


def leftovers(module):
    """Names of modules with hooks or a replaced forward."""
    return [
        name
        for name, part in module.named_modules()
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    ]


def test_both_hosts_draw_the_same_picture(pack, demo, pipeline_model):
    """The same first noise, prompt, guidance and steps: pictures equal to float tolerance."""
    import comfy.sample

    model, clip, vae = demo
    noise = pipeline_model.latents_like([3], 128)
    with torch.inference_mode():
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")
        )
        latents = comfy.sample.sample(
            model, noise, STEPS, 3.5, "euler", "normal", positive, negative,
            torch.zeros_like(noise), seed=3,
        )  # fmt: skip
        ours = vae.decode(latents).clone()
    theirs = pipeline_model.decode(pipeline_model.sample_latents([PROMPT], noise, STEPS, 3.5))
    assert ours.std() > 0.1
    # float32 rounding over ten steps; one grey level is 0.004.
    assert (ours - theirs).abs().max() < 2e-3


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
    pipeline = pack("fmn.hosts.diffusers_load").load_pipeline("demo")
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
    hosts = pack("fmn.hosts.comfy").ComfyModel(*demo), pack("fmn.hosts.diffusers").DiffusersModel
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

    patches = pack("fmn.patch")
    patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack, steps=20))
    file = patches.save_patch(patch, tmp_path / "dog.safetensors")
    patch = patches.load_patch(file)
    probe = pack("fmn.model"), pack("fmn.concept").Prompt(PROMPT, "dog")
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500])

    def output(model):
        text = model.encode(probe[1])
        with model.borrow() as borrowed, torch.no_grad():
            return borrowed.denoise(x_t, t, text)

    ComfyModel = type(comfy_model)
    plain = output(comfy_model)
    apply = ComfyModel(comfy_model.patched(patch, 1.0), comfy_model.clip)
    stock, _ = comfy.sd.load_lora_for_models(comfy_model.patcher, None, load_file(file), 1.0, 0.0)
    outputs = {"apply": output(apply), "load lora": output(ComfyModel(stock, comfy_model.clip))}

    DiffusersModel = pack("fmn.hosts.diffusers").DiffusersModel
    fused = DiffusersModel.load("demo")
    logging.set_verbosity_error()
    fused.pipeline.load_lora_weights(load_file(file))
    fused.pipeline.fuse_lora()
    fused.pipeline.unload_lora_weights()
    outputs["diffusers"] = output(fused)

    checkpoint = tmp_path / "merged.safetensors"
    source = pack("fmn.hosts.diffusers_load").DEMO_FILE
    pack("fmn.checkpoint").merge_into_checkpoint(source, [(patch, 1.0)], checkpoint)
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers, full", [("kv", False), ("attention", True), ("unet", True)])
def test_borrowed_model_comes_back_unchanged(pack, comfy_model, layers, full, checkpointing):
    patcher = comfy_model.patcher
    before, flags = state(patcher), gradient_flags(patcher)
    pack("fmn.methods.resteer").run(
        comfy_model,
        [concept(pack)],
        settings(pack, layers=layers, full_weights=full, checkpointing=checkpointing),
    )
    after = state(patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(patcher.model) == []
    assert gradient_flags(patcher) == flags


@pytest.mark.parametrize("when", [1, 2])
def test_borrowed_model_comes_back_after_an_exception(pack, comfy_model, when):
    patcher = comfy_model.patcher
    before = state(patcher)

    def fail(step):
        if step.index == when:
            raise RuntimeError("a fault in the loop")

    with pytest.raises(RuntimeError, match="a fault in the loop"):
        pack("fmn.methods.resteer").run(
            comfy_model, [concept(pack)], settings(pack, checkpointing=True), fail
        )
    after = state(patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(patcher.model) == []


def test_a_patched_model_can_be_trained_and_keeps_its_patch(pack, comfy_model):
    """Training on a MODEL that carries a LoRA sees the LoRA; the base's fingerprint stays."""
    run = pack("fmn.methods.resteer").run
    patch = run(comfy_model, [concept(pack)], settings(pack, steps=10))
    patched = type(comfy_model)(comfy_model.patched(patch, 1.0), comfy_model.clip)
    losses = []
    again = run(
        patched, [concept(pack)], settings(pack), lambda step: losses.append(step.losses[-1])
    )
    assert losses[0] < 0.95 * patch.info["loss"]["first"]
    assert again.info["base.fingerprint"] == patch.info["base.fingerprint"]


def dynamic(demo, cached_patcher_init):
    """A mock: the demo's MODEL as from 0.16 on a GPU, whose weights are paged while it is used.

    There, ``clone(disable_dynamic=True)`` loads the checkpoint anew as a plain patcher, and raises
    for loaders that did not say how.
    """
    import comfy.model_patcher

    class DynamicPatcher(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

        def clone(self, disable_dynamic=False):
            if not disable_dynamic:
                return super().clone()
            if cached_patcher_init is None:
                raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init")
            return cached_patcher_init()

        def load(self, *args, **arguments):
            raise AssertionError("paged weights cannot be trained on")

    plain = demo[0]
    return DynamicPatcher(plain.model, plain.load_device, plain.offload_device)


def test_paged_models_are_trained_on_a_plain_copy(pack, demo, comfy_model):
    ComfyModel, load = pack("fmn.hosts.comfy").ComfyModel, pack("nodes.demo").load_demo_checkpoint
    run, steps = pack("fmn.methods.resteer").run, settings(pack)
    paged = dynamic(demo, lambda: load()[0])
    before = state(paged)
    with torch.inference_mode():
        found = run(ComfyModel(paged, demo[1]), [concept(pack)], steps)
        plain = run(comfy_model, [concept(pack)], steps)
    for name in plain.changes:
        torch.testing.assert_close(found.change_of(name), plain.change_of(name))
    after = state(paged)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(paged.model) == []

    refused = pytest.raises(pack("fmn.errors").ForgetError, match="stock checkpoint loader")
    with refused:
        run(ComfyModel(dynamic(demo, None), demo[1]), [concept(pack)], steps)


def test_another_packs_forward_survives(pack, comfy_model):
    """A forward that somebody else put on a module is back in place afterwards."""
    attention = comfy_model.patcher.model.diffusion_model.get_submodule(
        "middle_block.1.transformer_blocks.0.attn2"
    )
    theirs = attention.forward
    attention.forward = theirs
    try:
        pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack))
        assert attention.__dict__["forward"] is theirs
    finally:
        del attention.forward


def test_reference_pictures_and_own_samples_change_the_patch(pack, comfy_model):
    run = pack("fmn.methods.resteer").run
    pictures = torch.rand(2, 96, 160, 4, generator=torch.Generator().manual_seed(0))
    data = pack("fmn.methods.resteer").prepare(
        comfy_model, [concept(pack, images=pictures)], settings(pack)
    )
    with torch.inference_mode():
        cut = torch.nn.functional.interpolate(
            pictures[..., :3].movedim(-1, 1)[..., 32:128], size=128, mode="bilinear", antialias=True
        )
        encoded = comfy_model.vae.encode(cut.movedim(1, -1)) * 0.18215
    # Cut before or after scaling: a third of a pixel apart.
    assert (data.latents[0] - encoded).abs().mean() < 0.05 * encoded.abs().mean()
    losses = {
        "zeros": run(comfy_model, [concept(pack)], settings(pack)),
        "images": run(comfy_model, [concept(pack, images=pictures)], settings(pack)),
        "samples": run(
            comfy_model, [concept(pack)], settings(pack, references="samples", samples=1)
        ),
    }
    assert len({round(patch.info["loss"]["first"], 6) for patch in losses.values()}) == 3


def test_weights_and_long_prompts_are_understood(pack, comfy_model):
    """(name:1.2) is flagged without its weight; a prompt of two sections is found in both."""
    prepare = pack("fmn.methods.resteer").prepare
    long = "a dog, " + "very " * 80 + "big dog"
    data = prepare(comfy_model, [concept(pack, prompts=("a (dog:1.2) here", long))], settings(pack))
    template, weighted, two_sections = data.examples
    assert template.flags.nonzero()[:, 1].tolist() == [4]  # BOS a photo of dog
    assert weighted.flags.nonzero()[:, 1].tolist() == [2]
    assert two_sections.flags.shape == (1, 154)
    assert two_sections.text.context.shape[1] == 154
    first, last = two_sections.flags.nonzero()[:, 1].tolist()
    assert first == 2 and last > 77
    plain = prepare(comfy_model, [concept(pack, prompts=("a dog here",))], settings(pack))
    assert not torch.equal(plain.examples[1].text.context, weighted.text.context)


def test_parentheses_in_a_name_are_letters(pack, comfy_model):
    data = pack("fmn.methods.resteer").prepare(
        comfy_model, [concept(pack, "apollo (god)")], settings(pack)
    )
    assert int(data.examples[0].flags.sum()) >= 4  # apollo ( god )


def test_cancel_ends_training_within_the_step(pack, comfy_model):
    """ComfyUI's interrupt stops the very next forward: no other step is reported."""
    import comfy.model_management as management

    steps = []

    def cancel_at_the_third(step):
        steps.append(step.index)
        if step.index == 3:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        pack("fmn.methods.resteer").run(
            comfy_model, [concept(pack)], settings(pack, steps=10), cancel_at_the_third
        )
    assert steps == [1, 2, 3]
    assert leftovers(comfy_model.patcher.model) == []


@pytest.mark.parametrize("family, modules", [("SD1", 32), ("SD2", 32), ("SDXL", 140)])
def test_every_key_of_a_full_size_patch_is_known_to_the_loaders(pack, family, modules):
    """ComfyUI's key map and diffusers' converter, on U-Nets without memory."""
    import json

    import comfy.lora
    import comfy.model_base
    import comfy.supported_models
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import random_checkpoint

    families, patches = pack("fmn.families"), pack("fmn.patch")
    family = getattr(families, family)
    changes = {
        layer.name: (torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1]))
        for layer in families.layers(family)
        if layer.is_key_or_value
    }
    lora = patches.ForgetPatch(family, changes, {"concepts": []}).lora()
    assert len(lora) == 3 * modules

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


TOKENIZERS = {
    # family: (module and class of ComfyUI, how diffusers pads, positions flagged with all ends)
    "sd1": ("comfy.sd1_clip", "SD1Tokenizer", "<|endoftext|>", 73),
    "sd2": ("comfy.text_encoders.sd2_clip", "SD2Tokenizer", "!", 3),
    "sdxl": ("comfy.sdxl_clip", "SDXLTokenizer", "<|endoftext|>", 73),
}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_positions_with_the_real_tokenizers(pack, demo, family):
    """Both hosts see the same ids, and flag what the released rule flags on each family."""
    import importlib

    import comfy.sd

    module, name, pad, flagged = TOKENIZERS[family]
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer = getattr(importlib.import_module(module), name)()
    clip.tokenizer_options = {}
    model = pack("fmn.hosts.comfy").ComfyModel(demo[0], clip)
    prompt = pack("fmn.concept").Prompt("a photo of elon musk", "elon musk")
    ids = model.tokenize(prompt)
    tokenizer = pack("fmn.hosts.diffusers_load").make_tokenizer(pad)
    assert ids == tokenizer(prompt.text, padding="max_length", max_length=77).input_ids
    subject = model.tokenize(prompt._replace(text="elon musk"))
    positions = pack("fmn.spans").flagged_positions(prompt, ids, subject, "all")
    assert len(positions) == flagged and positions[:2] == [4, 5]
