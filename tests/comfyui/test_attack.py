"""Words learned from pictures, as ComfyUI and diffusers use them; attacks on a patched model."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from .parts import concept, leftovers, same_bits, settings, state
from .server import LATE, Interrupted, PromptError, texts
from .workflows import demo_loader, drawing, node, training

QUICK = {
    "tokens": 2, "steps": 3, "lr": 0.01, "batch": 2, "start": "", "templates": "a photo of {}",
    "training_seed": 0,
}  # fmt: skip


@pytest.fixture
def attack(pack, monkeypatch):
    """The nodes in this process, which has no page to show text on; they draw in few steps."""
    module = pack("nodes.attack")
    monkeypatch.setattr(pack("nodes.progress"), "show_text", lambda line: None)
    sampling = pack("fmn.models.sampling").Sampling(steps=4)
    monkeypatch.setattr(module, "Sampling", lambda: sampling)
    return SimpleNamespace(
        TextualInversion=pack("nodes.textual_inversion").TextualInversion,
        ConceptInversionProbe=module.ConceptInversionProbe,
        HardestEmbedding=module.HardestEmbedding,
    )


@pytest.fixture
def images():
    return torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0))


def invert(attack, host, images, name, **more):
    with torch.inference_mode():
        return attack.TextualInversion.execute(
            model=host.patcher, clip=host.clip, vae=host.vae, images=images, name=name,
            **QUICK | more,
        )  # fmt: skip


def folder():
    import folder_paths

    return Path(folder_paths.get_folder_paths("embeddings")[0])


def test_comfyui_and_diffusers_read_the_file(pack, attack, comfy_model, images):
    """The saved token in a prompt is the learned vectors in a prompt, in both programs."""
    token, learned = invert(attack, comfy_model, images, "dogs/both").result
    assert token == "embedding:dogs/both" and learned.vectors.shape == (2, 128)
    prompt = "a photo of {}, twemoji"
    with comfy_model.borrow_text_encoder() as text, torch.no_grad():
        wanted = text.encode(prompt.format("<*>"), learned.vectors)[0].context
        plain = text.encode(prompt.format(""))[0].context
    with torch.inference_mode():
        tokens = comfy_model.clip.tokenize(prompt.format(token))
        ours = comfy_model.clip.encode_from_tokens(tokens).clone()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    assert (ours - plain).abs().max() > 0.1

    path = folder() / "dogs" / "both.safetensors"
    pipeline = pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo").pipeline
    pipeline.load_textual_inversion(str(path), token="<both>")
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompt.format("<both>"), "cpu", 1, False)[0]
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-5)

    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("emb_params"), learned.vectors)
        metadata = {key: value for key, value in file.metadata().items() if "fmn." in key}
    info = {key.removeprefix("fmn."): json.loads(value) for key, value in metadata.items()}
    assert info["base.fingerprint"] == comfy_model.fingerprint()
    assert info["what"] == "dogs/both" and info["settings"]["steps"] == 3


def test_everything_is_left_as_it_was(pack, attack, comfy_model, images, monkeypatch):
    """After success, and after Cancel in a step; with a patch on the model too."""
    unet, text = comfy_model.patcher, comfy_model.clip.patcher
    before = state(unet), state(text)
    patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack))
    invert(attack, comfy_model, images, "kept")

    def stop(line):
        if "step 2" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(pack("nodes.progress"), "show_text", stop)
    with pytest.raises(KeyboardInterrupt):
        invert(attack, comfy_model, images, "never")
    probe = dict(
        model=unet, clip=comfy_model.clip, vae=comfy_model.vae, images=images, words="dog",
        pictures=1, save_as="", patch=patch, **QUICK,
    )  # fmt: skip
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        attack.ConceptInversionProbe.execute(**probe)
    with comfy_model.borrow_denoiser():
        after = state(unet), state(text)
    assert same_bits(before[0], after[0]) and same_bits(before[1], after[1])
    assert leftovers(unet.model) == [] and leftovers(text.model) == []
    assert not list(folder().glob("never*"))


def test_the_probe_learns_on_the_patched_model(pack, attack, comfy_model, images):
    """Worn here or merged by ComfyUI: the same tokens, other than the untouched model's."""
    patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack, lr=0.05))
    merged = comfy_model.patched(patch, 1.0)

    def probe(model, **more):
        with torch.inference_mode():
            learned, named, token, embedding = attack.ConceptInversionProbe.execute(
                model=model, clip=comfy_model.clip, vae=comfy_model.vae, images=images,
                words="dog", pictures=1, save_as="", **QUICK | more,
            ).result  # fmt: skip
        assert learned.shape == named.shape == (1, 128, 128, 3) and token == ""
        assert not torch.equal(learned, named) and embedding.info["what"] == "dog"
        return embedding.vectors, named

    worn, baked = probe(comfy_model.patcher, patch=patch), probe(merged)
    bare = probe(comfy_model.patcher, patch=patch, strength=0.0)
    torch.testing.assert_close(worn[0], baked[0], rtol=0, atol=2e-3)
    assert (worn[0] - bare[0]).abs().max() > 0.01
    assert (worn[1] - bare[1]).abs().mean() > 0.02


def test_hardest_conditioning(pack, attack, comfy_model, monkeypatch):
    """Our function's contexts; XL's pooled text is the prompt's own."""
    patch = pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack, lr=0.05))
    Text, prompt = (
        pack("fmn.models.interface").Text,
        pack("fmn.concepts.concept").Prompt("a dog", "a dog"),
    )
    given = dict(
        model=comfy_model.patcher, clip=comfy_model.clip, patch=patch, prompt="a dog",
        strength=0.5, r=0.01,
    )  # fmt: skip
    with torch.inference_mode():
        ((context, options),), told = attack.HardestEmbedding.execute(**given).result
    plain = comfy_model.encode(prompt).context
    with comfy_model.borrow_denoiser() as denoiser:
        found = pack("fmn.closed_form.adversarial_embedding").hardest(
            denoiser, comfy_model.family, [(patch, 0.5)], plain, 0.01
        )
    torch.testing.assert_close(context, found.contexts.float())
    assert context.shape == (1, 77, 128) and options == {}
    assert found.after < 0.8 * found.before and f"within {found.after:.2%}" in told

    pooled = torch.ones(1, 5)
    with_pooled = Text(plain, {"pooled": pooled})
    monkeypatch.setattr(type(comfy_model), "encode", lambda self, prompt: with_pooled)
    with torch.inference_mode():
        ((again, options),), _ = attack.HardestEmbedding.execute(**given).result
    assert torch.equal(again, context) and options["pooled_output"] is pooled


def test_what_cannot_be_learned_is_refused(pack, attack, comfy_model, images, monkeypatch):
    ForgetError = pack("fmn.errors").ForgetError
    with pytest.raises(ForgetError, match="no pictures to invert"):
        invert(attack, comfy_model, images[:0], "never")
    with pytest.raises(ForgetError, match="0 placeholders"):
        invert(attack, comfy_model, images, "never", templates="a {red|blue} dog")
    invert(attack, comfy_model, images, "braces", templates="a {red|blue} {}", steps=1)
    xl = pack("fmn.models.families").SDXL
    monkeypatch.setattr(pack("fmn.hosts.comfyui.model"), "known_family", lambda patcher: xl)
    with pytest.raises(ForgetError, match="Stable Diffusion XL has two text encoders"):
        invert(attack, comfy_model, images, "never")
    assert not list(folder().glob("never*"))


def learning(name, **more):
    """Two grey pictures are enough: what is learned does not matter here."""
    return {
        "given": node("EmptyImage", width=128, height=128, batch_size=2, color=255),
        "learn": node(
            "FMN_TextualInversion", model=["demo", 0], clip=["demo", 1], vae=["demo", 2],
            images=["given", 0], name=name, **QUICK | more,
        ),
    }  # fmt: skip


def saved(server):
    return {path.name for path in (server.base / "models" / "embeddings").rglob("*.*")}


def test_learn_and_use_in_a_prompt(server):
    prompt_id = server.queue(demo_loader() | learning("white"))
    messages = list(server.events(prompt_id))
    steps = [data for kind, data in messages if kind == "progress" and data["node"] == "learn"]
    assert [data["value"] for data in steps] == [1, 2, 3] and steps[0]["max"] == 3
    binary = [data for kind, data in messages if kind == "binary"]
    line = next(text for text in texts(messages) if "white: step 3/3, loss" in text)
    assert "s left" in line
    assert any(b"\xff\xd8\xff" in data for data in binary if data[:4] != b"\x00\x00\x00\x03")
    outputs = server.history(prompt_id)["outputs"]
    assert outputs["learn"]["text"] == ["embedding:white"]
    assert "white" in server.get("/embeddings") and "white.safetensors" in saved(server)

    drawn = demo_loader() | drawing(text="a photo of embedding:white", name="typed")
    drawn |= drawing(text="a photo of", name="plain")
    outputs = server.run(drawn)
    typed, plain = server.image(outputs["typed"]), server.image(outputs["plain"])
    assert np.abs(typed - plain).mean() > 0.02
    assert "embedding:white does not exist" not in server.log_text()


def test_the_token_output_is_a_prompt(server):
    linked = demo_loader() | learning("linked") | drawing(name="linked")
    linked["linked_pos"]["inputs"]["text"] = ["learn", 0]
    first = server.image(server.run(linked)["linked"])
    typed = server.run(demo_loader() | drawing(text="embedding:linked", name="typed"))
    assert np.array_equal(first, server.image(typed["typed"]))


def test_an_existing_embedding_is_never_overwritten(server):
    server.run(demo_loader() | learning("sub/once"))
    path = server.base / "models" / "embeddings" / "sub" / "once.safetensors"
    before = path.read_bytes()
    for name in ("sub/once", "once"):
        with pytest.raises(PromptError, match="means the embedding 'sub/once.safetensors'"):
            server.run(demo_loader() | learning(name, training_seed=1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../b", "two words", "", "a/"])
def test_names_that_cannot_be_are_refused_in_one_sentence(server, name):
    before = saved(server)
    with pytest.raises(PromptError, match="cannot name an embedding: use letters"):
        server.run(demo_loader() | learning(name))
    assert saved(server) == before


def test_cancel_ends_within_a_step_and_leaves_no_file(server):
    before = saved(server)
    prompt_id = server.queue(demo_loader() | learning("never", steps=5000))
    cancelled, after = False, 0
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            after += cancelled and kind == "progress"
            if kind == "progress" and data["node"] == "learn" and data["value"] == 3:
                server.post("/interrupt", {})
                cancelled = True
    assert after <= LATE and saved(server) == before


def test_attacks_on_a_patch(server):
    """The hardest embedding draws through the patch what the prompt drew before it."""
    prompt = demo_loader() | training(steps=30, training_seed=61)
    prompt["apply"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0
    )
    prompt |= drawing(name="before") | drawing(["apply", 0], name="after")
    prompt |= drawing(["apply", 0], name="attack")
    prompt["hardest"] = node(
        "FMN_HardestEmbedding", model=["demo", 0], clip=["demo", 1], patch=["train", 0],
        prompt="a photo of a dog", strength=1.0, r=0.001,
    )  # fmt: skip
    prompt["attack_sampler"]["inputs"]["positive"] = ["hardest", 0]
    prompt["told"] = node("PreviewAny", source=["hardest", 1])
    prompt["probe"] = node(
        "FMN_ConceptInversionProbe", model=["apply", 0], clip=["demo", 1], vae=["demo", 2],
        images=["before_decode", 0], words="dog", pictures=2, save_as="probed", **QUICK,
    )  # fmt: skip
    prompt["learned"] = node("PreviewImage", images=["probe", 0])
    prompt["named"] = node("PreviewImage", images=["probe", 1])
    prompt["token"] = node("PreviewAny", source=["probe", 2])
    outputs = server.run(prompt)
    before, after, attacked = (
        server.image(outputs[name]) for name in ("before", "after", "attack")
    )
    changed, back = np.abs(after - before).mean(), np.abs(attacked - before).mean()
    told = outputs["told"]["text"][0]
    print(f"{told} Pixels differ by {changed:.1%} from the untouched picture, then by {back:.1%}.")
    assert back < 0.7 * changed
    moved, left = map(float, re.findall(r"([\d.]+)%", told))
    assert left < 0.8 * moved
    assert outputs["token"]["text"] == ["embedding:probed"]
    assert "probed.safetensors" in saved(server)
    assert len(outputs["learned"]["images"]) == len(outputs["named"]["images"]) == 2
