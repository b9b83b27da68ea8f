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
    find = pack("fmn.models.token_positions").flagged_positions
    positions = find(model.tokenize, prompt, "all")
    assert len(positions) == flagged and positions[:2] == [4, 5]


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


LONG = "a dog and " + "a very big cat, " * 20 + "a (red:1.3) bird"
SHORT_GROUPS = " ".join(f"(a red dog {i}:1.{i})" for i in range(1, 10)) + " and " + "cats " * 40
READ = [
    r"a photo of hatsune miku \(vocaloid\)", "a ((dog))", "a (dog:1.2) here", "(a:1)",
    "a (big (red:0.5) dog)", "a dog (", "a dog) (and a cat", "(a: dog:1.5)", "(:1.2) dog",
    "a (dog:x)", "a (dog:-1)", "a (b)(c:2)d", r"\\(x\)", "((a dog", "",
    LONG, SHORT_GROUPS, "dog " * 75, "dog " * 76,
]  # fmt: skip


@pytest.mark.parametrize("plain", [True, False])
def test_both_hosts_read_a_prompt_alike(pack, comfy_model, pipeline_model, plain):
    """The same ids, and encodings equal to float tolerance: escapes, weights, several chunks."""
    for text in READ:
        prompt = pack("fmn.concepts.concept").Prompt(text, text, plain)
        assert pipeline_model.tokenize(prompt) == comfy_model.tokenize(prompt), text
        ours, theirs = (model.encode(prompt).context for model in (pipeline_model, comfy_model))
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4, text


def test_pieces_and_weights_are_comfyuis(pack):
    from comfy import sd1_clip

    weighted = pack("fmn.concepts.prompt_syntax").weighted
    for text in READ[:-3]:
        parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        expected = [(sd1_clip.unescape_important(part), weight) for part, weight in parts]
        assert weighted(text) == (expected or [("", 1.0)]), text


def test_both_hosts_draw_a_long_weighted_prompt_alike(
    pack, comfy_model, pipeline_model, monkeypatch
):
    prompt = pack("fmn.concepts.concept").Prompt(LONG, "dog", plain=False)
    noise = pipeline_model.initial_noise([3, 4], 128)
    drawn = pipeline_model.sample_latents([prompt, "a cat"], noise, 10, 3.5)
    alone = pipeline_model.sample_latents(["a cat"], noise[1:], 10, 3.5)
    assert torch.allclose(drawn[1:], alone, atol=1e-3)
    host = importlib.import_module(type(comfy_model).__module__)
    monkeypatch.setattr(host.comfy.sample, "prepare_noise", lambda empty, seed: noise[:1])
    theirs = comfy_model.sample(prompt, [3], 128, 10, 3.5)
    assert (comfy_model.decode(theirs) - pipeline_model.decode(drawn[:1])).abs().max() < 5e-3


NAMES = {
    "escaped": (r"hatsune miku \(vocaloid\)", "hatsune miku (vocaloid)"),
    "composed": ("cafe\u0301", "caf\u00e9"),
    "zero width": ("van\u200b gogh\ufeff", "van gogh"),
    "spaces": ("van\u00a0 gogh ", "van gogh"),
    "punctuation": ("wham!", "wham!"),
}


@pytest.mark.parametrize("typed, meant", NAMES.values(), ids=NAMES)
def test_one_name_gives_one_patch_on_both_hosts(pack, comfy_model, pipeline_model, typed, meant):
    """Also with an own prompt of the same text, and as the same name without oddities."""
    uce = pack("fmn.methods.uce")
    made = [
        uce.run(model, [concept(pack, name, prompts=(f"{name}, at night",))], uce.Settings())
        for model in (comfy_model, pipeline_model)
        for name in (typed, meant)
    ]
    assert {patch.concepts[0] for patch in made} == {meant}
    for patch in made:
        for name, (up, down) in patch.changes.items():
            first = made[0].change_of(name, "cpu")
            assert (up @ down - first).norm() < 1e-3 * first.norm()


BAD = [
    "a dog BREAK a cat",
    "<lora:x:1> dog",
    "[dog:cat:0.5]",
    "{dog|cat}",
    "a (dog:nan)",
    "(" * 201,
]


@pytest.mark.parametrize("text", BAD)
def test_what_neither_host_reads_is_refused_by_both(pack, comfy_model, pipeline_model, text):
    error = pack("fmn.errors").ForgetError
    for model in (comfy_model, pipeline_model):
        with pytest.raises(error, match="The prompt '.*: ") as caught:
            model.encode(pack("fmn.concepts.concept").Prompt(text, "dog", plain=False))
        assert len(str(caught.value)) < 300
