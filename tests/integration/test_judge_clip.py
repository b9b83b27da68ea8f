"""The CLIP judge on a tiny CLIP of transformers' own classes, against transformers' processor."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from fmn.errors import ForgetError
from fmn.metrics.clip_judge import ClipJudge
from fmn.metrics.load import load_judge

LETTERS = "abcdefghijklmnopqrstuvwxyz,."
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
PHRASES = {
    "concept": {"dog": "a dog", "cat": "a cat", "car": "an old car"},
    "style": {"flat": "flat", "ink": "ink"},
}
TEMPLATES = {"concept": "a photo of {}", "style": "a picture, {}"}
SIDE = 24


def make_tokenizer(folder):
    """One token a letter, but for the pair "do"."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "do"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=20), len(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer, count = make_tokenizer(folder)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    layers |= {"num_attention_heads": 2}
    ends = {"bos_token_id": count - 2, "eos_token_id": count - 1, "pad_token_id": count - 1}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": count, "max_position_embeddings": 20},
        vision_config={**layers, "image_size": SIDE, "patch_size": 8},
        projection_dim=12,
        logit_scale_init_value=3.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def pictures(count, height=40, width=56):
    random = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 5, 7, generator=random)
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return (large.movedim(1, -1) * 255).round() / 255


def literal(folder, images, sentences):
    """transformers' own way: processor and model, logits and all; and both embeddings."""
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    )
    shown = [Image.fromarray((image * 255).round().byte().numpy()) for image in images]
    given = processor(text=sentences, images=shown, return_tensors="pt", padding=True)
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(**given)


def test_probabilities_are_transformers_own(folder):
    judge, images = load_judge(f"clip:{folder}", PHRASES, TEMPLATES), pictures(35)
    sentences = ["a photo of a dog", "a photo of a cat", "a photo of an old car"]
    expected = literal(folder, images, sentences)
    found = judge.probabilities(images, "concept")
    torch.testing.assert_close(found, expected.logits_per_image.softmax(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judge.features(images), expected.image_embeds, rtol=1e-4, atol=1e-6)
    assert found.std(1).min() > 1e-3, "the random model tells nothing apart: the test is empty"
    assert judge.labels == {"concept": ("dog", "cat", "car"), "style": ("flat", "ink")}


def test_templates_are_for_their_domain(folder):
    judge, images = ClipJudge(folder, PHRASES, {"style": "a picture, {}"}), pictures(2)
    for domain, sentences in (
        ("style", ["a picture, flat", "a picture, ink"]),
        ("concept", ["a dog", "a cat", "an old car"]),
    ):
        expected = literal(folder, images, sentences).logits_per_image.softmax(-1)
        found = judge.probabilities(images, domain)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_score_is_a_hundred_cosines_and_never_negative(folder):
    judge, images = ClipJudge(folder, PHRASES), pictures(12)
    prompts = [f"{word} of {word}" for word in ("dog", "ink", "car", "zoo", "egg", "ox")] * 2
    output = literal(folder, images, prompts)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    assert cosines.min() < 0 < cosines.max(), "the test needs both signs"
    found = judge.score(images, prompts)
    torch.testing.assert_close(found, 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_long_prompts_are_cut(folder):
    judge = ClipJudge(folder, PHRASES)
    scores = judge.score(pictures(1), ["a dog, " * 40])
    assert scores.shape == (1,) and scores.isfinite().all()


def test_works_in_inference_mode_and_needs_no_gradient(folder):
    with torch.inference_mode():
        judge = ClipJudge(folder, PHRASES)
        images = pictures(2)
    assert not judge.probabilities(images, "style").requires_grad
    assert not judge.score(images, ["a dog", "a cat"]).requires_grad


@pytest.mark.parametrize(
    "phrases, templates, says",
    [
        ({}, None, "there are none"),
        ({"concept": {}}, None, "there are none"),
        (PHRASES, {"mood": "{}"}, "template for 'mood', which has no phrases"),
        (PHRASES, {"style": "a picture"}, "needs {} once"),
        (PHRASES, {"style": "{} and {}"}, "needs {} once"),
    ],
)
def test_bad_phrases(folder, phrases, templates, says):
    with pytest.raises(ForgetError, match=says):
        ClipJudge(folder, phrases, templates)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", "proc"])
def test_files_missing(folder, tmp_path, missing):
    for file in folder.iterdir():
        gone = file.name == missing
        gone |= missing == "tokenizer.json" and file.name in ("vocab.json", "merges.txt")
        gone |= missing == "proc" and "processor" in file.name
        if not gone:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ForgetError, match="CLIP model in") as caught:
        ClipJudge(tmp_path, PHRASES)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_model_s_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ForgetError, match="cannot be loaded"):
        ClipJudge(tmp_path, PHRASES)


def test_broken_weights(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content, message in ((b"cut", "'model.safetensors' is damaged"), (LFS, "Git LFS pointer")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ForgetError, match=message):
            ClipJudge(tmp_path, PHRASES)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "preprocessor_config.json"])
def test_pointers_in_place_of_texts(folder, tmp_path, name):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(ForgetError, match=f"'{name}' is a Git LFS pointer"):
        ClipJudge(tmp_path, PHRASES)


def test_weights_missing_from_the_file(folder, tmp_path):
    """transformers fills them with random numbers and warns."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ForgetError, match="weights are missing, visual_projection.weight"):
        ClipJudge(tmp_path, PHRASES)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "clip.safetensors").write_bytes(b"")
    with pytest.raises(ForgetError, match="give clip: and the folder"):
        ClipJudge(tmp_path / "clip.safetensors", PHRASES)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompts_without_their_pictures(folder, count):
    with pytest.raises(ForgetError, match=f"2 pictures and {count} prompts"):
        ClipJudge(folder, PHRASES).score(pictures(2), ["a dog"] * count)


def test_unknown_domain(folder):
    with pytest.raises(ForgetError, match="cannot tell the domain 'mood'"):
        ClipJudge(folder, PHRASES).probabilities(pictures(1), "mood")
