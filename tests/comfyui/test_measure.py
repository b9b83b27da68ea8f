"""Nodes that measure, and what they need of ComfyUI's text encoder and VAE."""

import re

import numpy as np
import pytest
import torch

from .parts import concept, gradient_flags, leftovers, same_bits, state
from .server import LATE, Interrupted, PromptError, texts
from .workflows import demo_loader, node, training

PROMPT = "a dog, noto emoji"


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


def text_patcher(model):
    return model.clip.patcher


def test_borrowed_text_is_the_encoded_prompt_in_both_hosts(pack, comfy_model, pipeline_model):
    Prompt, found = pack("fmn.concepts.concept").Prompt, []
    for model in (comfy_model, pipeline_model):
        with model.borrow_text_encoder() as text:
            encoded, pooled = text.encode(PROMPT)
            ids = text.ids_of([PROMPT] * 2)
            assert ids[0, 0].tolist() == model.tokenize(Prompt(PROMPT, "dog"))
            rows = text.encode_ids(ids).context
            short = text.encode_ids(ids[..., :20]).context
            assert text.width == 128 and text.vectors("dog house").shape == (2, 128)
        expected = model.encode(Prompt(PROMPT, "dog")).context
        assert encoded.context.shape == (1, 77, 128) and pooled.shape == (1, 128)
        torch.testing.assert_close(encoded.context, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(rows, expected.expand(2, -1, -1), rtol=0, atol=1e-5)
        torch.testing.assert_close(short, rows[:, :20], rtol=0, atol=1e-5)
        found.append((encoded.context, pooled))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_pooled_text_is_the_encoders(pack, comfy_model, pipeline_model):
    """Unprojected, at the first end of text after the final norm."""
    ids = pipeline_model.tokenize(pack("fmn.concepts.concept").Prompt(PROMPT, "dog"))
    with torch.no_grad():
        expected = pipeline_model.pipeline.text_encoder(torch.tensor([ids])).pooler_output
    with torch.inference_mode():
        tokens = comfy_model.clip.tokenize(PROMPT)
        _, theirs = comfy_model.clip.encode_from_tokens(tokens, return_pooled="unprojected")
    for model in (comfy_model, pipeline_model):
        with model.borrow_text_encoder() as text:
            pooled = text.encode(PROMPT)[1]
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(pooled, theirs.clone(), rtol=0, atol=1e-3)


def test_gradients_reach_the_vectors_in_both_hosts(comfy_model, pipeline_model):
    grads = []
    for model in (comfy_model, pipeline_model):
        with torch.inference_mode(), model.borrow_text_encoder() as text:
            vectors = text.vectors("dog robot").requires_grad_()
            named = text.encode("a photo of a dog robot, twemoji")
            placed = text.encode("a photo of a <*>, twemoji", vectors)
            (placed[0].context.square().sum() + placed[1].sum()).backward()
            torch.testing.assert_close(placed[0].context, named[0].context, rtol=0, atol=1e-6)
            grads.append(vectors.grad)
    assert grads[0].norm() > 1
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_text_encoder_comes_back_unchanged(pack, comfy_model, fails):
    patcher = text_patcher(comfy_model)
    before, flags = state(patcher), gradient_flags(patcher)
    assert any(parameter.is_inference() for parameter in patcher.model.parameters())
    try:
        with torch.inference_mode(), comfy_model.borrow_text_encoder() as text:
            vectors = text.vectors("dog").requires_grad_()
            text.encode("a <*>", vectors)[1].sum().backward()
            if fails:
                raise RuntimeError("a fault")
    except RuntimeError as error:
        assert fails and str(error) == "a fault"
    assert same_bits(before, state(patcher))
    assert leftovers(patcher.model) == [] and gradient_flags(patcher) == flags


def test_diffusers_text_encoder_comes_back_unchanged(pipeline_model):
    encoder = pipeline_model.pipeline.text_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(RuntimeError, match="a fault"), pipeline_model.borrow_text_encoder() as text:
        text.encode("a <*>", text.vectors("dog").requires_grad_())[1].sum().backward()
        raise RuntimeError("a fault")
    assert same_bits(before, encoder.state_dict())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert leftovers(encoder) == []


def test_prompts_that_cannot_be_learned_in_are_refused(pack, comfy_model, pipeline_model):
    ForgetError = pack("fmn.errors").ForgetError
    for model in (comfy_model, pipeline_model):
        with model.borrow_text_encoder() as text:
            with pytest.raises(ForgetError, match="has placeholder"):
                text.encode("a <*>")
            with pytest.raises(ForgetError, match="tokens"):
                text.encode("dog " * 90)
    without = type(comfy_model)(comfy_model.patcher)
    with pytest.raises(ForgetError, match="CLIP input is empty"), without.borrow_text_encoder():
        pass


def test_decoding_is_the_same_in_both_hosts(pack, comfy_model, pipeline_model):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = comfy_model.decode(latents), pipeline_model.decode(latents)
    assert ours.shape == (2, 128, 128, 3) and ours.std() > 0.1
    assert ours.min() >= 0 and ours.max() <= 1 and not ours.is_inference()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    with pytest.raises(pack("fmn.errors").ForgetError, match="VAE input is empty"):
        type(comfy_model)(comfy_model.patcher, comfy_model.clip).decode(latents)


def test_both_hosts_learn_the_same_words(pack, comfy_model, pipeline_model):
    inversion = pack("fmn.training.textual_inversion")
    images = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    settings, found = inversion.Settings(steps=3, batch=2), []
    for model in (comfy_model, pipeline_model):
        with torch.inference_mode(), model.borrow_denoiser() as denoiser:
            found.append(inversion.invert(model, denoiser, images, settings))
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-3)
    torch.testing.assert_close(found[0].start, found[1].start)
    torch.testing.assert_close(found[0].vectors, found[1].vectors, rtol=0, atol=2e-3)


def test_a_model_pushed_off_the_device_is_loaded_again(pack, comfy_model):
    """As the VAE does on a small GPU: the patch is back on, and gradients still flow."""
    patch = pack("fmn.methods.resteer").run(
        comfy_model,
        [concept(pack)],
        pack("fmn.methods.resteer").Settings(steps=3, references="zeros"),
    )
    host = type(comfy_model)(comfy_model.patched(patch, 1.0), comfy_model.clip)
    text = host.encode(pack("fmn.concepts.concept").Prompt(PROMPT, "dog"))
    x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.inference_mode(), host.borrow_denoiser() as denoiser:
        with torch.no_grad():
            before = denoiser.predict_noise(x_t, t, text)
        with torch.inference_mode():
            denoiser.patcher.detach()
        denoiser.model.device = torch.device("meta")
        text.context.requires_grad_()
        after = denoiser.predict_noise(x_t, t, text)
        after.sum().backward()
    assert torch.equal(before, after) and text.context.grad.abs().sum() > 0


def looking(name="map", model=("demo", 0), **inputs):
    given = {
        "concepts": ["concept", 0], "references": "zeros", "picture_seed": 0, "brightest": 0.0,
    } | inputs  # fmt: skip
    return {
        name: node(
            "FMN_AttentionMap", model=list(model), clip=["demo", 1], **given
        ),
        f"{name}_image": node("PreviewImage", images=[name, 0]),
        f"{name}_text": node("PreviewAny", source=[name, 1]),
    }  # fmt: skip


def scoring(model=("demo", 0), **inputs):
    given = {
        "templates": "", "inversions": 2, "steps": 3, "lr": 0.01, "tokens": 2, "batch": 2,
        "pictures": 2, "measuring_seed": 0, "concepts": ["concept", 0],
    } | inputs  # fmt: skip
    return {
        "score": node("FMN_MScore", model=list(model), clip=["demo", 1], vae=["demo", 2], **given),
        "score_image": node("PreviewImage", images=["score", 1]),
        "score_text": node("PreviewAny", source=["score", 0]),
    }


def applied():
    return {
        "apply": node("FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0)
    }


def share_of(text, name="dog"):
    return float(re.search(rf"^{name}: ([\d.]+)% of attention", text, re.MULTILINE).group(1))


def test_attention_map_shows_what_a_patch_took_away(server):
    """The same noise on both models, so the shares can be compared."""
    prompt = demo_loader() | training(steps=30, training_seed=51) | applied()
    outputs = server.run(prompt | looking("before") | looking("after", ("apply", 0)))
    before, after = (outputs[f"{name}_text"]["text"][0] for name in ("before", "after"))
    assert share_of(after) < 0.7 * share_of(before)
    assert "down 1" in before and "middle" in before and "up 0" in before
    pictures = [server.image(outputs[f"{name}_image"]) for name in ("before", "after")]
    # A label, then six maps: mean, down 1 and 2, middle, up 0 and 1.
    assert pictures[0].shape == (26 + 166, 250 + 6 * 166, 3)
    assert not np.array_equal(*pictures)


def test_attention_map_of_several_concepts_with_pictures(server):
    prompt = demo_loader() | training()
    prompt["second"] = node(
        "FMN_Concept", name="cat", kind="object", aliases="", prompts="", concepts=["concept", 0]
    )
    maps = looking(concepts=["second", 0], vae=["demo", 2], references="samples", brightest=20.0)
    outputs = server.run(prompt | maps)
    text = outputs["map_text"]["text"][0]
    assert share_of(text, "dog") > 0 and share_of(text, "cat") > 0
    assert server.image(outputs["map_image"]).shape == (26 + 2 * 166, 250 + 7 * 166, 3)


def test_m_score_before_and_after(server):
    prompt = demo_loader() | training(steps=5, training_seed=52) | applied()
    prompt["second"] = node(
        "FMN_Concept", name="cat", kind="object", aliases="", prompts="", concepts=["concept", 0]
    )
    prompt |= scoring(("apply", 0), untouched=["demo", 0], concepts=["second", 0])
    prompt_id = server.queue(prompt)
    messages = list(server.events(prompt_id))
    steps = [data for kind, data in messages if kind == "progress" and data["node"] == "score"]
    # Steps of all inversions, and pictures.
    assert [data["value"] for data in steps][-1] == steps[-1]["max"] == 2 * 2 * 2 * 3 + 2 * 2
    shown = "dog, this model, inversion 2/2: step 3/3, loss"
    assert any(shown in line and "s left" in line for line in texts(messages))
    outputs = server.history(prompt_id)["outputs"]
    text = outputs["score_text"]["text"][0]
    assert "M-Score of dog" in text and "M-Score of cat" in text and "difference" in text
    number = r"-?\d\.\d{3} ± \d\.\d{3}"
    assert len(re.findall(rf"untouched +{number}", text)) == 2
    assert len(re.findall(rf"this model +{number}", text)) == 2
    assert len(re.findall("name of 'dog'|name of 'cat'", text)) == 2
    assert server.image(outputs["score_image"]).shape == (34 + 2 * 64 + 24, 640, 3)


def test_m_score_of_one_model_on_given_pictures(server):
    prompt = demo_loader() | training()
    prompt["given"] = node("EmptyImage", width=160, height=128, batch_size=2, color=255)
    prompt["concept"]["inputs"]["images"] = ["given", 0]
    outputs = server.run(prompt | scoring(inversions=1, templates="{}, twemoji\n\n3d render of {}"))
    text = outputs["score_text"]["text"][0]
    assert "untouched" not in text and "no spread is known" in text


def test_m_score_ends_within_a_step_of_cancel(server):
    prompt_id = server.queue(demo_loader() | training() | scoring(steps=5000, measuring_seed=53))
    cancelled, after = False, 0
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            after += cancelled and kind == "progress"
            if kind == "progress" and data["node"] == "score" and data["value"] == 3:
                server.post("/interrupt", {})
                cancelled = True
    assert after <= LATE


BAD = {
    "no place": (dict(templates="a dog"), {}, "0 placeholders"),
    "custom": ({}, dict(kind="custom", prompts="a dog"), "write templates"),
    "no name": ({}, dict(name=" "), "name is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_scored_is_refused_in_one_sentence(server, case):
    inputs, words, message = BAD[case]
    prompt = demo_loader() | training() | scoring(**inputs)
    prompt["concept"]["inputs"] |= words
    with pytest.raises(PromptError, match=message):
        server.run(prompt)


def test_map_of_pictures_without_a_vae_is_refused(server):
    prompt = demo_loader() | training() | looking()
    prompt["given"] = node("EmptyImage", width=128, height=128, batch_size=1, color=255)
    prompt["concept"]["inputs"]["images"] = ["given", 0]
    with pytest.raises(PromptError, match="VAE input is empty"):
        server.run(prompt)


def test_measuring_leaves_every_weight_as_it_was(pack, comfy_model, monkeypatch):
    """In this process, with the nodes themselves; after success and after an error."""
    nodes = pack("nodes.measure")
    patch = pack("fmn.methods.resteer").run(
        comfy_model,
        [concept(pack)],
        pack("fmn.methods.resteer").Settings(steps=3, references="zeros"),
    )
    unet, text = comfy_model.patcher, text_patcher(comfy_model)
    before = state(unet), state(text)
    patched, stop = comfy_model.patched(patch, 1.0), []
    given = dict(
        model=patched, clip=comfy_model.clip, vae=comfy_model.vae, concepts=[concept(pack)],
        untouched=unet, templates="", inversions=1, pictures=1, measuring_seed=0, steps=2,
        lr=0.01, tokens=1, batch=1,
    )  # fmt: skip
    shown = []

    def show(line):
        shown.append(line)
        if stop and "step 1" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(nodes, "show_text", show)
    monkeypatch.setattr(pack("nodes.progress"), "show_text", show)
    with torch.inference_mode():
        (told,) = nodes.MScore.execute(**given).ui["node_text"]
        stop.append(True)
        with pytest.raises(KeyboardInterrupt):
            nodes.MScore.execute(**given)
        nodes.AttentionMap.execute(
            patched, comfy_model.clip, [concept(pack)], "samples", 0, 0.0, comfy_model.vae
        )
    assert shown and "difference" in told
    with comfy_model.borrow_denoiser():  # loads the model without the patch
        after = state(unet), state(text)
    assert same_bits(before[0], after[0]) and same_bits(before[1], after[1])
    assert leftovers(unet.model) == [] and leftovers(text.model) == []
