"""The bench on the demo model: its command, its resuming, its executors, and what it can tell."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from fmn.bench.reporting.columns import COLUMNS, Results
from fmn.bench.running.cells import Cell, Method, Setup, parse_method, plan
from fmn.bench.running.lab import Lab, make_lab, read_controls
from fmn.bench.running.runner import store_patches
from fmn.bench.running.store import Store
from fmn.bench.suite import parse_suite, read_suite
from fmn.cli import main
from fmn.cli.bench import covered
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.hosts.diffusers.open import open_model
from fmn.models.families import DEMO, layers
from fmn.patches.patch import ForgetPatch, load_patch, save_patch, to_bytes

ROOT = Path(__file__).resolve().parents[2]
COUNT, STEPS = 4, 6  # half the steps do for what is looked at


def noise_patch(size, sign=1.0):
    """A patch on keys and values that is only noise, ``size`` times as large as the weights."""
    generator, changes = torch.Generator().manual_seed(0), {}
    for layer in layers(DEMO):
        if layer.is_cross_attention:
            out, inputs = layer.shape
            up = torch.randn(out, 8, generator=generator) * size * sign
            down = torch.randn(8, inputs, generator=generator) * (8 * inputs) ** -0.5
            changes[layer.name] = up, down
    return ForgetPatch(DEMO, changes, {"concepts": []})


@pytest.fixture(scope="module")
def setup():
    fingerprint, suite = DiffusersModel.load("demo").fingerprint(), read_suite("demo")
    suite["sampling"] |= {"steps": STEPS}
    return Setup(suite=suite, model="demo", fingerprint=fingerprint, judge="demo",
                 check="demo:2", count=COUNT)  # fmt: skip


@pytest.fixture(scope="module")
def lab(setup) -> Lab:
    return make_lab(setup)


def pictures(lab, name, patches):
    cell = Cell("pictures", "m", {"strength": 1.0}, (name,))
    return lab.run(cell, [to_bytes(patch) for patch in patches])[0]


def scores(lab, name, result):
    """Key of a column -> its value, for pictures of one target."""
    results = Results([(lab.suite.find(name), {"pictures": result})])
    made = {column["key"]: compute(results) for column, compute in COLUMNS}
    return {key: value["value"] for key, value in made.items() if value is not None}


def test_a_worker_loads_the_model_as_given(setup, tmp_path):
    vae = DiffusersModel.load("demo").pipeline.vae
    weight = next(vae.parameters()).data.add_(1)
    vae.save_pretrained(tmp_path)
    model = make_lab(replace(setup, vae=str(tmp_path), prediction="v_prediction")).model
    assert model.prediction == "v"
    assert torch.equal(next(model.pipeline.vae.parameters()), weight)


@pytest.mark.parametrize("name", ["dog", "ink drawing"])
def test_a_model_that_forgot_nothing_scores_as_such(lab, name):
    result = pictures(lab, name, [])
    assert all(result["agreement"][domain] >= 0.85 for domain in ("concept", "style"))
    found = scores(lab, name, result)
    assert found["UA"] <= 0.12 and found["HM"] <= 0.3
    assert found["IRA"] >= 0.88 and found["CRA"] >= 0.88
    # The same picture drawn in another batch differs in the last bits.
    assert found["coherence"] >= 0.9 and found["distance"] < 1e-4


@pytest.mark.parametrize("name", ["dog", "ink drawing"])
def test_a_destroyed_model_keeps_nothing(lab, name):
    found = scores(lab, name, pictures(lab, name, [noise_patch(30.0)]))
    # A style is harder to be rid of: the judge has no label for none, and takes noise for one.
    assert found["UA"] >= (0.88 if name == "dog" else 0.5)
    assert found["IRA"] <= 0.25 and found["CRA"] <= 0.4 and found["HM"] <= 0.4
    assert found["coherence"] <= 0.5 and found["distance"] > 0.2


def test_a_patch_and_its_negation_cancel(setup, lab):
    few = Lab(replace(setup, count=1), lab.model, lab.judge)
    patch, negated = noise_patch(1.0), noise_patch(1.0, sign=-1.0)
    nothing, once, both = (
        scores(few, "dog", pictures(few, "dog", patches))
        for patches in ([], [patch], [patch, negated])
    )
    assert once["distance"] > 0.02
    # The sum of two float32 products is not exactly nothing; a level of 255 is 0.004.
    assert both["distance"] < 0.002
    assert both["UA"] == nothing["UA"]


def test_the_demo_transformer_is_measured_where_it_can_be(setup, lab, capsys):
    model = open_model("demo-dit")
    given = replace(setup, model="demo-dit", fingerprint=model.fingerprint(), count=2)
    few = Lab(given, model, lab.judge)
    cell = Cell("completion", "m", {"strength": 1.0}, ("dog",))
    steps = [row["steps"] for row in few.run(cell, [])[0]["rows"]]
    assert steps == [1, 1, 1, 1, 2, 2]
    rows = few.run(replace(cell, work="noise"), [])[0]["rows"]
    assert [len(row["cells"]) for row in rows] == [7, 7]
    assert bench("--model", "demo-dit", "--measure", "pictures", "relearn") == 2
    assert "relearn is for U-Nets" in capsys.readouterr().err
    assert bench("--model", "demo-dit", "--method", "rece") == 2
    assert "RECE works on" in capsys.readouterr().err


def bench(*arguments):
    small = "--count", "2", "--steps", "4", "--workers", "1", "--check", ""
    return main.main(["bench", *small, *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run through the command line, in a worker process."""
    folder = tmp_path_factory.mktemp("bench")
    method = "resteer:steps=2"
    code = bench(
        "--method", method, "--target", "dog", "--measure", "pictures", "--out", str(folder)
    )
    assert code == 0
    return folder


def test_a_run_leaves_a_report(finished):
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert [(row["target"], row["method"]) for row in report["rows"]] == [
        ("dog", "untouched"), ("dog", "resteer:steps=2"),
    ]  # fmt: skip
    assert {"UA", "IRA", "CRA", "HM"} <= {column["key"] for column in report["columns"]}
    assert "<script" not in (finished / "report.html").read_text(encoding="utf-8")
    assert "dog" in (finished / "report.md").read_text(encoding="utf-8")
    assert (finished / "bars.png").stat().st_size > 1000


def test_scores_are_written_into_a_patch_file(finished, tmp_path, capsys):
    """The patch is the one that the run above trained; its target is the one it forgets."""
    with Store(finished / "cells.sqlite") as store:
        (made,) = store.db.execute("SELECT patch FROM cells WHERE patch IS NOT NULL").fetchone()
    path = tmp_path / "dog.safetensors"
    path.write_bytes(made)
    arguments = "--method", str(path), "--measure", "pictures", "--out", str(finished)
    assert bench(*arguments, "--target", "dog") == 0
    assert path.read_bytes() == made  # unless it is asked for
    assert bench(*arguments, "--write-scores") == 0
    assert f"scores written into {path}" in capsys.readouterr().out
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    row = [mean for mean in report["means"] if mean["method"] == "dog.safetensors"][-1]
    assert load_file(path).keys() == load(made).keys()
    info = load_patch(path).info
    assert info["measured"]["targets"] == row["targets"] == ["dog"]
    assert info["scores"]["UA"] == round(row["values"]["UA"]["value"], 4)
    for more, told in (
        (("--method", "uce"), "'uce' is none"),
        (("--method", f"{path}:0.5"), "'dog.safetensors:0.5' is none"),
        (("--target", "vampire"), "does not forget 'vampire'"),
    ):
        assert bench(*arguments, "--write-scores", *more) == 2
        assert told in capsys.readouterr().err


def test_a_second_run_does_nothing_again(finished, capsys):
    with Store(finished / "cells.sqlite") as store:
        before = store.db.execute("SELECT key, finished FROM cells ORDER BY key").fetchall()
    assert bench("--method", "resteer:steps=2", "--target", "dog", "--measure", "pictures",
                 "--out", str(finished), "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["files"]["html"] == str(finished / "report.html")
    with Store(finished / "cells.sqlite") as store:
        after = store.db.execute("SELECT key, finished FROM cells ORDER BY key").fetchall()
    assert before == after


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--suite", "nosuch"], "There is no suite"),
        (["--target", "wolf"], "has no target 'wolf'"),
        (["--target", "dog", "--split", "report"], "None of dog is in the half 'report'"),
        (["--method", "ucee"], "There is no method 'ucee': did you mean uce"),
        (["--method", "nosuch.safetensors"], "There is no patch file 'nosuch.safetensors'"),
        (["--seed", "-1"], "--seed is -1: use 0 to"),
        (["--guidance", "nan"], "Guidance is nan"),
        (["--out", __file__], "is a file"),
        (["--out", "/proc"], "could not be saved"),
        (["--method", "resteer:steps=0"], "steps is 0"),
        (["--count", "1"], "--count is 1"),
        (["--judge", "nosuch"], "There is no judge"),
        (["--judge", "clip:/nosuch"], "/nosuch"),
        (["--suite", "stable-diffusion"], "names no default for --model"),
        (["--suite", "stable-diffusion", "--model", "demo"], "names no default for the judge"),
        (["--workers", "-1", "--target", "dog"], "--workers is -1"),
        (["--steps", "0"], "Sampling steps are 0"),
        (["--size", "100"], "multiple of 64"),
        (["--model", "nosuch.safetensors"], "nosuch.safetensors"),
        (["--vae", "nosuch.safetensors"], "nosuch.safetensors"),
        (["--model", "demo-dit", "--vae", "demo"], "leave out --vae and --prediction"),
        (["--prediction", "v"], "--prediction: invalid choice: 'v'"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(arguments, told, tmp_path, capsys):
    assert bench("--out", str(tmp_path / "out"), *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_two_patches_of_one_name_are_refused(tmp_path, capsys):
    """Each would get the other's results; the same patch twice is no harm."""
    paths = []
    for folder, size in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        (tmp_path / folder).mkdir()
        paths.append(save_patch(noise_patch(size), tmp_path / folder / "dog.safetensors"))
    first, other, same = map(str, paths)
    out = "--out", str(tmp_path / "out"), "--target", "wolf"
    assert bench("--method", first, other, *out) == 2
    told = "Two different patches are both named 'dog.safetensors'"
    assert told in capsys.readouterr().err
    assert bench("--method", first, same, *out) == 2
    assert "has no target 'wolf'" in capsys.readouterr().err
    assert bench("--method", first, f"{other}:0.5", *out) == 2
    assert "has no target 'wolf'" in capsys.readouterr().err


def test_scores_of_a_patch_that_forgets_nothing_of_the_suite(tmp_path, capsys):
    path = save_patch(noise_patch(1.0), tmp_path / "noise.safetensors")
    out = "--out", str(tmp_path / "out")
    assert bench("--method", str(path), "--write-scores", *out) == 2
    assert "forgets nothing by name, which suite 'demo'" in capsys.readouterr().err
    patch = noise_patch(1.0)
    patch.info["concepts"] = [{"name": "dog", "kind": "object"}]
    path = save_patch(patch, tmp_path / "dog.safetensors")
    assert bench("--method", str(path), "--write-scores", "--split", "report", *out) == 2
    assert "None of dog is in the half 'report'" in capsys.readouterr().err


def test_strips_of_controls(tmp_path):
    from PIL import Image

    Image.new("RGB", (24, 8), (255, 0, 0)).save(tmp_path / "kangaroo.png")
    pictures = read_controls(tmp_path)["kangaroo"]
    assert pictures.shape == (3, 8, 8, 3) and pictures[..., 0].eq(1).all()
    Image.new("RGB", (20, 8)).save(tmp_path / "odd.png")
    from fmn.errors import ForgetError

    with pytest.raises(ForgetError, match="20 x 8"):
        read_controls(tmp_path)
    (tmp_path / "odd.png").write_bytes(b"no")
    with pytest.raises(ForgetError, match="odd.png' cannot be read"):
        read_controls(tmp_path)
    assert read_controls("") == {}


def test_cells_have_the_same_key_in_every_process(setup):
    suite = parse_suite(setup.suite, "demo")
    cells = plan(setup, suite, ["dog"], [Method("p", {"sha256": "s"})], ("pictures",))
    program = (
        "import sys, pickle; setup, cells = pickle.load(sys.stdin.buffer); "
        "print(' '.join(cell.key(setup) for cell in cells))"
    )
    import pickle

    found = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps((setup, cells)), cwd=ROOT,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert found.stdout.decode().split() == [cell.key(setup) for cell in cells]


def test_a_folder_of_patches_is_one_method(setup, tmp_path):
    """Each target gets the patch that forgets it: published erasers become a row of the table."""
    folder = tmp_path / "uce-released"
    folder.mkdir()
    for name, size in (("dog", 1.0), ("car", 2.0)):
        patch = noise_patch(size)
        patch.info["concepts"] = [{"name": name, "kind": "object"}]
        save_patch(patch, folder / f"{name}.safetensors")
    method, suite = parse_method(str(folder)), parse_suite(read_suite("demo"), "demo")
    cells = plan(setup, suite, ["car", "dog"], [method], ["pictures"])
    trains = [cell for cell in cells if cell.work == "train"]
    assert [(cell.method, cell.targets) for cell in trains] == [
        ("uce-released", ("car",)), ("uce-released", ("dog",)),
    ]  # fmt: skip
    with Store(tmp_path / "cells.sqlite") as store:
        store_patches(setup, cells, store, [method])
        for cell in trains:
            file = folder / f"{cell.targets[0]}.safetensors"
            assert store.patch(cell.key(setup)) == file.read_bytes()
    targets = [suite.find(name) for name in ("dog", "apple", "car")]
    assert [target.name for target in covered(targets, [method], False)] == ["dog", "car"]
    with pytest.raises(ForgetError, match="holds no patch for apple"):
        covered(targets, [method], True)
    save_patch(load_patch(folder / "dog.safetensors"), folder / "again.safetensors")
    with pytest.raises(ForgetError, match="two patches that forget 'dog'"):
        parse_method(str(folder))
    with pytest.raises(ForgetError, match="holds no patches"):
        parse_method(str(tmp_path))
