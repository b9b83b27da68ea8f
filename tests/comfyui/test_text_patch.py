"""Patches that change the text encoder: in ComfyUI's own loader, in our node, and trained here."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from .parts import concept, gradient_flags, leftovers, same_bits, state
from .server import PromptError
from .test_measure import text_patcher
from .workflows import demo_loader, drawing, node

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


def make(pack, model, method="quickfix", **settings):
    chosen = pack(f"fmn.methods.{method}").Settings(**settings)
    return pack("fmn.methods").forget(model, [concept(pack, anchor="cat")], chosen)


def encoded(clip, text=PROMPT):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text)).clone()


def test_both_hosts_solve_the_same_quickfix(pack, comfy_model, pipeline_model):
    one, two = (make(pack, m, keep_list="none") for m in (comfy_model, pipeline_model))
    (name,) = one.changes
    difference = (one.change_of(name) - two.change_of(name)).norm()
    assert difference < 1e-2 * one.change_of(name).norm()
    assert one.info["loss"]["first"] == pytest.approx(two.info["loss"]["first"], rel=1e-3)
    assert one.info["base.fingerprint"] == two.info["base.fingerprint"]


def test_both_hosts_train_the_same_hirm(pack, comfy_model, pipeline_model):
    losses = []
    for model in (comfy_model, pipeline_model):
        with torch.inference_mode():
            patch = make(pack, model, "hirm", steps=4)
        losses.append((patch.info["loss"]["first"], patch.info["loss"]["last"]))
        assert len(patch.changes) == 6
    np.testing.assert_allclose(*losses, rtol=2e-3)


@pytest.mark.parametrize("prompt, sections", [("a (dog:1.3), twemoji", 1), ("a dog " * 60, 2)])
def test_weighted_and_long_prompts_are_read(pack, comfy_model, prompt, sections):
    """Quickfix reads what goes into the layer, one row a section, without the empty prompt's."""
    quickfix = pack("fmn.methods.quickfix")
    with (
        comfy_model.borrow_text_encoder(words=False) as text,
        torch.no_grad(),
        quickfix._layer_inputs(comfy_model, text.module(quickfix.LAYER)) as inputs,
    ):
        weighted = pack("fmn.concepts.concept").Prompt(prompt, "dog", plain=False)
        found = inputs.encode(weighted).context
        assert found.shape == (1, 77 * sections, 128) and found.dtype == torch.float64
        plain = inputs.encode_all([prompt.replace("(dog:1.3)", "dog")[:40]])
    if sections == 1:  # weights act behind the encoder
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


@pytest.fixture
def apply(pack):
    return pack("nodes.patch").ApplyForgetPatch


def test_a_text_patch_does_the_same_in_comfyui_and_diffusers(pack, comfy_model, apply, tmp_path):
    """Our Apply node, stock Load LoRA, our merged checkpoint, and diffusers."""
    import comfy.sd
    from safetensors.torch import load_file

    patches = pack("fmn.patches.patch")
    file = patches.save_patch(make(pack, comfy_model), tmp_path / "dog.safetensors")
    patch = patches.load_patch(file)
    plain = encoded(comfy_model.clip)
    _, clip = apply.execute(comfy_model.patcher, patch, 0.8, comfy_model.clip).result
    outputs = {"apply": encoded(clip)}
    _, stock = comfy.sd.load_lora_for_models(None, comfy_model.clip, load_file(file), 0.0, 0.8)
    outputs["load lora"] = encoded(stock)
    assert torch.equal(encoded(comfy_model.clip), plain)

    host, Prompt = (
        pack("fmn.hosts.diffusers.model").DiffusersModel,
        pack("fmn.concepts.concept").Prompt,
    )
    loaded = host.load("demo")
    loaded.pipeline.load_lora_weights(load_file(file))
    loaded.pipeline.set_adapters(loaded.pipeline.get_active_adapters(), 0.8)
    outputs["diffusers"] = loaded.encode(Prompt(PROMPT, "dog")).context
    checkpoint = tmp_path / "merged.safetensors"
    source = pack("fmn.hosts.diffusers.load").DEMO_FILE
    pack("fmn.patches.checkpoint").merge_into_checkpoint(source, [(patch, 0.8)], checkpoint)
    outputs["merged file"] = host.load(checkpoint).encode(Prompt(PROMPT, "dog")).context
    with torch.inference_mode():
        _, merged_clip, _ = pack("nodes.demo").load_demo_checkpoint(checkpoint)
    outputs["merged file in ComfyUI"] = encoded(merged_clip)

    assert (outputs["apply"] - plain).abs().max() > 0.5
    for name, result in outputs.items():
        difference = float((result - outputs["apply"]).abs().max())
        print(f"{name}: {difference:.1e} of {float(plain.abs().max()):.1f}")
        assert difference < 1e-3, name


@pytest.mark.parametrize("method, dtype", [("quickfix", None), ("hirm", None), ("hirm", "half")])
@pytest.mark.parametrize("fails", [False, True])
def test_the_clip_comes_back_unchanged(pack, comfy_model, method, dtype, fails, monkeypatch):
    patcher = text_patcher(comfy_model)
    if dtype:
        patcher.model.half()
    before, flags = state(patcher), gradient_flags(patcher)
    assert any(parameter.is_inference() for parameter in patcher.model.parameters())

    def fault(*args, **options):
        raise RuntimeError("a fault")

    if fails:
        name = {"hirm": "fmn.training.run", "quickfix": "fmn.methods.quickfix"}[method]
        monkeypatch.setattr(pack(name), {"hirm": "Trainer", "quickfix": "uce"}[method], fault)
    try:
        with torch.inference_mode():
            patch = make(pack, comfy_model, method, **({"steps": 2} if method == "hirm" else {}))
        assert not fails and all(patch.change_of(name).norm() > 0 for name in patch.changes)
    except RuntimeError as error:
        assert fails and str(error) == "a fault"
    assert same_bits(before, state(patcher)) and gradient_flags(patcher) == flags
    assert leftovers(patcher.model) == []


def test_unet_and_text_patches_stack(pack, comfy_model, apply):
    resteer = pack("fmn.methods.resteer")
    settings = resteer.Settings(steps=2, lr=0.002, references="zeros")
    unet = resteer.run(comfy_model, [concept(pack)], settings)
    text = make(pack, comfy_model, keep_list="none")
    both = replace(unet, changes=unet.changes | text.changes)
    model, clip = comfy_model.patcher, comfy_model.clip
    one, same_clip = apply.execute(model, unet, 1.0, clip).result
    assert same_clip is clip
    stacked, stacked_clip = apply.execute(one, text, 0.5, same_clip).result
    assert apply.execute(model, unet, 1.0).result[1] is None
    at_once, clip_at_once = apply.execute(model, both, 1.0, clip).result
    assert len(stacked.patches) == len(one.patches) == len(at_once.patches) == 14
    half = apply.execute(model, text, 0.5, stacked_clip).result[1]
    torch.testing.assert_close(encoded(half), encoded(clip_at_once), rtol=0, atol=1e-4)
    assert (encoded(stacked_clip) - encoded(half)).abs().max() > 0.1


def test_another_clip_is_refused(pack, comfy_model, demo):
    """A CLIP whose encoder lacks the patch's layers."""
    import comfy.sd

    patch = make(pack, comfy_model, keep_list="none")
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.patcher = demo[1].tokenizer, demo[1].patcher
    clip.cond_stage_model = torch.nn.Module()
    host = type(comfy_model)(comfy_model.patcher, clip)
    with pytest.raises(pack("fmn.errors").ForgetError, match="no layer clip_l.*same checkpoint"):
        host.patched_clip(patch, 1.0)


def test_a_quantised_clip_is_refused(pack, comfy_model):
    quickfix = pack("fmn.methods.quickfix")
    module = comfy_model.text_module(quickfix.LAYER)
    quantised = torch.nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), False)
    module.weight = quantised
    with pytest.raises(pack("fmn.errors").ForgetError, match="quantised .*float8_e4m3fn"):
        make(pack, comfy_model)


def tiny_xl(pack, demo):
    """A host with ComfyUI's two text encoders of SDXL, small, over the demo's U-Net."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.sdxl_clip

    families = pack("fmn.models.families")
    sizes = {"clip_l": (3, 16), "clip_g": (4, 24)}
    texts = tuple(families.CLIPConfig(name, *size) for name, size in sizes.items())
    options = {
        f"{name}_model_config": {
            "num_hidden_layers": blocks, "hidden_size": width, "intermediate_size": 4 * width,
            "num_attention_heads": 2, "projection_dim": width,
        }
        for name, (blocks, width) in sizes.items()
    }  # fmt: skip
    clip = comfy.sd.CLIP(no_init=True)
    with torch.inference_mode():
        stage = comfy.sdxl_clip.SDXLClipModel(dtype=torch.float32, model_options=options)
        generator = torch.Generator().manual_seed(0)
        for name, value in stage.named_parameters():
            if value.dim() > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(0 if name.endswith("bias") else 1)
    cpu = torch.device("cpu")
    clip.cond_stage_model, clip.tokenizer = stage, comfy.sdxl_clip.SDXLTokenizer()
    clip.patcher = comfy.model_patcher.ModelPatcher(stage, load_device=cpu, offload_device=cpu)
    clip.layer_idx, clip.tokenizer_options = None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    host = pack("fmn.hosts.comfyui.model").ComfyModel(demo[0], clip)
    host.fingerprint = lambda: "f" * 32
    host.family = replace(families.SDXL, context_dim=40, texts=texts)
    return host


def test_two_encoders_can_be_borrowed_but_learn_no_words(pack, demo):
    ForgetError, host = pack("fmn.errors").ForgetError, tiny_xl(pack, demo)
    refused = pytest.raises(ForgetError, match="Stable Diffusion XL has two text encoders")
    with refused, host.borrow_text_encoder():
        pass
    expected = host.encode(pack("fmn.concepts.concept").Prompt(PROMPT, "dog"))
    assert expected.context.shape == (1, 77, 40)
    short, whole = (host.encode_all([PROMPT, ""], length) for length in (20, 77))
    torch.testing.assert_close(short, whole[:, :20])
    before = state(host.clip.patcher)
    with torch.inference_mode(), host.borrow_text_encoder(words=False) as text:
        found, pooled = text.encode(PROMPT)
        with refused:
            text.vectors("dog")
        with refused:
            text.encode("a <*>", torch.zeros(1, 16))
        ids = text.ids_of([PROMPT])
        assert ids.shape == (1, 2, 77)
        both = text.encode_ids(ids[..., :20])
    torch.testing.assert_close(both.context, expected.context[:, :20])
    torch.testing.assert_close(both.vectors["pooled"], expected.vectors["pooled"])
    assert torch.equal(found.context, expected.context)
    assert torch.equal(pooled, expected.vectors["pooled"])
    assert torch.equal(found.vectors["pooled"], pooled)
    for method, count in (("quickfix", 1), ("hirm", 6)):
        given = {"steps": 2, "preserve": 0.0} if method == "hirm" else {"preserve": 0.0}
        with torch.inference_mode():
            patch = make(pack, host, method, **given)
        assert len(patch.changes) == count
        assert all(name.startswith("text_encoder.") for name in patch.changes)
        assert all(patch.change_of(name).norm() > 0 for name in patch.changes)
        # On the CLIP it changes what the first encoder gives, and nothing of the second.
        clip = host.patched_clip(patch, 1.0)
        difference = (encoded(clip) - encoded(host.clip)).abs().amax((0, 1))
        assert difference[:16].max() > 1e-4 and difference[16:].max() == 0
    assert same_bits(before, state(host.clip.patcher)) and leftovers(host.clip.patcher.model) == []


def test_the_clip_of_another_family_is_refused(pack, demo, comfy_model):
    host = copy.copy(comfy_model)
    host.family = pack("fmn.models.families").SDXL
    with (
        pytest.raises(pack("fmn.errors").ForgetError, match="gives tokens for l, but .* clip_g"),
        host.borrow_text_encoder(words=False),
    ):
        pass


@pytest.fixture(scope="module")
def text_file(pack, server):
    """A text patch and a U-Net patch of the demo model where the server finds them."""
    with torch.inference_mode():
        model = pack("fmn.hosts.comfyui.model").ComfyModel(
            *pack("nodes.demo").load_demo_checkpoint()
        )
    folder = server.base / "models" / "forget_patches"
    folder.mkdir(parents=True, exist_ok=True)
    save, resteer = pack("fmn.patches.patch").save_patch, pack("fmn.methods.resteer")
    save(make(pack, model), folder / "text.safetensors")
    unet = resteer.run(
        model, [concept(pack)], resteer.Settings(steps=10, lr=0.002, references="zeros")
    )
    save(unet, folder / "unet.safetensors")
    return "text.safetensors"


def applying(file, clip=True, name="apply", model=("demo", 0)):
    given = {"clip": ["demo", 1]} if clip else {}
    return {
        "load": node("FMN_LoadForgetPatch", file=file),
        name: node(
            "FMN_ApplyForgetPatch", model=list(model), patch=["load", 0], strength=1.0, **given
        ),
    }  # fmt: skip


def with_clip(prompt, name, source):
    for part in ("pos", "neg"):
        prompt[f"{name}_{part}"]["inputs"]["clip"] = [source, 1]
    return prompt


def test_without_clip_the_node_refuses(server, text_file):
    prompt = demo_loader() | applying(text_file, clip=False)
    with pytest.raises(PromptError, match="changes the text encoder, but the clip input is empty"):
        server.run(prompt | drawing(["apply", 0]))


def test_with_clip_prompts_change_as_with_stock_load_lora(server, text_file):
    stock = node(
        "LoraLoader", model=["demo", 0], clip=["demo", 1], lora_name=text_file, strength_model=1.0,
        strength_clip=1.0,
    )  # fmt: skip
    prompt = demo_loader() | applying(text_file) | {"lora": stock} | drawing(name="before")
    prompt |= drawing(["apply", 0], name="unused")  # the old text with the new model
    prompt |= with_clip(drawing(["apply", 0], name="ours"), "ours", "apply")
    prompt |= with_clip(drawing(["lora", 0], name="stock"), "stock", "lora")
    outputs = server.run(prompt)
    before, unused, ours, theirs = (
        server.image(outputs[name]) for name in ("before", "unused", "ours", "stock")
    )
    assert np.abs(ours - before).mean() > 0.02
    assert np.abs(unused - before).max() <= 1.5 / 255
    assert np.abs(ours - theirs).max() <= 1.5 / 255
    assert "lora key not loaded" not in server.log_text()


def test_a_unet_patch_and_a_text_patch_on_one_model(server, text_file):
    prompt = demo_loader() | {
        "unet": node("FMN_LoadForgetPatch", file="unet.safetensors"),
        "first": node(
            "FMN_ApplyForgetPatch", model=["demo", 0], patch=["unet", 0], strength=1.0,
            clip=["demo", 1],
        ),
    }  # fmt: skip
    prompt |= applying(text_file, model=("first", 0)) | drawing(["first", 0], name="one")
    prompt["apply"]["inputs"]["clip"] = ["first", 1]
    prompt |= with_clip(drawing(["apply", 0], name="both"), "both", "apply")
    prompt |= with_clip(drawing(["demo", 0], name="text"), "text", "apply")
    prompt["inspect"] = node("FMN_InspectForgetPatch", patch=["load", 0])
    outputs = server.run(prompt)
    one, both, text = (server.image(outputs[name]) for name in ("one", "both", "text"))
    assert np.abs(both - one).mean() > 0.02 and np.abs(both - text).mean() > 0.002
    assert "dog (object)" in outputs["inspect"]["text"][0]
