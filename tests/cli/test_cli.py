"""The command line: most of it in this process, where the libraries are loaded already."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fmn.cli.main import main
from fmn.hosts.diffusers.load import load_pipeline
from fmn.methods.resteer import Settings
from fmn.models.families import SD1, layers
from fmn.patches.patch import ForgetPatch, save_patch

ROOT = Path(__file__).resolve().parents[2]
RESTEER = "--method", "resteer"  # the default trains nothing


def fmn(*arguments, code=0, cwd=ROOT):
    """Run a command here; what it wrote, as of a process."""
    out, error = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with contextlib.chdir(cwd), streams[0], streams[1]:
        found = main([*map(str, arguments)])
    assert found == code, error.getvalue()[-2000:]
    return SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())


def process(*arguments, code=0):
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fmn", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=110,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    path = tmp_path_factory.mktemp("patches") / "dog.safetensors"
    done = process(
        "forget", "demo", "dog", *RESTEER, "--steps", 20, "--lr", 0.002, "--out", path, "--json"
    )
    result = json.loads(done.stdout)
    assert result["patch"] == str(path) and result["bytes"] == path.stat().st_size
    assert result["info"]["settings"]["lr"] == 0.002
    assert result["info"]["loss"]["steps"] == 20
    (outcome,) = result["outcome"]
    assert outcome["concept"] == "dog" and 0 < outcome["left"] < 1 and len(outcome["kept"]) == 3
    assert "attention" in done.stderr  # the progress bar
    return path


def test_inspect_tells_in_words_and_in_json(patch):
    words = fmn("inspect", patch).stdout
    assert "forgets: dog (object)" in words and "layers: 14, rank 4" in words
    data = json.loads(fmn("inspect", patch, "--json").stdout)
    assert data["family"] == "demo" and data["ranks"] == [4]
    assert data["info"]["concepts"] == [
        {"name": "dog", "kind": "object", "aliases": [], "prompts": []}
    ]


def test_apply_draws_pictures_that_differ_with_strength(patch, tmp_path):
    def draw(strength):
        out = tmp_path / f"{strength}.png"
        fmn("apply", "demo", f"{patch}:{strength}", "--prompt", "a photo of a dog",
            "--steps", 4, "--out", out)  # fmt: skip
        return np.asarray(Image.open(out)).astype(float)

    plain, full, cancelled = draw(0), draw(1), None
    out = tmp_path / "both.png"
    fmn("apply", "demo", f"{patch}:0.5", f"{patch}:-0.5", "--prompt", "a photo of a dog",
        "--steps", 4, "--out", out)  # fmt: skip
    cancelled = np.asarray(Image.open(out)).astype(float)
    assert plain.shape == (128, 128, 3)
    assert np.abs(plain - full).mean() > 2
    assert np.abs(plain - cancelled).max() <= 1


def test_apply_merges_into_a_checkpoint(patch, tmp_path):
    merged = tmp_path / "merged.safetensors"
    fmn("apply", "demo", patch, "--checkpoint", merged)
    before = load_file(ROOT / "demo" / "fmn-demo.safetensors")
    after = load_file(merged)
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed and all(".attn2.to_" in key for key in changed)
    # The merged file is a model like any other.
    fmn("apply", merged, f"{patch}:0", "--prompt", "a dog", "--steps", 2,
        "--out", tmp_path / "picture.png")  # fmt: skip


def test_diffusers_folder_in_and_out(patch, tmp_path):
    """A folder saved by diffusers is a model too, and comes out of ``apply`` as a folder."""
    source, target = tmp_path / "source", tmp_path / "target"
    load_pipeline("demo").save_pretrained(source)
    fmn("apply", source, patch, "--checkpoint", target)
    assert (target / "unet").is_dir()
    fmn("forget", target, "cat", *RESTEER, "--steps", 1, "--out", tmp_path / "cat.safetensors")
    fmn("apply", source, patch, "--checkpoint", target, code=2)  # exists already


def test_reference_pictures_and_several_concepts(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (150, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    fmn("forget", "demo", "dog", *RESTEER, "--images", folder, "--steps", 2, cwd=tmp_path)
    done = fmn(
        "forget", "demo", "dog", *RESTEER, "--steps", 2, "style:twemoji", "--json", cwd=tmp_path
    )
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["forget_dog.safetensors", "forget_dog_2.safetensors"]
    info = json.loads(done.stdout)["info"]
    assert [(c["name"], c["kind"]) for c in info["concepts"]] == [
        ("dog", "object"),
        ("twemoji", "style"),
    ]
    assert info["loss"]["steps"] == 4  # two for each


BAD = {
    "no such model": (["forget", "nothing.safetensors", "dog"], "There is no model"),
    "empty concept": (["forget", "demo", " "], "name is empty"),
    "prompt without it": (
        ["forget", "demo", "dog", *RESTEER, "--prompt", "a cat"],
        "does not contain",
    ),
    "custom without prompt": (["forget", "demo", "custom:dog"], "no prompt template"),
    "alias of two": (["forget", "demo", "dog", "cat", "--alias", "x"], "belong to one concept"),
    "no pictures": (["forget", "demo", "dog", *RESTEER, "--images", "/nowhere"], "no pictures"),
    "syntax": (["forget", "demo", "dog", "--prompt", "dog <lora:x:1>"], "of other programs"),
    "syntax to draw": (["apply", "demo", "x", "--prompt", "{dog|cat}"], "of other programs"),
    "weight of a name": (["forget", "demo", "(dog:1.2)"], "has prompt syntax"),
    "weight of a kept word": (["forget", "demo", "dog", "--keep", "a (cat:1.2)"], "prompt syntax"),
    "embedding": (
        ["forget", "demo", "dog", *RESTEER, "--prompt", "dog embedding:x"],
        "only ComfyUI reads",
    ),
    "several names": (["forget", "demo", "van gogh; picasso"], "several names"),
    "rank": (["forget", "demo", "dog", *RESTEER, "--rank", "0"], "rank is 0: use 1 to 128"),
    "steps": (["forget", "demo", "dog", *RESTEER, "--steps", "0"], "steps is 0"),
    "lr": (["forget", "demo", "dog", *RESTEER, "--lr", "5"], "lr is 5.0"),
    "size": (["forget", "demo", "dog", *RESTEER, "--size", "100"], "size is 100"),
    "nothing named": (["forget", "demo"], "nothing to forget"),
    "list that is none": (["forget", "demo", "--list", "nothing.txt"], "nothing.txt"),
    "anchor": (["forget", "demo", "dog -> dog"], "is to be forgotten"),
    "strength": (["apply", "demo", "x.safetensors:nan", "--prompt", "x"], "is nan"),
    "seed": (["forget", "demo", "dog", *RESTEER, "--seed", str(2**70)], "use 0 to"),
    "no such patch": (["inspect", "nothing.safetensors"], "cannot be read"),
    "no patch at all": (["inspect", "demo/fmn-demo.safetensors"], "is not a forget patch"),
    "model is a patch": (["apply", "LICENSE", "NOTICE", "--prompt", "x"], "not a safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, sentence = BAD[case]
    out = ["--out", str(tmp_path / "x.safetensors")] if arguments[0] == "forget" else []
    assert main([*arguments, *out]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_json_too():
    done = process("inspect", "nothing.safetensors", "--json", code=2)
    assert "cannot be read" in json.loads(done.stdout)["error"]


def test_patch_of_another_family_is_refused(tmp_path):
    layer = next(layer for layer in layers(SD1) if layer.is_key_or_value)
    changes = {layer.name: (torch.ones(320, 1), torch.ones(1, 768))}
    path = save_patch(ForgetPatch(SD1, changes, {"concepts": []}), tmp_path / "sd1.safetensors")
    merged = tmp_path / "merged.safetensors"
    for result in (["--prompt", "a dog", "--out", tmp_path / "x.png"], ["--checkpoint", merged]):
        done = fmn("apply", "demo", path, *result, code=2)
        assert "Stable Diffusion 1.x" in done.stderr and "demo model" in done.stderr
    assert not merged.exists()


def test_a_model_is_never_overwritten(patch, tmp_path):
    model = tmp_path / "model.safetensors"
    shutil.copy(ROOT / "demo" / "fmn-demo.safetensors", model)
    before = model.read_bytes()
    done = fmn("apply", model, patch, "--checkpoint", model, code=2)
    assert "exists already" in done.stderr and model.read_bytes() == before


def test_blown_up_training_exits_3(tmp_path):
    """A checkpoint whose numbers overflow: said, with exit code 3, and no file is left."""
    weights = load_file(ROOT / "demo" / "fmn-demo.safetensors")
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    weights[key] = torch.full_like(weights[key], torch.inf)
    save_file(weights, tmp_path / "broken.safetensors")
    out = tmp_path / "out" / "dog.safetensors"
    done = fmn("forget", tmp_path / "broken.safetensors", "dog", *RESTEER, "--out", out, code=3)
    assert "not finite at step 1" in done.stderr and "lower the learning rate" in done.stderr
    assert not out.parent.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child process")
def test_saved_on_the_way_and_resumed(patch, tmp_path):
    """To the last bit the patch of the run that was not interrupted."""
    training = "forget", "demo", "dog", *RESTEER, "--lr", 0.002
    part, resumed = tmp_path / "part.safetensors", tmp_path / "resumed.safetensors"
    fmn(*training, "--steps", 12, "--save-every", 5, "--out", part)
    step = tmp_path / "part_step12.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part.safetensors", "part_step10.safetensors", "part_step12.fmn-train",
        "part_step12.safetensors", "part_step5.safetensors",
    ]  # fmt: skip
    fmn(*training, "--steps", 20, "--resume", step, "--out", resumed)
    ours, expected = load_file(resumed), load_file(patch)
    assert ours.keys() == expected.keys()
    assert all(ours[key].equal(expected[key]) for key in expected)
    again = step.with_name("part.safetensors")  # of the same training: it goes on with this file
    before = again.read_bytes()
    fmn(*training, "--steps", 20, "--resume", step, "--out", again)
    assert again.read_bytes() != before and load_file(again).keys() == ours.keys()
    fmn(*training, "--steps", 20, "--resume", step, "--out", resumed, code=2)  # another's


def test_help_teaches():
    text = process("--help").stdout
    for word in ("forget", "apply", "inspect", "demo", "examples:", "exit codes"):
        assert word in text


def test_help_tells_the_true_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["forget", *RESTEER, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("steps", "lr", "rank", "layers", "end_tokens", "references", "samples", "batch",
                 "size", "seed"):  # fmt: skip
        option = text.split(f" --{name.replace('_', '-')} ")[-1].split(" --")[0]
        assert f"({getattr(Settings(), name)}" in option, name
    assert "(100; 1 to 100000)" in text


def test_the_main_job(tmp_path):
    """``fmn demo``: a patch, a grid, and a judge who no longer sees most of it."""
    result = json.loads(fmn("demo", "--out", tmp_path, "--json").stdout)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["forget_three.safetensors", "grid.png"]
    rows, kept = result["forgotten"], result["kept"]
    assert {row["kind"] for row in rows} == {"identity", "object", "style"}
    before, after = (sum(row[f"seen {when}"] for row in rows) for when in ("before", "after"))
    assert before >= 8 and after <= 2
    assert kept["right before"] >= 20 and kept["right after"] >= kept["right before"] - 5
    assert Image.open(tmp_path / "grid.png").width > 600
