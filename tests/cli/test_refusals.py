"""What cannot be done is said in one sentence before any work, and changes no file."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmn.cli.forget import read_images
from fmn.cli.main import main
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import PRESETS
from fmn.patches.patch import load_patch, save_patch

ROOT = Path(__file__).resolve().parents[2]
PATCH = str(ROOT / "demo" / "patches" / "santa_claus.safetensors")
FORGET = "forget", "demo", "dog"
APPLY = "apply", "demo", PATCH
DRAW = *APPLY, "--prompt", "a dog"
BATCH = "batch", "list.txt", "--model", "demo"
TRAIN = *FORGET, "--method", "resteer"
# What is refused: a command line, and key words of the sentence, in order.
REFUSED = {
    # Endings and places of what is written
    "forget ckpt": ([*FORGET, "--out", "d.ckpt"], "'d.ckpt'.*.safetensors"),
    "forget bare": ([*FORGET, "--out", "d"], "name it d.safetensors"),
    "merge ckpt": (["merge", PATCH, "--out", "d.ckpt"], "end in .safetensors"),
    "checkpoint ckpt": ([*APPLY, "--checkpoint", "d.ckpt"], "end in .safetensors"),
    "checkpoint bare": ([*APPLY, "--checkpoint", "d"], "end in .safetensors"),
    "folder as file": (
        ["apply", "folder", PATCH, "--checkpoint", "d.safetensors"], "name a folder",
    ),
    "picture gif": ([*DRAW, "--out", "d.gif"], "'d.gif'.*.png"),
    "forget folder": ([*FORGET, "--out", "folder"], "'folder' is a folder"),
    "merge folder": (["merge", PATCH, "--out", "folder"], "'folder' is a folder"),
    "checkpoint folder": ([*APPLY, "--checkpoint", "folder"], "'folder' is a folder"),
    "picture folder": ([*DRAW, "--out", "folder"], "'folder' is a folder"),
    "batch file": ([*BATCH, "--out", "there.png"], "'there.png' is a file"),
    "demo file": (["demo", "--out", "there.png"], "'there.png' is a file"),
    "below a file": ([*FORGET, "--out", "there.png/d.safetensors"], "could not be saved"),
    "long": ([*FORGET, "--out", f"{'d' * 250}.safetensors"], "could not be saved"),
    "zero byte": ([*FORGET, "--out", "d\0.safetensors"], "cannot be used on every system"),
    "forget proc": ([*FORGET, "--out", "/proc/x.safetensors"], "could not be saved.*/proc"),
    "merge proc": (["merge", PATCH, "--out", "/proc/x.safetensors"], "could not be saved"),
    "checkpoint proc": ([*APPLY, "--checkpoint", "/proc/a/x.safetensors"], "could not be saved"),
    "picture proc": ([*DRAW, "--out", "/proc/x.png"], "could not be saved"),
    "batch proc": ([*BATCH, "--out", "/proc/a"], "could not be saved.*/proc/a"),
    "demo proc": (["demo", "--out", "/proc"], "could not be saved"),
    "forget over": ([*FORGET, "--out", "there.safetensors"], "'there.safetensors' exists"),
    "merge over": (["merge", PATCH, "--out", "there.safetensors"], "exists"),
    "checkpoint over": ([*APPLY, "--checkpoint", "there.safetensors"], "exists"),
    "picture over": ([*DRAW, "--out", "there.png"], "exists"),
    "steps over": ([*TRAIN, "--save-every", "2", "--out", "half.safetensors"],
                   "'half_step2.safetensors'.*earlier training.*--resume"),
    # Numbers
    "steps": ([*DRAW, "--steps", "-3"], "steps is -3.*1 to 1000"),
    "no steps": ([*DRAW, "--steps", "0"], "steps is 0"),
    "guidance": ([*DRAW, "--guidance", "nan"], "guidance is nan.*0 to 100"),
    "size": ([*DRAW, "--size", "-8"], "size is -8.*0 to 4096"),
    "large": ([*DRAW, "--size", "5000000"], "size is 5000000"),
    "odd size": ([*DRAW, "--size", "100"], "size is 100.*multiple of 64"),
    "seed": ([*DRAW, "--seed", "12345678901234567890123"], "seed.*0 to 9.00"),
    "no number": ([*DRAW, "--steps", "many"], "'many'.*python -m fmn apply --help"),
    "strength": (["merge", f"{PATCH}:1e30"], "1e30.*-100 to 100"),
    "preserve": (["merge", PATCH, "--how", "joint", "--model", "demo", "--preserve", "nan"],
                 "--preserve is nan.*0 to 1000"),
    "save every": ([*FORGET, "--save-every", "-1"], "--save-every is -1"),
    # Kinds, methods and options that do not fit
    "kind": (["forget", "demo", "person:elon musk"], "'person'.*kind.*identity"),
    "no model": (["batch", "list.txt"], "required: --model.*python -m fmn batch --help"),
    "joint without": (["merge", PATCH, "--how", "joint"], "--how joint.*--model"),
    "vae of merge": (["merge", PATCH, "--vae", "v.safetensors"], "--vae is for --how joint"),
    "vae not drawn": (
        [*APPLY, "--checkpoint", "d.safetensors", "--vae", "v.safetensors"], "--vae.*--checkpoint",
    ),
    "prediction": ([*FORGET, "--prediction", "flow"], "'flow'.*epsilon.*v_prediction"),
    "for joint": (["merge", PATCH, "--model", "demo"], "--model is for --how joint"),
    "setting": ([*FORGET, "--steps", "10"], "reread.*'steps'.*fmn forget --method reread --help"),
    "of another": ([*FORGET, "--method", "uce", "--stop-at=0.5"], "uce.*'stop-at'"),
    "misspelled": ([*TRAIN, "--stepz", "10"], "'stepz'.*did you mean --steps"),
    "shortened": ([*FORGET, "--meth", "uce"], "did you mean --method"),
    "of a batch": ([*BATCH, "--steps", "10"], "fmn batch --method reread --help"),
    "no option": ([*DRAW, "--step", "10"], "apply.*'step'.*did you mean --steps"),
    "too many": (["inspect", PATCH, "b"], "'b'.*too many"),
    "method": ([*FORGET, "--method", "ucee"], "no method 'ucee'.*did you mean uce"),
    "no method": ([*BATCH, "--method", "x"], "'x'.*python -m fmn methods"),
    "no save": ([*FORGET, "--save-every", "2"], "--save-every.*train.*reread.*--robust"),
    "no best": ([*FORGET, "--method", "uce", "--keep-best"], "--keep-best.*train.*uce"),
    "own pictures": ([*FORGET, "--method", "ablation", "--images", "folder"],
                     "ablation.*--images.*--references pictures"),
    "no keep": ([*FORGET, "--method", "casteer", "--keep", "cat"], "CASteer.*keep.*another method"),
    "keep nothing": ([*BATCH, "--method", "uce", "--preserve", "0", "--keep", "cat"],
                     "UCE.*keep.*raise preserve"),
    "not protected": ([*TRAIN, "--keep", "cat"], "keep.*turn protect on"),
    "no images": ([*FORGET, "--images", "folder"], "--images is for methods"),
    "no state": ([*TRAIN, "--resume", "there.safetensors"],
                 "'there.safetensors'.*there.fmn-train.*--save-every"),
    "not drawn": (
        [*APPLY, "--checkpoint", "d.safetensors", "--steps", "3"], "--steps.*--checkpoint",
    ),
    # The demo transformer
    "transformer merged": (
        ["apply", "demo-dit", PATCH, "--checkpoint", "d.safetensors"], "demo-dit.*--prompt",
    ),
    "transformer vae": (["forget", "demo-dit", "dog", "--vae", "v"], "leave out --vae"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files that are in the way, and no model to be had."""

    def load(*_, **__):
        raise AssertionError("work was begun")

    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder" / "a.png")
    (tmp_path / "list.txt").write_text("dog\n")
    for name in ("there.safetensors", "there.png", "half_step2.safetensors"):
        (tmp_path / name).write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusersModel, "load", load)
    monkeypatch.setattr("fmn.patches.checkpoint.checkpoint_family", load)
    return tmp_path


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_before_any_work(case, folder, capsys):
    arguments, words = REFUSED[case]
    before = files(folder)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
    assert files(folder) == before


TRAINING = "reread_text", "resteer", "esd", "ablation", "hirm"  # all presets of these methods


@pytest.mark.parametrize("option", [["--keep-best"], ["--save-every", "2"]])
def test_what_trains_takes_what_is_for_training(folder, option, capsys):
    """Also where 0 steps mean as many as were published."""
    for preset, name in PRESETS.items():
        arguments = [*FORGET, "--method", preset, "--out", "d.safetensors", *option]
        if name in TRAINING or preset == "reread-robust":
            with pytest.raises(AssertionError, match="work was begun"):
                main(arguments)
        else:
            assert main(arguments) == 2
            assert f"and {preset} only solves" in capsys.readouterr().err


def test_pictures_are_read_as_they_are_shown(tmp_path):
    """Of a phone held upright: red is above blue, which the file has beside each other."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    told = Image.Exif()
    told[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "phone.png", exif=told)
    (read,) = read_images(tmp_path)
    assert read[100, [100, 900], 0].tolist() == [1, 1] and read[100, [100, 900], 2].sum() == 0
    assert read[900, [100, 900], 2].tolist() == [1, 1] and read[900, [100, 900], 0].sum() == 0


def test_a_picture_that_is_too_large_is_one_sentence(folder, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert main([*TRAIN, "--images", "folder"]) == 2
    error = capsys.readouterr().err
    assert "a.png' cannot be read (Image size (64 pixels)" in error
    assert error.count("\n") == 1


def test_a_wrong_option_is_json_too(folder, capsys):
    assert main([*FORGET, "--json", "--steps", "10"]) == 2
    assert "no setting 'steps'" in json.loads(capsys.readouterr().out)["error"]


GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 GiB."
RAN_OUT = {
    "gpu": (torch.OutOfMemoryError(GPU), "GPU's memory ran out (tried to allocate 2.00 GiB): "),
    "driver": (RuntimeError("CUDA error: out of memory\nCUDA kernel"), "CUDA_VISIBLE_DEVICES=-1"),
    "cpu": (RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                         "allocate 80 bytes."), "Memory ran out (tried to allocate 80 bytes): "),
    "numpy": (MemoryError("Unable to allocate 7 PiB"), "Memory ran out: close other programs"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAN_OUT)
def test_too_little_memory_is_one_sentence(case, folder, monkeypatch, capsys):
    error, told = RAN_OUT[case]

    def load(*_, **__):
        raise error

    monkeypatch.setattr(DiffusersModel, "load", load)
    assert main([*FORGET, "--json"]) == 2
    told_by = capsys.readouterr()
    assert told in told_by.err and told_by.err.count("\n") == 1
    assert told in json.loads(told_by.out)["error"]


def test_a_fault_of_ours_is_no_lack_of_memory(folder, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(DiffusersModel, "load", load)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(FORGET)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_names_that_the_terminal_cannot_show(tmp_path, monkeypatch, words):
    patch = load_patch(PATCH)
    patch.info["concepts"][0]["name"] = "\u732b"
    save_patch(patch, tmp_path / "cat.safetensors")
    shown = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", shown[0])
    monkeypatch.setattr(sys, "stderr", shown[1])
    assert main(["inspect", str(tmp_path / "cat.safetensors"), *words]) == 0
    assert main(["inspect", "\u732b.safetensors", *words]) == 2
    out, error = (each.detach().getvalue().decode("cp1252") for each in shown if not each.flush())
    assert "forgets: ? (identity)" in out or json.loads(out.partition('\n{"error')[0])
    assert "'?.safetensors' cannot be read" in error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it")
def test_a_folder_that_may_not_be_written(folder, capsys):
    (folder / "folder").chmod(0o500)
    assert main([*FORGET, "--out", "folder/d.safetensors"]) == 2
    assert "could not be saved in folder (Permission denied)" in capsys.readouterr().err
