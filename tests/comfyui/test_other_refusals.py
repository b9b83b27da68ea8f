"""What is refused of models that are no family of ours, and of patch files for them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .others import esd_settings
from .parts import concept


def test_other_methods_and_options_refuse(pack, other_host):
    methods, model = pack("fmn.methods"), other_host("Flux")
    for name in methods.METHODS:
        if name not in ("ablation", "esd", "reread", "uce"):
            preset = methods.METHODS[name][0]
            with pytest.raises(pack("fmn.errors").ForgetError, match="Flux.1 is none .*Re-read"):
                methods.forget(model, [concept(pack)], methods.settings_of(preset, {}))
    robust = methods.settings_of("reread-robust", {})
    with pytest.raises(pack("fmn.errors").ForgetError, match="are for U-Nets, and Flux.1 is none"):
        methods.forget(model, [concept(pack)], robust)
    for changes, message in (
        ({"layers": "x-strict"}, "Flux.1 has no layers"),
        ({"layers": "x-strict", "protect": True}, "Flux.1 is none of them: turn protect off"),
    ):
        with pytest.raises(pack("fmn.errors").ForgetError, match=message):
            methods.forget(model, [concept(pack)], esd_settings(pack, **changes))


def test_models_that_draw_no_pictures_from_noise_refuse(pack, other_host):
    import comfy.latent_formats

    forget, wrong = pack("fmn.methods").forget, pack("fmn.errors").ForgetError
    with pytest.raises(wrong, match="inpainting or editing variant"):
        forget(other_host("Flux", in_channels=32), [concept(pack)], esd_settings(pack))
    model = other_host("Flux")
    for kind in ("StableAudio1", "SC_Prior"):
        model.patcher.model.latent_format = getattr(comfy.latent_formats, kind)()
        with pytest.raises(wrong, match="does not draw single pictures"):
            forget(model, [concept(pack)], esd_settings(pack))
    model = other_host("SD3")
    with torch.inference_mode():
        model.patcher.model.diffusion_model.to(torch.float8_e4m3fn)
    with pytest.raises(wrong, match="quantised .*float8_e4m3fn"):
        forget(model, [concept(pack)], esd_settings(pack))
    with pytest.raises(wrong, match="CLIP input is empty"):
        pack("fmn.hosts.comfyui.unknown_model").host_of(model.patcher).encode(
            concept(pack).training_prompts()[0]
        )


@pytest.fixture
def saved(pack, other_host, tmp_path):
    """The file of a small patch for the tiny Flux."""
    settings = esd_settings(pack, steps=1, rank=1)
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(other_host("Flux"), [concept(pack)], settings)
    return pack("fmn.patches.patch").save_patch(patch, tmp_path / "flux.safetensors")


def test_patch_on_the_wrong_model_is_refused(pack, other_host, comfy_model, saved):
    patch, wrong = pack("fmn.patches.patch").load_patch(saved), pack("fmn.errors").ForgetError
    with pytest.raises(wrong, match="for Flux.1, the model is Stable Diffusion 3"):
        other_host("SD3").patched(patch, 1.0)
    with pytest.raises(wrong, match="for Flux.1, the model is .*demo model"):
        comfy_model.patched(patch, 1.0)
    with pytest.raises(
        wrong, match="double_blocks_1_txt_attn_proj', which this Flux.1 does not have"
    ):
        other_host("Flux", depth=1).patched(patch, 1.0)
    with pytest.raises(wrong, match=r"of shape \[32, 32\], the model has \[64, 64\]"):
        other_host("Flux", hidden_size=64, axes_dim=[8, 12, 12]).patched(patch, 1.0)
    assert len(other_host("Flux").patched(patch, 1.0).patches) == 4


QKV = "lora_unet_double_blocks_0_txt_attn_qkv"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"fmn.base.model": "Flux<b>"}, "no name of a model class"),
        ({}, {"fmn.base.model": "x" * 81}, "no name of a model class"),
        ({}, {"fmn.base.model": None}, "no name of a model class"),
        ({f"{QKV}.lora_up.weight": torch.ones(96, 2)}, {}, "does not fit"),
        ({f"{QKV}.lora_up.weight": torch.ones(96, 1, 1, 1)}, {}, "make no weight"),
        ({f"{QKV}.lora_up.weight": torch.ones(96, 1).double()}, {}, "as F64"),
        ({f"{QKV}.alpha": torch.ones(2)}, {}, "does not fit"),
        ({f"{QKV}.alpha": torch.tensor(torch.inf)}, {}, "NaN or infinite"),
        ({f"{QKV}.dora_scale": torch.ones(1)}, {}, "no name of a LoRA's layer"),
        ({"lora_unet_more.alpha": torch.ones(1)}, {}, "make no weight"),
        ({"lora_te_more.alpha": torch.ones(1)}, {}, "no name of a LoRA's layer"),
        ({"lora_unet_\u00e9.alpha": torch.ones(1)}, {}, "no name of a LoRA's layer"),
        (
            {
                "lora_unet_huge.lora_up.weight": torch.ones(1 << 16, 1),
                "lora_unet_huge.lora_down.weight": torch.ones(1, 1 << 15),
            },
            {},
            "make no weight of 1 to",
        ),
        (
            {f"lora_unet_{i}.alpha": torch.ones(()) for i in range(8192)},
            {},
            "at most 8192",
        ),
    ],
)
def test_bad_files_are_refused(pack, saved, tensors, metadata, message):
    with safe_open(saved, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()} | tensors  # noqa: SIM118
        told = {key: value for key, value in (file.metadata() | metadata).items() if value}
    save_file(found, saved, metadata=told)
    with pytest.raises(pack("fmn.errors").ForgetError, match=message):
        pack("fmn.patches.patch").load_patch(saved)
