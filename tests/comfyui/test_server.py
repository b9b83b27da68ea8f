"""What users do, through a real ComfyUI server."""

import hashlib
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.methods import METHODS

from .server import LATE, Interrupted, PromptError, texts
from .workflows import demo_loader, drawing, node, saving, training

NODES = {
    "FMN_Concept", "FMN_MethodResteer", "FMN_TrainForgetPatch", "FMN_SaveForgetPatch",
    "FMN_LoadForgetPatch", "FMN_ApplyForgetPatch", "FMN_InspectForgetPatch",
    "FMN_LoadDemoCheckpoint", "FMN_AttentionMap", "FMN_CompareBeforeAfter", "FMN_MScore",
    "FMN_ConceptBench",
    "FMN_ConceptList", "FMN_KeepList", "FMN_TextualInversion", "FMN_ConceptInversionProbe",
    "FMN_HardestEmbedding", "FMN_SafeLatentDiffusion", "FMN_EraseByNegativePrompt",
    "FMN_ApplyGatedPatch", "FMN_TrainForgetPatches", "FMN_PatchList", "FMN_MergeForgetPatches",
    "FMN_TrainingOptions", "FMN_ImportEraser",
} | {
    f"FMN_Method{''.join(word.capitalize() for word in name.split('_'))}" for name in METHODS
}  # fmt: skip


def saved_patches(server):
    folder = server.base / "output" / "forget_patches"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_every_node_is_offered_with_a_tooltip_on_every_widget_and_a_help_page(server):
    info = server.get("/object_info")
    ours = {name: value for name, value in info.items() if name.startswith("FMN_")}
    assert set(ours) == NODES
    for name, value in ours.items():
        assert value["description"], name
        widgets = {**value["input"].get("required", {}), **value["input"].get("optional", {})}
        for label, (kind, *options) in widgets.items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                assert options and options[0].get("tooltip"), f"{name}.{label}"
        page = server.get(f"/extensions/forget-me-not/docs/{name}.md").decode()
        assert page.startswith("#"), name


def test_no_node_shows_more_than_eight_widgets(server):
    """The others are marked advanced, which pages that can hide them do."""
    info = server.get("/object_info")
    for name in NODES:
        inputs = info[name]["input"].get("required", {}) | info[name]["input"].get("optional", {})
        widgets = [options for kind, options in inputs.values() if "default" in options]
        shown = [options for options in widgets if not options.get("advanced")]
        assert len(shown) <= 8 and (shown or not widgets), name
    reread = info["FMN_MethodReread"]["input"]["optional"]
    assert sum(not options.get("advanced") for _, options in reread.values()) == 6  # with preset


def test_train_save_apply_and_stock_load_lora(server):
    """The picture changes, and in the same way through our node and through core's."""
    prompt = demo_loader() | training(steps=20) | saving("dog")
    applied = {
        "apply": node("FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0)
    }
    outputs = server.run(
        prompt | applied
        | drawing(name="before") | drawing(["apply", 0], name="after")
    )  # fmt: skip
    before, after = server.image(outputs["before"]), server.image(outputs["after"])
    assert np.abs(before - after).mean() > 0.02

    name = outputs["save"]["text"][0]
    loaded = {
        "load": node("FMN_LoadForgetPatch", file=name),
        "apply": node("FMN_ApplyForgetPatch", model=["demo", 0], patch=["load", 0], strength=1.0),
        "lora": node("LoraLoaderModelOnly", model=["demo", 0], lora_name=name, strength_model=1.0),
    }
    outputs = server.run(
        demo_loader() | loaded
        | drawing(["apply", 0], name="ours") | drawing(["lora", 0], name="stock")
    )  # fmt: skip
    ours, stock = server.image(outputs["ours"]), server.image(outputs["stock"])
    # Both come from the same file; ours folds alpha into the factors: at most one grey level.
    assert np.abs(ours - stock).max() <= 1.5 / 255
    # The file is float16, the patch in memory float32.
    assert np.abs(ours - after).max() <= 8 / 255
    assert "lora key not loaded" not in server.log_text()


def test_core_nodes_take_our_outputs(server):
    """LORA_MODEL and LOSS_MAP are core's own types."""
    core = {
        "lora": node(
            "LoraModelLoader",
            model=["demo", 0],
            lora=["train", 1],
            strength_model=1.0,
            bypass=False,  # newer versions ask for it
        ),  # fmt: skip
        "graph": node("LossGraphNode", loss=["train", 2], filename_prefix="loss"),
    }
    outputs = server.run(demo_loader() | training() | core | drawing(["lora", 0]))
    assert outputs["graph"]["images"] and outputs["image"]["images"]


def test_training_shows_progress_and_a_preview(server):
    # The seed makes the run new, or the server would answer from its cache.
    prompt_id = server.queue(demo_loader() | training(training_seed=5) | saving())
    messages = list(server.events(prompt_id))
    progress = [data for kind, data in messages if kind == "progress"]
    assert [data["value"] for data in progress] == [1, 2, 3, 4]
    assert all(data["max"] == 4 for data in progress)
    binary = [data for kind, data in messages if kind == "binary"]
    assert texts(messages) == []  # that is in the live view
    # Preview with metadata (4) or without (1): both end in a JPEG.
    assert any(b"\xff\xd8\xff" in data for data in binary)


def test_inspect_tells_what_a_patch_forgets(server):
    inspect = {"inspect": node("FMN_InspectForgetPatch", patch=["train", 0])}
    outputs = server.run(demo_loader() | training("santa claus", "identity") | inspect)
    text = outputs["inspect"]["text"][0]
    assert "santa claus (identity)" in text and "layers: 14, rank 4" in text


def test_several_concepts_and_patches(server):
    """Two concepts in one run, and two patches on one model, each with its strength."""
    prompt = demo_loader() | training()
    prompt["second"] = node(
        "FMN_Concept", name="cat", kind="object", aliases="kitten", prompts="a (cat:1.2), twemoji",
        concepts=["concept", 0],
    )  # fmt: skip
    prompt["train"]["inputs"]["concepts"] = ["second", 0]
    prompt["half"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=0.5
    )
    prompt["undone"] = node(
        "FMN_ApplyForgetPatch", model=["half", 0], patch=["train", 0], strength=-0.5
    )
    prompt["inspect"] = node("FMN_InspectForgetPatch", patch=["train", 0])
    outputs = server.run(
        prompt | drawing(name="plain") | drawing(["undone", 0], name="undone_image")
    )
    assert "dog (object); cat (object), also kitten" in outputs["inspect"]["text"][0]
    plain, undone = server.image(outputs["plain"]), server.image(outputs["undone_image"])
    assert np.abs(plain - undone).max() <= 1.5 / 255


def test_the_same_seed_gives_the_same_patch(server):
    names = []
    for aliases in ("", " "):  # no alias either way, but news to the server's cache
        prompt = demo_loader() | training(training_seed=11) | saving("again")
        prompt["concept"]["inputs"]["aliases"] = aliases
        names.append(server.run(prompt)["save"]["text"][0])
    assert names == ["again_00001.safetensors", "again_00002.safetensors"]
    first, second = (load_file(server.base / "output/forget_patches" / name) for name in names)
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def unrelated_picture(server, seed):
    """A picture that has nothing to do with training; never from the cache."""
    outputs = server.run(demo_loader() | drawing(text="a castle, twemoji", seed=seed))
    return hashlib.sha256(server.image(outputs["image"]).tobytes()).hexdigest()


def unseen_seed():
    return int.from_bytes(os.urandom(4), "little")


@pytest.fixture
def unchanged(server):
    """The same seed gives the same bytes before and after; a third prompt defeats the cache."""
    seed = unseen_seed()
    before = unrelated_picture(server, seed)
    yield
    server.run(demo_loader() | drawing(text="a dog", seed=unseen_seed()))
    assert unrelated_picture(server, seed) == before


def test_model_is_unchanged_after_success(server, unchanged):
    for layers, full in (("kv", False), ("unet", True)):
        server.run(
            demo_loader() | training(training_seed=21, layers=layers, full_weights=full) | saving()
        )


def test_model_is_unchanged_after_cancel(server, unchanged):
    """Cancel ends training within a step, and writes no file."""
    files = saved_patches(server)
    prompt_id = server.queue(
        demo_loader() | training(steps=5000, training_seed=22) | saving("never")
    )
    cancelled, after = False, 0
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            after += cancelled and kind == "progress"
            if kind == "progress" and data["value"] == 3:
                server.post("/interrupt", {})
                cancelled = True
    # test_borrowing.py counts exactly.
    assert after <= LATE
    assert saved_patches(server) == files


def test_model_is_unchanged_after_an_error_in_the_loop(server, unchanged):
    """A model that gives NaN: training stops at once and says what to change."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    huge = {f"{layer}.lora_down.weight": torch.full((1, 192), 1e25),
            f"{layer}.lora_up.weight": torch.full((192, 1), 1e25)}  # fmt: skip
    save_file(huge, server.base / "models" / "loras" / "huge.safetensors")
    prompt = demo_loader() | training(training_seed=23) | saving("never")
    prompt["broken"] = node(
        "LoraLoaderModelOnly", model=["demo", 0], lora_name="huge.safetensors", strength_model=1.0
    )
    prompt["train"]["inputs"]["model"] = ["broken", 0]
    with pytest.raises(PromptError, match="not finite at step 1 of 4 .*: lower the learning rate"):
        server.run(prompt)


BAD_CONCEPTS = {
    "empty": (dict(name=" "), "name is empty"),
    "not in the prompt": (dict(name="dog", prompts="a cat"), "does not contain the concept 'dog'"),
    "no tokens": (dict(name="<|endoftext|>"), "gives no tokens"),
    "custom without prompts": (dict(name="dog", kind="custom"), "no prompt template"),
    "unknown kind": (dict(name="dog", kind="animal"), "kind.*'animal'"),
}


@pytest.mark.parametrize("case", BAD_CONCEPTS)
def test_bad_concept_is_refused_in_one_sentence(server, case):
    inputs, message = BAD_CONCEPTS[case]
    prompt = demo_loader() | training() | saving("never")
    prompt["concept"]["inputs"] |= inputs
    with pytest.raises(PromptError, match=message):
        server.run(prompt)


BAD_SETTINGS = {
    "layers": (dict(layers="all"), "layers.*'all'"),
    "end tokens": (dict(end_tokens="some"), "end_tokens.*'some'"),
    "size": (dict(size=100), "size is 100"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting_is_refused_in_one_sentence(server, case):
    inputs, message = BAD_SETTINGS[case]
    with pytest.raises(PromptError, match=message):
        server.run(demo_loader() | training(**inputs) | saving("never"))


@pytest.mark.parametrize("prefix", ["dog [v2]", "what!", "a, b"])
def test_nothing_is_overwritten(server, prefix):
    names = [
        server.run(demo_loader() | training(training_seed=seed) | saving(prefix))["save"]["text"][0]
        for seed in (41, 42)
    ]
    assert names == [f"{prefix}_00001.safetensors", f"{prefix}_00002.safetensors"]


@pytest.mark.parametrize("name", ["../../escape", "/etc/escape", "a/../../escape"])
def test_saving_outside_the_folder_is_refused(server, name):
    with pytest.raises(PromptError, match="leads out of output/forget_patches"):
        server.run(demo_loader() | training() | saving(name))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "missing.safetensors", "/etc/passwd"])
def test_loading_outside_the_folders_is_refused(server, name):
    load = {
        "load": node("FMN_LoadForgetPatch", file=name),
        "inspect": node("FMN_InspectForgetPatch", patch=["load", 0]),
    }
    with pytest.raises(PromptError, match="There is no patch"):
        server.run(load)


def test_unwritable_folder_is_said_and_leaves_nothing(server):
    blocked = server.base / "output" / "forget_patches" / "blocked"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder should be")
    before = saved_patches(server)
    with pytest.raises(PromptError, match="could not be saved"):
        server.run(demo_loader() | training() | saving("blocked/dog"))
    assert saved_patches(server) == before


def test_damaged_file_is_said(server):
    path = server.base / "models" / "forget_patches" / "cut.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff" * 20)
    load = {
        "load": node("FMN_LoadForgetPatch", file="cut.safetensors"),
        "inspect": node("FMN_InspectForgetPatch", patch=["load", 0]),
    }
    with pytest.raises(PromptError, match="damaged or not a safetensors file"):
        server.run(load)
