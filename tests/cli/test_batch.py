"""``python -m fmn batch`` and ``merge``, in this process: a model is loaded in a second."""

import json

import pytest
from safetensors.torch import load_file

from fmn.cli.main import main
from fmn.hosts.diffusers.load import DEMO_FILE
from fmn.patches.patch import load_patch
from fmn.patches.weight_names import UNET_PREFIX

LIST = "name,kind,aliases,prompts\ndog,object,puppy,\ncat,object,,a bush\nink drawing,style,,\n"
UCE = "--model", "demo", "--method", "uce", "--keep-list", "none"
JOINT = "--how", "joint", "--model", "demo"


def run(capsys, *arguments, code=0):
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    (folder / "list.txt").write_text("dog | puppy\nstyle:ink drawing\n")
    assert main(["batch", str(folder / "list.txt"), *UCE, "--out", str(folder / "out")]) == 0
    return sorted((folder / "out").iterdir())


def test_a_list_with_a_failure_and_again_without(tmp_path, capsys):
    (tmp_path / "list.csv").write_text(LIST)
    command = "batch", tmp_path / "list.csv", *UCE, "--out", tmp_path / "out"
    result = run(capsys, *command, code=4)
    assert len(result["patches"]) == 2 and result["there"] == []
    assert [each["name"] for each in result["failed"]] == ["cat"]
    (tmp_path / "list.csv").write_text(LIST.replace("a bush", "a cat"))
    again = run(capsys, *command)
    assert len(again["patches"]) == 3 and again["there"] == result["patches"]
    other = run(capsys, *command, "--erase", 2)
    assert len(other["patches"]) == 3 and other["there"] == []
    assert {load_patch(path).info["settings"]["erase"] for path in other["patches"]} == {2.0}
    assert main([*map(str, command)]) == 0
    text = capsys.readouterr()
    assert "3 of 3 concepts have a patch, 3 of them from before" in text.out


def test_merge_files_and_patterns(patches, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dog, ink = patches
    out = tmp_path / "all.safetensors"
    result = run(capsys, "merge", f"{dog}:0.5", ink, "--out", out)
    assert result["bytes"] == out.stat().st_size and result["error"] == 0
    assert result["info"]["merged"] == [
        {"concepts": ["dog"], "method": "uce", "strength": 0.5},
        {"concepts": ["ink drawing"], "method": "uce", "strength": 1.0},
    ]
    name = next(iter(load_patch(out).changes))
    expected = 0.5 * load_patch(dog).change_of(name) + load_patch(ink).change_of(name)
    assert (load_patch(out).change_of(name) - expected).norm() < 2e-3 * expected.norm()
    dog.with_suffix(".fmn-train").write_text("no patch, and not taken for one")
    pattern = run(capsys, "merge", f"{dog.parent}/*:0.25", dog)
    assert [part["strength"] for part in pattern["info"]["merged"]] == [1.25, 0.25]
    small = run(capsys, "merge", *patches, "--budget-kb", 12)
    assert (pattern["patch"], small["patch"]) == ("merged.safetensors", "merged_2.safetensors")
    assert small["bytes"] <= 12_000 and small["error"] > 0
    assert main(["inspect", small["patch"]]) == 0
    text = capsys.readouterr().out
    assert "merged: dog (uce) at 1; ink drawing (uce) at 1" in text and "budget 12000" in text


def test_a_patch_named_twice_counts_twice_as_it_does_in_apply(patches, tmp_path, capsys):
    dog, twice, checkpoint = patches[0], tmp_path / "dog.safetensors", tmp_path / "new.safetensors"
    assert main(["merge", f"{dog}:0.5", f"{dog}:0.75", "--out", str(twice)]) == 0
    assert capsys.readouterr().out.startswith("1 patch merged (concatenate)")
    assert (
        main(["apply", "demo", f"{dog}:0.5", f"{dog}:0.75", "--checkpoint", str(checkpoint)]) == 0
    )
    before, after = load_file(DEMO_FILE), load_file(checkpoint)
    patch = load_patch(twice)
    for layer in patch.layers:
        key = f"{UNET_PREFIX}{layer.compvis}.weight"
        change, expected = patch.change_of(layer.name), after[key] - before[key]
        assert (change - expected).norm() < 2e-3 * expected.norm()


def test_merge_jointly(patches, tmp_path, capsys):
    out = tmp_path / "joint.safetensors"
    result = run(capsys, "merge", *patches, "--out", out, *JOINT, "--keep", "a cat")
    assert result["info"]["settings"]["how"] == "joint"
    assert result["info"]["loss"]["last"] < result["info"]["loss"]["first"]
    assert main(["apply", "demo", str(out), "--prompt", "a dog", "--steps", "1",
                 "--out", str(tmp_path / "x.png")]) == 0  # fmt: skip


BAD = {
    "no list": (["batch", "nothing.csv", "--model", "demo"], "cannot be read"),
    "no columns": (
        ["batch", "LIST", "--model", "demo"],
        "line 1: the first row has to name the columns",
    ),
    "no patch": (["merge", "nothing.safetensors"], "cannot be read"),
    "no match": (["merge", "nothing/*"], "No patch file matches 'nothing/*'"),
    "no size": (["merge", "x", "--budget-kb", "-1"], "--budget-kb is -1"),
    "preserve": (["merge", "PATCH", *JOINT, "--preserve", "-1"], "preserve is -1"),
    "too small": (["merge", "PATCH", "--budget-kb", "1"], "1 kB are too few"),
    "strength": (["merge", "PATCH:nan"], "is nan"),
    "zero": (["merge", "PATCH:0"], "nothing to merge"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case, patches, tmp_path, capsys):
    arguments, sentence = BAD[case]
    wrong = tmp_path / "list.csv"
    wrong.write_text("nmae\ndog\n")
    words = {"LIST": str(wrong), "PATCH": str(patches[0])}
    for word, path in words.items():
        arguments = [argument.replace(word, path) for argument in arguments]
    out = tmp_path / "out" / "x.safetensors"
    assert main([*arguments, "--out", str(out)]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
