"""Folders of models with more inputs, as their own pipelines save them, and what is refused."""

import inspect
import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.hosts.diffusers import load
from fmn.hosts.diffusers.load import load_pipeline, make_tokenizer
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import resteer
from fmn.models.families import FAMILIES, SDXL, CLIPConfig, UNetFamily
from fmn.models.sampling import ddim
from fmn.patches.foreign_file import read_foreign
from fmn.training import fit_adapters
from fmn.training.memory import Activations

KINDS = {8: "InstructPix2PixPipeline", 9: "InpaintPipeline"}
XL = UNetFamily(
    key="sdxl", title="Tiny XL", channels=(8, 16), blocks=1, depth=(0, 2), middle_depth=2,
    context_dim=40, linear_projection=True, resolution=64,
    architecture="stable-diffusion-xl-v1-base", base_version="sdxl_base_v1-0",
    stability_names=True, vector_dim=24 + 6 * 8,
    texts=(CLIPConfig("clip_l", 2, 16), CLIPConfig("clip_g", 2, 24)),
)  # fmt: skip


def widened(pipeline, channels):
    """The parts of a pipeline whose U-Net reads more than noise."""
    unet = pipeline.unet
    old = unet.conv_in
    unet.conv_in = torch.nn.Conv2d(channels, old.out_channels, 3, padding=1)
    with torch.no_grad():
        unet.conv_in.weight[:, :4] = old.weight
    unet.register_to_config(in_channels=channels)
    return pipeline.components


def folder_of(pipeline, channels, folder):
    parts = widened(pipeline, channels)
    xl = "text_encoder_2" in parts
    kind = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{KINDS[channels]}")
    names = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in names}
    kind(**parts, **({} if xl else {"requires_safety_checker": False})).save_pretrained(folder)
    return kind


def tiny_xl():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, cross_attention_dim=40, attention_head_dim=2, sample_size=8,
            transformer_layers_per_block=[1, 2], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=XL.vector_dim,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        first, second = (
            kind(
                CLIPTextConfig(
                    hidden_size=text.width, intermediate_size=4 * text.width,
                    num_hidden_layers=text.blocks, num_attention_heads=2, projection_dim=text.width,
                    vocab_size=49408, eos_token_id=49407, bos_token_id=49406,
                )
            )
            for kind, text in zip((CLIPTextModel, CLIPTextModelWithProjection), XL.texts)
        )  # fmt: skip
    demo = load_pipeline("demo")
    return diffusers.StableDiffusionXLPipeline(
        vae=demo.vae, unet=unet, scheduler=demo.scheduler, text_encoder=first,
        text_encoder_2=second, tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer("!"),
    )  # fmt: skip


@pytest.mark.parametrize("channels", KINDS)
@pytest.mark.parametrize("xl", [False, True], ids=["demo", "xl"])
def test_folders_of_variants_are_trained_and_merged(tmp_path, monkeypatch, channels, xl):
    monkeypatch.setitem(FAMILIES, "sdxl", XL)
    measured = Activations(0, 0)  # longer than the steps here
    monkeypatch.setattr(fit_adapters, "measure_activations", lambda *given: measured)
    kind = folder_of(tiny_xl() if xl else load_pipeline("demo"), channels, tmp_path / "base")
    model = DiffusersModel.load(tmp_path / "base")
    assert type(model.saved) is kind and (model.family is XL) == xl
    settings = resteer.Settings(steps=2, size=64, lr=0.01, layers="attention")
    before = {name: weight.clone() for name, weight in model.unet.state_dict().items()}

    def as_it_was():
        now = model.unet.state_dict()
        hooked = [m for m in model.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
        return not hooked and all(torch.equal(now[name], before[name]) for name in before)

    def cancel(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resteer.run(model, [Concept("dog")], settings, cancel)
    assert as_it_was()
    patch = resteer.run(model, [Concept("dog")], settings)
    assert as_it_was()
    latents = model.sample(Prompt("a photo of a dog", "dog"), [1], 64, 2, 3.5)
    assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all() and as_it_was()

    model.add_patches([(patch, 1.0)]).save(tmp_path / "merged")
    again = DiffusersModel.load(tmp_path / "merged")
    assert type(again.saved) is kind and again.unet.config.in_channels == channels
    base = DiffusersModel.load(tmp_path / "base")
    for name in patch.changes:
        change = again.unet.get_submodule(name).weight - base.unet.get_submodule(name).weight
        torch.testing.assert_close(change, patch.change_of(name), rtol=1e-3, atol=1e-6)


def scheduled(scheduler, **config):
    pipeline = load_pipeline("demo")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **config)
    return pipeline


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_v_prediction_with_zero_terminal_snr(name):
    """eps = sqrt(a) v + sqrt(1 - a) x, and a is 0 at the last step: nothing divides by it."""
    pipeline = scheduled(
        getattr(diffusers, name),
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    model = DiffusersModel(pipeline)
    assert model.prediction == "v"
    prompt = Prompt("a photo of a dog", "dog")
    text, noise = model.encode(prompt), torch.randn(1, 4, 8, 8)
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        drawn = ddim(
            lambda x, t: denoiser.predict_noise(x, torch.tensor([t]), text),
            noise, denoiser.alphas_cumprod, 4,
        )  # fmt: skip
        first = denoiser.predict_noise(noise, torch.tensor([999]), text)
    assert drawn.isfinite().all() and drawn.std() < 10
    torch.testing.assert_close(first, noise, atol=0.01, rtol=0)  # nothing but noise is there
    assert model.sample(prompt, [1], 64, 3, 3.5).isfinite().all()


def test_other_predictions_are_refused():
    for pipeline, told in (
        (scheduled(diffusers.DDIMScheduler, prediction_type="sample"), "predicts 'sample'"),
        (scheduled(diffusers.EDMEulerScheduler), "EDMEulerScheduler.*inside ComfyUI"),
    ):
        with pytest.raises(ForgetError, match=told):
            DiffusersModel(pipeline)


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_files_of_edm_are_refused(tmp_path, key):
    path = tmp_path / "cosxl.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(ForgetError, match="cosxl.*EDM's noise levels.*inside ComfyUI"):
        load._prediction(read_foreign(path), SDXL)


def test_transformers_are_refused_with_what_works():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    names = "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, **dict.fromkeys(names))
    with pytest.raises(ForgetError, match="FluxPipeline.*inside ComfyUI.*UCE and ESD"):
        DiffusersModel(pipeline)


def test_folders_of_quantised_parts_are_refused(tmp_path):
    """Before any part is loaded, which would ask for the library that quantised it."""
    load_pipeline("demo").save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    told = json.loads(config.read_text())
    told["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.write_text(json.dumps(told))
    with pytest.raises(ForgetError, match="unet' holds quantised weights.*float16"):
        DiffusersModel.load(tmp_path / "base")
