"""What ComfyUI's host makes of prompts, names and pictures."""

import importlib

import pytest
import torch

from .parts import concept, settings


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


TOKENIZERS = {
    # family: (module and class of ComfyUI, how diffusers pads, positions flagged with all ends)
    "sd1": ("comfy.sd1_clip", "SD1Tokenizer", "<|endoftext|>", 73),
    "sd2": ("comfy.text_encoders.sd2_clip", "SD2Tokenizer", "!", 3),
    "sdxl": ("comfy.sdxl_clip", "SDXLTokenizer", "<|endoftext|>", 73),
}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_positions_with_the_real_tokenizers(pack, demo, family):
    """Both hosts see the same ids, and flag what the released rule flags on each family."""
    import comfy.sd

    module, name, pad, flagged = TOKENIZERS[family]
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer = getattr(importlib.import_module(module), name)()
    clip.tokenizer_options = {}
    model = pack("fmn.hosts.comfyui.model").ComfyModel(demo[0], clip)
    prompt = pack("fmn.concepts.concept").Prompt("a photo of elon musk", "elon musk")
    ids = model.tokenize(prompt)
    tokenizer = pack("fmn.hosts.diffusers.load").make_tokenizer(pad)
    assert ids == tokenizer(prompt.text, padding="max_length", max_length=77).input_ids
    subject = model.tokenize(prompt._replace(text="elon musk"))
    positions = pack("fmn.models.token_positions").flagged_positions(prompt, ids, subject, "all")
    assert len(positions) == flagged and positions[:2] == [4, 5]
