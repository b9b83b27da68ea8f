"""What the ComfyUI host refuses, each in one sentence, with objects in hand."""

import pytest
import torch

from .parts import concept, settings


def test_pictures_without_vae_are_refused(pack, demo):
    model = pack("fmn.hosts.comfyui.model").ComfyModel(*demo[:2])
    pictures = torch.zeros(1, 64, 64, 3)
    with pytest.raises(pack("fmn.errors").ForgetError, match="the VAE input is empty"):
        pack("fmn.methods.resteer").run(model, [concept(pack, images=pictures)], settings(pack))


def test_missing_clip_is_refused(pack, demo):
    model = pack("fmn.hosts.comfyui.model").ComfyModel(demo[0])
    with pytest.raises(pack("fmn.errors").ForgetError, match="CLIP input is empty"):
        pack("fmn.methods.resteer").run(model, [concept(pack)], settings(pack))


def test_clip_of_another_family_is_refused(pack, demo):
    """SD 1.x's real text encoder beside the demo's U-Net: the sentence names both widths."""
    import comfy.sd
    import comfy.supported_models

    with torch.inference_mode():
        other = comfy.sd.CLIP(comfy.supported_models.SD15({}).clip_target({}))
        other.patcher.model.zero_grad()
    model = pack("fmn.hosts.comfyui.model").ComfyModel(demo[0], other)
    with pytest.raises(pack("fmn.errors").ForgetError, match="width 768.*width 128.*same check"):
        pack("fmn.methods.resteer").run(model, [concept(pack)], settings(pack))


def test_unknown_model_is_refused(pack, demo):
    patcher = demo[0]
    attention = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    attention.to_k = torch.nn.Linear(128, 64, bias=False)
    with pytest.raises(pack("fmn.errors").ForgetError, match="BaseModel is an unsupported model"):
        pack("fmn.hosts.comfyui.model").ComfyModel(patcher)


def test_patch_of_another_family_names_both(pack, comfy_model):
    module = pack("fmn.patches.patch")
    families = pack("fmn.models.families")
    patch = module.ForgetPatch(families.SDXL, {}, {"concepts": []})
    with pytest.raises(pack("fmn.errors").ForgetError, match="Diffusion XL.*demo model"):
        comfy_model.patched(patch, 1.0)


def test_rescued_patch_is_saved_and_named(pack, comfy_model, monkeypatch, tmp_path):
    """When the loss stops being finite after some steps, the last good patch is on disk."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    node = pack("nodes.patch")
    errors = pack("fmn.errors")
    error = errors.NonFiniteLoss("The loss is not finite at step 3.", [1.0, 0.9])
    error.patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack))
    told = pack("fmn.patches.patch").rescue(error, node.output_path("rescued"))
    (file,) = (tmp_path / "forget_patches").iterdir()
    assert file.name in str(told)
    assert pack("fmn.patches.patch").load_patch(file).concepts == ["dog"]
