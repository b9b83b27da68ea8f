"""Families and variants, from one file through ComfyUI's stock loader and through diffusers.

The two share no code of the models, so what agrees is right in both: tokens, encoded text,
predicted noise, and what a patch that one of them trained does in the other.
"""

import pytest
import torch

from .parts import concept, settings
from .reduced import V_MARK, known, text_options, write_checkpoint

MANY = torch.linspace(-0.3, 0.3, 320).half()
NOTHING = torch.tensor([])
VARIANTS = {
    # what it is: (family, channels, more keys, ComfyUI's class, prediction, pad id)
    "sd1 instruct": ("sd1", 8, {}, "SD15_instructpix2pix", "epsilon", 49407),
    "sd1 inpaint": ("sd1", 9, {}, "BaseModel", "epsilon", 49407),
    "sd2 768": ("sd2", 4, {V_MARK: MANY}, "BaseModel", "v", 0),
    "sd2 inpaint": ("sd2", 9, {V_MARK: MANY}, "BaseModel", "epsilon", 0),
    "sdxl instruct, v": (
        "sdxl", 8, {"v_pred": NOTHING, "ztsnr": NOTHING}, "SDXL_instructpix2pix", "v", 49407,
    ),
    "sdxl inpaint": ("sdxl", 9, {}, "SDXL", "epsilon", 49407),
}  # fmt: skip
TIMES = 10, 500, 999


def comfy_host(pack, path, key):
    import comfy.sd

    with torch.inference_mode():
        found = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, te_model_options=text_options(key)
        )
    return pack("fmn.hosts.comfyui.unknown_model").host_of(*found[:2])


def predictions(host, text, size=8):
    """Predicted noise at three times [3, 4, size, size]."""
    x_t = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    with host.borrow_denoiser() as denoiser, torch.no_grad():
        return torch.cat([denoiser.predict_noise(x_t, torch.tensor([t]), text) for t in TIMES])


def same_text(found, expected):
    torch.testing.assert_close(found.context, expected.context, rtol=1e-4, atol=1e-4)
    assert found.vectors.keys() == expected.vectors.keys()
    for part, ours in expected.vectors.items():
        torch.testing.assert_close(found.vectors[part], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_both_hosts_agree_on_a_variant(pack, monkeypatch, tmp_path, name):
    key, channels, more, kind, prediction, pad = VARIANTS[name]
    prompt = concept(pack).training_prompts()[0]
    long = prompt._replace(text="(a red dog:1.3) " + "and a cat " * 40, plain=False)
    with known(pack, monkeypatch, key) as family:
        path = write_checkpoint(tmp_path / "variant.safetensors", key, channels, more)
        model = comfy_host(pack, path, key)
        assert type(model.patcher.model).__name__ == kind
        assert model.family is family and model.prediction == prediction
        ids, text, fingerprint = model.tokenize(prompt), model.encode(prompt), model.fingerprint()
        weighted = model.encode(long)
        assert ids[-1] == pad and text.context.shape == (1, 77, family.context_dim)
        plain = predictions(model, text)
        patch = pack("fmn.methods.resteer").run(
            model, [concept(pack)], settings(pack, steps=1, size=64, lr=0.05)
        )
        patched = predictions(type(model)(model.patched(patch, 1.0), model.clip), text)
        assert (patched - plain).abs().max() > 0.01
        torch.testing.assert_close(predictions(model, text), plain)
        del model

        model = pack("fmn.hosts.diffusers.model").DiffusersModel.load(path)
        path.unlink()
        assert model.family is family and model.prediction == prediction
        assert model.tokenize(prompt) == ids and model.fingerprint() == fingerprint
        same_text(model.encode(long), weighted)
        found = model.encode(prompt)
        same_text(found, text)
        given = model._conditions([long, prompt])  # what the pipeline draws from
        assert given["prompt_embeds"].shape == (2, 154, family.context_dim)
        torch.testing.assert_close(given["prompt_embeds"][1, 77:], found.context[0])
        assert len(given) == 2 + 2 * len(found.vectors)
        assert given["negative_prompt_embeds"].any() == (family.key != "sdxl")
        torch.testing.assert_close(predictions(model, found), plain, rtol=1e-4, atol=2e-4)
        theirs = predictions(model.add_patches([(patch, 1.0)]), found)
        torch.testing.assert_close(theirs, patched, rtol=1e-3, atol=2e-3)
