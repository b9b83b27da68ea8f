"""Checkpoints and folders as people have them: named otherwise, in part, or with something more."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.hosts.diffusers import load
from fmn.hosts.diffusers.load import DEMO_FILE, make_tokenizer
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import uce
from fmn.models.families import DEMO, text_layers
from fmn.patches.checkpoint import merge_into_checkpoint
from fmn.patches.patch import ForgetPatch

DOG = Prompt("a photo of a dog", "dog")
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
LAYER = "middle_block.1.transformer_blocks.0.attn2."
MLP = "text_model.encoder.layers.1.mlp.fc1."


@pytest.fixture(scope="module")
def weights():
    return load_file(DEMO_FILE)


@pytest.fixture(scope="module")
def demo():
    return DiffusersModel.load("demo", "cpu")


@pytest.fixture(scope="module")
def saved(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "demo"
    demo.save(folder)
    shutil.rmtree(folder / "tokenizer")  # takes seconds to read
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "demo"))


@pytest.fixture(autouse=True)
def quick_tokenizer(demo, monkeypatch):
    """The same one for all, as it takes half a second to make."""
    monkeypatch.setattr(load, "make_tokenizer", lambda padding: demo.pipeline.tokenizer)


def file_of(tmp_path, weights, metadata=None):
    save_file(weights, tmp_path / "model.safetensors", metadata)
    return tmp_path / "model.safetensors"


def without(weights, *parts):
    return {k: w for k, w in weights.items() if not any(part in k for part in parts)}


def same(model, demo):
    same_text = torch.equal(model.encode(DOG).context, demo.encode(DOG).context)
    pairs = zip(model.unet.parameters(), demo.unet.parameters(), strict=True)
    return same_text and all(torch.equal(a, b) for a, b in pairs)


# What a file lacks or has too much -> what is said of it
MISSING = {
    "two of the text encoder, one of the U-Net": (
        [MLP, f"{LAYER}to_q.weight"], f"lacks 1 of the U-Net's .*{UNET}{LAYER}to_q.weight'",
    ),
    "two of the text encoder": ([MLP], f"lacks 2 of the text encoder's 52 .*'{TEXT}{MLP}weight'"),
    "a key": ([f"{LAYER}to_k.weight"], f"lacks 1 of the U-Net's .*'{UNET}{LAYER}to_k.weight'"),
    "a norm": ([f"{UNET}out.0.bias"], f"lacks 1 of the U-Net's .*'{UNET}out.0.bias'"),
    "one of the VAE": (["encoder.9.conv.4.bias"], "lacks 1 of the VAE's .*9.conv.4.bias'"),
    "its scale": (["vae_scale"], "lacks the VAE's weight 'vae_scale'"),
    "the text encoder": ([TEXT], "lacks the text encoder: use a whole checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_a_file_lacks_is_named(tmp_path, weights, what):
    parts, told = MISSING[what]
    path = file_of(tmp_path, without(weights, *parts))
    with pytest.raises(ForgetError, match=f"'model.safetensors' {told}") as caught:
        DiffusersModel.load(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", [f"{UNET}input_blocks.9.0.weight", f"{TEXT}{MLP}weight.more"])
def test_an_unknown_weight_of_the_model_is_refused(tmp_path, weights, key):
    path = file_of(tmp_path, weights | {key: torch.zeros(2)})
    with pytest.raises(ForgetError, match=f"holds weights that .* 1 such as '{key}'"):
        DiffusersModel.load(path)


def test_a_weight_of_another_shape_is_refused(tmp_path, weights):
    key = f"{UNET}{LAYER}to_q.weight"
    path = file_of(tmp_path, weights | {key: weights[key][:8].clone()})
    with pytest.raises(ForgetError, match=rf"'{key}' of shape \[8, 192\], and \[192, 192\]"):
        DiffusersModel.load(path)


def test_what_belongs_to_no_part_is_named_and_left_out(tmp_path, weights, demo, caplog):
    harmless = {"model_ema.decay": torch.zeros(1), f"{TEXT}logit_scale": torch.zeros(1)}
    harmless[f"{TEXT}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    path = file_of(tmp_path, weights | harmless | {"mine.weight": torch.zeros(1)})
    with caplog.at_level(logging.WARNING):
        assert same(DiffusersModel.load(path, "cpu"), demo)
    (message,) = [r.getMessage() for r in caplog.records if "belong" in r.getMessage()]
    assert "1 weights" in message and "'mine.weight'" in message


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("more", [False, True], ids=["missing", "unknown"])
def test_folders_are_as_strict(folder, part, more):
    if part == "vae" and more:
        return
    (path,) = folder.glob(f"{part}/*.safetensors")
    tensors = load_file(path)
    key = sorted(tensors)[3]
    save_file(tensors | {"more.weight": torch.zeros(1)} if more else without(tensors, key), path)
    name = "more.weight" if more else key
    with pytest.raises(ForgetError, match=f"demo' (holds|lacks) .*{name}'"):
        DiffusersModel.load(folder)


def ema(key):
    squashed = key.removeprefix(UNET).replace(".", "")
    return f"model_ema.diffusion_model{squashed}" if key.startswith(UNET) else key


# How trainers and merges name the same weights
NAMES = {
    "no text_model": lambda key: key.replace(f"{TEXT}text_model.", TEXT),
    "cond_stage_model.model": lambda key: key.replace(TEXT, "cond_stage_model.model."),
    "cond_stage_model": lambda key: key.replace(TEXT, "cond_stage_model."),
    "unet and text_encoder": lambda key: key.replace(UNET, "unet.").replace(TEXT, "text_encoder."),
    "diffusion_model": lambda key: key.replace(UNET, "diffusion_model."),
    "only EMA": ema,
}


@pytest.mark.parametrize("names", NAMES)
def test_other_names_of_the_same_weights(tmp_path, weights, demo, names):
    path = file_of(tmp_path, {NAMES[names](key): weight for key, weight in weights.items()})
    model = DiffusersModel.load(path, "cpu")
    assert same(model, demo) and model.fingerprint() == demo.fingerprint()


@pytest.mark.parametrize("names", NAMES)
def test_a_patch_of_both_parts_is_merged_under_other_names(tmp_path, weights, names):
    text = next(layer.name for layer in text_layers(DEMO))
    unet = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    patch = ForgetPatch(DEMO, {
        text: (torch.ones(128, 1), torch.ones(1, 128)),
        unet: (torch.ones(192, 1), torch.ones(1, 128)),
    })  # fmt: skip
    renamed = {NAMES[names](key): weight for key, weight in weights.items()}
    merge_into_checkpoint(file_of(tmp_path, renamed), [(patch, 0.5)], tmp_path / "a.safetensors")
    merged = load_file(tmp_path / "a.safetensors")
    changed = {key for key in renamed if not torch.equal(merged[key], renamed[key])}
    keys = f"{TEXT}{text.partition('.')[2]}.weight", f"{UNET}{LAYER}to_k.weight"
    assert changed == {NAMES[names](key) for key in keys}
    for key in changed:
        torch.testing.assert_close(merged[key], renamed[key] + 0.5)


def test_a_torch_file_is_read_as_well(tmp_path, weights, demo):
    torch.save({"state_dict": weights, "global_step": 3}, tmp_path / "model.ckpt")
    assert same(DiffusersModel.load(tmp_path / "model.ckpt", "cpu"), demo)


TOKENIZERS = {  # files and their texts
    "empty": {},
    "vocabulary alone": {"vocab.json": '{"dog": 0}'},
    "merges alone": {"merges.txt": "#version: 0.2\nd o\n"},
    "two words": {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\n"},
}


def write_tokenizer(folder, files):
    (folder / "tokenizer").mkdir()
    for name, text in files.items():
        (folder / "tokenizer" / name).write_text(text)


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_folder_without_a_whole_tokenizer_gets_clips(folder, demo, what):
    write_tokenizer(folder, TOKENIZERS[what])
    assert DiffusersModel.load(folder, "cpu").tokenize(DOG) == demo.tokenize(DOG)


def test_a_damaged_vocabulary_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1"
    write_tokenizer(folder, {"vocab.json": pointer, "merges.txt": ""})
    with pytest.raises(ForgetError, match="'vocab.json' is a Git LFS pointer"):
        DiffusersModel.load(folder)


def write(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize(
    "kind", ["", "Img2Img", "ControlNet", "LatentConsistencyModel", "AnimateDiff"]
)
def test_folders_of_other_pipelines_load_as_the_plain_one(folder, demo, kind):
    """Saved with parts that are not there, none of which forgetting needs."""
    name = kind if kind in ("LatentConsistencyModel", "AnimateDiff") else f"StableDiffusion{kind}"
    write(
        folder / "model_index.json", _class_name=f"{name}Pipeline",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        controlnet=["diffusers", "ControlNetModel"], motion_adapter=["diffusers", "MotionAdapter"],
    )  # fmt: skip
    model = DiffusersModel.load(folder, "cpu")
    assert same(model, demo) and type(model.saved).__name__ == "StableDiffusionPipeline"
    assert model.sample(DOG, [1], 64, 1, 3.5).shape == (1, 4, 8, 8)


def test_a_folder_needs_no_index(folder, demo):
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "scheduler")
    model = DiffusersModel.load(folder, "cpu")
    assert same(model, demo) and model.prediction == "epsilon"


NOT_WHOLE = {
    "one part": (lambda folder: folder / "unet", "unet' is one part of a diffusers folder"),
    "no U-Net": (lambda folder: shutil.rmtree(folder / "unet"), "no diffusers folder"),
    "no encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "lacks the text encoder"),
    "another encoder": (
        lambda folder: write(folder / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        "text encoder T5EncoderModel, and only CLIP's",
    ),
    "another U-Net": (
        lambda folder: write(folder / "unet/config.json", _class_name="UNetMotionModel"),
        "unet' is a UNetMotionModel, and only UNet2DConditionModel",
    ),
    "another scheduler": (
        lambda folder: write(folder / "scheduler/scheduler_config.json", _class_name="os"),
        "names the scheduler os, which diffusers does not have",
    ),
    "a transformer": (
        lambda folder: (folder / "unet").rename(folder / "transformer"), "is an unsupported model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_WHOLE)
def test_what_is_no_folder_of_a_model(folder, what):
    change, told = NOT_WHOLE[what]
    given = change(folder)
    with pytest.raises(ForgetError, match=told) as caught:
        DiffusersModel.load(given if what == "one part" else folder)
    assert len(str(caught.value)) < 300


# Metadata and more keys of a single file -> the prediction
PREDICTIONS = {
    "nothing": ({}, {}, "epsilon"),
    "modelspec": ({"modelspec.prediction_type": "v"}, {}, "v"),
    "in full": ({"modelspec.prediction_type": "v_prediction"}, {}, "v"),
    "ComfyUI": ({"modelspec.predict_key": "v"}, {}, "v"),
    "epsilon": ({"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
    "key": ({}, {"v_pred": torch.tensor([])}, "v"),
    "key before metadata": ({"modelspec.predict_key": "epsilon"}, {"v_pred": torch.zeros(1)}, "v"),
}


@pytest.mark.parametrize("told", PREDICTIONS)
def test_a_files_prediction(tmp_path, weights, told):
    metadata, more, prediction = PREDICTIONS[told]
    path = file_of(tmp_path, weights | more, metadata)
    assert DiffusersModel.load(path, "cpu").prediction == prediction


@pytest.mark.parametrize(("asked", "prediction"), [("v_prediction", "v"), ("epsilon", "epsilon")])
def test_the_prediction_that_is_asked_for(tmp_path, weights, folder, asked, prediction):
    path = file_of(tmp_path, weights | {"v_pred": torch.zeros(1)})
    assert DiffusersModel.load(path, "cpu", prediction=asked).prediction == prediction
    write(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert DiffusersModel.load(folder, "cpu").prediction == "v"
    assert DiffusersModel.load(folder, "cpu", prediction=asked).prediction == prediction


def test_a_model_without_vae_forgets_and_draws_nothing(tmp_path, weights, demo):
    model = DiffusersModel.load(file_of(tmp_path, without(weights, VAE)), "cpu")
    assert same(model, demo)
    patch = uce.run(model, [Concept("dog")], uce.Settings())
    assert patch.changes.keys() == uce.run(demo, [Concept("dog")], uce.Settings()).changes.keys()
    latents = model.sample(DOG, [1], 64, 1, 3.5)
    for draw in (
        lambda: model.decode(latents),
        lambda: model.encode_images(torch.rand(1, 8, 8, 3), 8),
    ):
        with pytest.raises(ForgetError, match="no VAE: give one with --vae"):
            draw()


def test_a_folder_without_vae_is_saved_as_it_is(folder, tmp_path):
    shutil.rmtree(folder / "vae")
    DiffusersModel.load(folder, "cpu").save(tmp_path / "again")
    assert not (tmp_path / "again" / "vae").exists()
    assert DiffusersModel.load(tmp_path / "again", "cpu").pipeline.vae is None


@pytest.mark.parametrize("source", ["checkpoint", "alone", "folder", "its folder"])
def test_the_vae_of_another_file(tmp_path, weights, saved, demo, source):
    path = file_of(tmp_path, without(weights, VAE))
    alone = {k.removeprefix(VAE): w for k, w in weights.items() if k.startswith(VAE)}
    save_file(alone, tmp_path / "vae.safetensors")
    vae = {"checkpoint": DEMO_FILE, "alone": tmp_path / "vae.safetensors", "folder": saved,
           "its folder": saved / "vae"}[source]  # fmt: skip
    latents = torch.randn(1, 4, 4, 4)
    drawn = DiffusersModel.load(path, "cpu", vae=vae).decode(latents)
    torch.testing.assert_close(drawn, demo.decode(latents))


def test_what_is_no_vae_is_named(tmp_path, weights):
    path = file_of(tmp_path, without(weights, VAE))
    with pytest.raises(ForgetError, match="model.safetensors' is a whole checkpoint, not a VAE"):
        DiffusersModel.load(path, vae=path)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ForgetError, match="lora.safetensors' is a LoRA, not a VAE"):
        DiffusersModel.load(path, vae=tmp_path / "lora.safetensors")


def test_a_folders_own_tokenizer_is_used(folder):
    make_tokenizer("!").save_pretrained(folder / "tokenizer")
    assert load._folder_tokenizer(folder / "tokenizer", "<|endoftext|>").pad_token_id == 0
