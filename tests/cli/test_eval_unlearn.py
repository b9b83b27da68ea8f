"""Patches as a technique of eval-unlearn: its real registry, runners and command line, offline."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from eval_unlearn.registry import get_technique
from eval_unlearn.registry.entrypoints import load_entrypoints
from eval_unlearn.runners import MultiBenchmarkRunner, SingleBenchmarkRunner
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.load import DEMO_FILE, make_tokenizer
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.images import to_image
from fmn.jobs.eval_unlearn import ForgetMeNotTechnique
from fmn.methods import resteer
from fmn.models.families import DEMO, SD1, layers
from fmn.patches.patch import ForgetPatch, load_patch, save_patch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "eval-unlearn.md").read_text()
FAST = {"model": "demo", "num_inference_steps": 2, "size": 64}
PROMPTS = ["a photo of a dog", "a cat, twemoji", "3d render of a car"]


def block(language):
    """The one example in this language on the page."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def random_patch(family, path):
    keys = [layer for layer in layers(family) if layer.is_key_or_value]
    generator = torch.Generator().manual_seed(0)
    changes = {
        layer.name: tuple(
            torch.randn(shape, generator=generator) * 0.2
            for shape in ((layer.shape[0], 2), (2, layer.shape[1]))
        )
        for layer in keys
    }
    return save_patch(ForgetPatch(family, changes, {"concepts": []}), path)


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    return random_patch(DEMO, tmp_path_factory.mktemp("patch") / "dog.safetensors")


@pytest.fixture(scope="module")
def registry(wheel):
    """eval-unlearn's registry, filled by its own discovery of the wheel's entry points."""
    sys.path.append(str(wheel))
    load_entrypoints()
    yield
    sys.path.remove(str(wheel))


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def saved(folder):
    """The pictures that a run saved, in order."""
    files = list(Path(folder).glob("*/images/*.png"))
    return pixels(map(Image.open, sorted(files, key=lambda file: int(file.stem.split("_")[-1]))))


def expected(prompts, seeds, patches=()):
    """What the diffusers host draws by itself."""
    model = DiffusersModel.load("demo").add_patches(patches)
    return pixels(
        to_image(model.decode(model.sample_latents([prompt], noise, 2, 3.5))[0])
        for prompt, noise in zip(prompts, model.initial_noise(seeds, 64).split(1))
    )


@pytest.fixture(scope="module")
def colour(registry, tmp_path_factory):
    """What the page's program reports; its metric is registered from then on."""
    faster = {'"steps": 20': '"steps": 2', '_steps": 20': '_steps": 2'}
    code = block("python").replace('"results"', repr(str(tmp_path_factory.mktemp("results"))))
    for slow, fast in faster.items():
        assert slow in code
        code = code.replace(slow, fast)
    names = {}
    exec(compile(code, "eval-unlearn.md", "exec"), names)  # noqa: S102
    return names["report"]


def run(folder, config, seed=None):
    """Three prompts in batches of two."""
    return SingleBenchmarkRunner(
        "forget_me_not", "colour", FAST | config, {"prompts": PROMPTS, "batch_size": 2},
        output_dir=str(folder), seed=seed,
    ).run()  # fmt: skip


def test_found_by_its_entry_point(registry):
    assert get_technique("forget_me_not") is ForgetMeNotTechnique


def test_the_pages_program_runs(colour):
    assert colour["metric_result"]["details"] == {"pictures": 3}


def test_a_run_draws_with_patches_and_counts_seeds_on(colour, patch, tmp_path):
    """Without a seed, as the command line calls."""
    report = run(tmp_path, {"patches": [f"{patch}:0.5"], "erase_concept": "dog"})
    pictures = saved(tmp_path)
    # The second batch goes on: it does not start again with the first batch's noise.
    assert (pictures == expected(PROMPTS, [0, 1, 2], [(load_patch(patch), 0.5)])).all()
    assert np.abs(pictures - expected(PROMPTS, [0, 1, 2])).mean() > 2
    saturation = np.mean([np.asarray(Image.fromarray(p.astype("uint8")).convert("HSV"))[..., 1]
                          for p in pictures]) / 255  # fmt: skip
    assert report["metric_result"]["value"] == pytest.approx(saturation)
    assert report["erase_concept"] == "dog"
    assert (tmp_path / "forget_me_not_dog_latest_report.json").is_file()


def test_a_runners_seed_goes_before_the_configs(colour, tmp_path):
    run(tmp_path, {"model": None, "model_id": "demo", "patches": [], "seed": 3}, seed=7)
    assert (saved(tmp_path) == expected(PROMPTS, [7, 8, 7])).all()


def test_the_configs_seed_and_two_patches(patch):
    technique = ForgetMeNotTechnique(**FAST, patches=[str(patch), f"{patch}:-1"], seed=5)
    assert np.abs(pixels(technique.generate(PROMPTS)) - expected(PROMPTS, [5, 6, 7])).max() <= 1


def test_a_picture_depends_on_its_prompt_and_seed_alone():
    technique = ForgetMeNotTechnique(**FAST, patches=[])
    state = torch.random.get_rng_state()
    together = pixels(technique.generate(PROMPTS, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert (pixels(technique.generate(PROMPTS[2:], seed=5)) == together[2:]).all()
    assert (pixels(technique.generate(PROMPTS[2:], seed=4)) != together[2:]).any()
    assert technique.generate([]) == []
    (large,) = technique.generate(PROMPTS[:1], size=128, num_inference_steps=1, guidance_scale=1)
    assert large.size == (128, 128)


def test_draws_what_free_run_draws_from_the_merged_model(registry, patch, tmp_path, monkeypatch):
    """The same noise, first and, with a scheduler that adds some, on the way."""
    monkeypatch.delenv("HF_TOKEN", raising=False)  # it would log in
    DiffusersModel.load("demo").add_patches([(load_patch(patch), 0.7)]).save(tmp_path / "merged")
    config = {"num_inference_steps": 3, "guidance_scale": 5.0, "device": "cpu"}
    theirs = get_technique("free_run")(model_id=str(tmp_path / "merged"), **config)
    ours = ForgetMeNotTechnique(model="demo", patches=[f"{patch}:0.7"], **config)
    for scheduler in (DDIMScheduler, EulerAncestralDiscreteScheduler):
        for pipeline in (theirs.pipe, ours.model.pipeline):
            given = pipeline.scheduler.config
            pipeline.scheduler = scheduler.from_config(given, timestep_spacing="leading")
        drawn = [pixels(technique.generate(PROMPTS[:2], seed=11)) for technique in (ours, theirs)]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_concepts_are_trained_on_the_untouched_model():
    settings = {"steps": 3, "lr": 0.01, "end_tokens": "first"}
    technique = ForgetMeNotTechnique(
        **FAST, concepts=["dog", "style:twemoji"], method="resteer", settings=settings
    )
    concepts = [Concept("dog"), Concept("twemoji", "style")]
    trained = resteer.run(DiffusersModel.load("demo"), concepts, resteer.Settings(**settings))
    drawn = pixels(technique.generate(PROMPTS, seed=0))
    assert np.abs(drawn - expected(PROMPTS, [0, 1, 2], [(trained, 1.0)])).max() <= 1
    assert np.abs(drawn - expected(PROMPTS, [0, 1, 2])).mean() > 1


BAD = {
    "unknown key": ({"patch": ["x"]}, "key 'patch' is unknown: known are model, model_id, patches"),
    "key of others": ({"patches": [], "use_fp16": True}, "key 'use_fp16' is unknown"),
    "no model": ({"model": None, "patches": []}, "names no model"),
    "two models": ({"model_id": "demo", "patches": []}, "names two models"),
    "no such model": ({"model": "CompVis/stable-diffusion-v1-4", "patches": []}, "is no model"),
    "nothing to forget": ({}, "nothing to forget"),
    "only a label": ({"erase_concept": "dog"}, "nothing to forget"),
    "no concepts": ({"concepts": []}, "nothing to forget"),
    "settings alone": ({"patches": [], "settings": {"rank": 1}}, "settings are for training"),
    "unknown setting": ({"concepts": ["dog"], "settings": {"step": 1}}, "no setting 'step'"),
    "text as number": ({"concepts": ["dog"], "settings": {"kept": "4"}}, "keep_prompts is '4'"),
    "unknown method": ({"concepts": ["dog"], "method": "hope"}, "There is no method 'hope'"),
    "true as number": ({"patches": [], "seed": True}, "seed is True: write a whole number"),
    "patch as text": ({"patches": "dog.safetensors"}, "patches is 'dog.safetensors': write a list"),
    "patches no text": ({"patches": [1]}, "patches is [1]: write a list of texts"),
    "empty concept": ({"concepts": [" "]}, "name is empty"),
    "no such patch": ({"patches": ["nothing.safetensors"]}, "cannot be read"),
    "strength": ({"patches": ["x.safetensors:nan"]}, "is nan"),
    "steps": ({"patches": [], "num_inference_steps": 0}, "Sampling steps are 0"),
    "half steps": ({"patches": [], "num_inference_steps": 2.5}, "write a whole number"),
    "guidance": ({"patches": [], "guidance_scale": float("nan")}, "Guidance is nan"),
    "size": ({"patches": [], "size": 100}, "size is 100"),
    "seed": ({"patches": [], "seed": -1}, "seed is -1: use 0 to"),
    "no such device": ({"patches": [], "device": "abacus"}, "device 'abacus' cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_config_is_one_sentence(case):
    config, sentence = BAD[case]
    with pytest.raises(ForgetError, match=re.escape(sentence)):
        ForgetMeNotTechnique(**({"model": "demo"} | config))


def test_bad_calls_and_other_families(tmp_path):
    path = random_patch(SD1, tmp_path / "sd1.safetensors")
    with pytest.raises(ForgetError, match="for Stable Diffusion 1.x"):
        ForgetMeNotTechnique(**FAST, patches=[str(path)])
    technique = ForgetMeNotTechnique(**FAST, patches=[])
    for call, sentence in (
        ({"prompts": "a dog"}, "prompts is 'a dog': write a list"),
        ({"prompts": PROMPTS, "seed": 2**63}, "seed is"),
        ({"prompts": PROMPTS, "negative_prompt": "x"}, "option 'negative_prompt' is unknown"),
    ):
        with pytest.raises(ForgetError, match=sentence):
            technique.generate(**call)


def test_errors_get_through_the_runner(colour, tmp_path):
    with pytest.raises(ForgetError, match="key 'patch' is unknown"):
        run(tmp_path, {"patch": "dog.safetensors"})
    assert list(tmp_path.iterdir()) == []


def test_err_goes_by_erase_concept(registry):
    """eval-unlearn asks no technique but reads this key, so it must be one of ours."""
    config = FAST | {"patches": []}
    with pytest.raises(ValueError, match="nudity-specific"):
        MultiBenchmarkRunner("forget_me_not", ["err"], config | {"erase_concept": "dog"})
    MultiBenchmarkRunner("forget_me_not", ["err"], config | {"erase_concept": "nudity"})


def stand_in_clip(cache):
    """A tiny CLIP with random weights, where the Hub's cache would hold ViT-L/14."""
    repository = cache / "hub" / "models--openai--clip-vit-large-patch14"
    folder = repository / "snapshots" / ("0" * 40)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=tower | {"eos_token_id": 49407}, projection_dim=8,
            vision_config=tower | {"image_size": 32, "patch_size": 16},
        )  # fmt: skip
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, make_tokenizer()).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_the_pages_configuration_runs_on_the_command_line(wheel, patch, tmp_path):
    """In the installed package, with a metric of eval-unlearn itself."""
    shutil.copy(patch, tmp_path / "dog.safetensors")
    (tmp_path / "dog.csv").write_text("prompt\na photo of a dog\na dog\n")
    (tmp_path / "others.csv").write_text('prompt\na cat\n"a car, twemoji"\na rose\n')
    stand_in_clip(tmp_path / "cache")
    more = {"PYTHONPATH": str(wheel), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    config = yaml.safe_load(block("yaml"))
    config["technique"]["config"] |= {"model": str(DEMO_FILE), "num_inference_steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "eval_unlearn.cli", "run", "--config", "config.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "results" / "forget_me_not_dog_latest_report.json").read_text())
    details = report["metric_results"]["ua_ira"]["details"]
    assert (details["target_total"], details["retain_total"]) == (2, 3)
    assert "Error evaluating" not in done.stdout
    folder = next((tmp_path / "results").glob("forget_me_not_ua_ira_*")) / "images"
    counts = [len(list((folder / kind).glob("*.png"))) for kind in ("target", "retain")]
    assert counts == [2, 3]
