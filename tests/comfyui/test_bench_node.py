"""The ConceptBench node, through a real server."""

import json
import sqlite3

import pytest
import torch

from .parts import concept, leftovers, settings, state
from .server import Interrupted, PromptError, texts
from .workflows import demo_loader, node, saving, training


def bench(**inputs):
    given = {
        "suite": "demo", "targets": "dog", "measure": "pictures", "judge": "", "count": 2,
        "bench_seed": 0, "name": "test",
    } | inputs  # fmt: skip
    return demo_loader() | {
        "bench": node(
            "FMN_ConceptBench", model=["demo", 0], clip=["demo", 1], vae=["demo", 2], **given
        ),
        "bars": node("PreviewImage", images=["bench", 1]),
        "scatter": node("PreviewImage", images=["bench", 2]),
    }


def folder_of(server, name="test"):
    return server.base / "output" / "forget_bench" / name


def finished(server, name="test"):
    path = folder_of(server, name) / "cells.sqlite"
    return dict(sqlite3.connect(path).execute("SELECT key, finished FROM cells"))


@pytest.fixture(scope="module")
def measured(server):
    """A patch that was trained in the graph, measured on its target."""
    prompt = training(steps=3) | bench(patch=["train", 0], targets="")
    prompt_id = server.queue(prompt)
    texts = [event for event in server.events(prompt_id)]
    return texts, server.history(prompt_id)["outputs"]


def test_a_patch_is_measured_on_what_it_forgets(server, measured):
    events, outputs = measured
    report = outputs["bench"]["text"][0]
    assert "untouched" in report and "patch" in report and "UA" in report
    saved = json.loads((folder_of(server) / "report.json").read_text(encoding="utf-8"))
    assert [(row["target"], row["method"]) for row in saved["rows"]] == [
        ("dog", "untouched"), ("dog", "patch"),
    ]  # fmt: skip
    for name in ("bars", "scatter"):
        picture = server.image(outputs[name])
        assert min(picture.shape[:2]) > 100 and picture.std() > 0.01
    assert (folder_of(server) / "report.html").stat().st_size > 10_000
    assert any("cells" in text for text in texts(events)), "the node never told how far it is"
    (told,) = outputs["bench"]["node_text"]
    table = {row["method"]: row["values"] for row in saved["means"]}
    for method, values in table.items():
        assert f"{method}: UA {100 * values['UA']['value']:.1f} %, IRA " in told
    assert told.endswith(str(folder_of(server) / "report.html"))


def test_plots_of_what_was_not_measured_are_left_out(server):
    outputs = server.run(bench(measure="together", name="together"))
    assert "together" in outputs["bench"]["text"][0]
    assert "bars" not in outputs and "scatter" not in outputs


def test_a_second_run_measures_only_what_is_missing(server, measured):
    before = finished(server)
    server.run(training(steps=3) | bench(patch=["train", 0], targets="dog"))
    assert finished(server) == before
    method = {"uce": node("FMN_MethodUce", keep_list="none")}
    server.run(method | bench(bench_seed=1, method=["uce", 0]))
    after = finished(server)
    assert before.items() < after.items()
    assert len(after) == len(before) + 3  # untouched, training, with the patch


def weights(path):
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def loading(file, name="load"):
    return {name: node("FMN_LoadForgetPatch", file=file)}


def test_scores_are_written_into_the_patch_s_file(server, measured):
    """That of Load Forget Patch; the shelf shows them, and a second run touches nothing."""
    file = server.run(demo_loader() | training(steps=3) | saving("scored"))["save"]["text"][0]
    path = server.base / "output" / "forget_patches" / file
    before, whole = weights(path), path.read_bytes()
    server.run(loading(file) | bench(patch=["load", 0], targets=""))
    assert path.read_bytes() == whole  # a measure alone writes nothing
    prompt = loading(file) | bench(patch=["load", 0], targets="", write_scores=True)
    report = server.run(prompt)["bench"]["text"][0]
    assert report.endswith(f"scores written into {file}")
    assert weights(path) == before and path.read_bytes() != whole

    saved = json.loads((folder_of(server) / "report.json").read_text(encoding="utf-8"))
    values = [row for row in saved["means"] if row["method"] == "patch"][-1]["values"]
    listed = server.get("/forget-me-not/shelf")["patches"]
    entry = next(each for each in listed if each["name"] == file)
    named = {"UA": "UA", "IRA": "IRA", "CRA": "CRA", "mean": "HM"}
    found = {name: round(values[key]["value"], 4) for name, key in named.items()}
    assert entry["scores"] == found and entry["measured"] == [saved["suite"], ["dog"]]
    inspect = {"inspect": node("FMN_InspectForgetPatch", patch=["load", 0])}
    text = server.run(loading(file) | inspect)["inspect"]["text"][0]
    assert "scores: UA " in text and f"measured: {saved['suite']}: dog; 2 pictures" in text

    written = path.stat().st_mtime_ns
    server.run(prompt)
    assert path.stat().st_mtime_ns == written


def test_scores_of_a_patch_that_was_just_saved(server, measured):
    prompt = training(steps=3) | saving("fresh") | bench(patch=["save", 0], write_scores=True)
    outputs = server.run(prompt)
    path = server.base / "output" / "forget_patches" / outputs["save"]["text"][0]
    assert outputs["bench"]["text"][0].endswith(f"scores written into {path.name}")
    header = path.read_bytes()[:4000]
    assert b"fmn.scores" in header and b"fmn.measured" in header


@pytest.mark.parametrize(
    "inputs, told",
    [
        ({"targets": "wolf"}, "has no target 'wolf'"),
        ({"suite": "stable-diffusion", "targets": ""}, "no default for the judge"),
        ({"judge": "nosuch"}, "There is no judge 'nosuch'"),
        ({"judge": "clip:/nosuch"}, "/nosuch"),
        ({"name": "../../escape"}, "leads out of output/forget_bench"),
        ({"patch": ["train", 0], "method": ["method", 0]}, "remove one of them"),
        ({"patch": ["train", 0], "suite": "demo", "targets": "wolf"}, "no target 'wolf'"),
        ({"write_scores": True}, "the patch is not a file yet"),
        ({"write_scores": True, "patch": ["train", 0]}, "the patch is not a file yet"),
        (
            {"write_scores": True, "patch": ["shipped", 0], "targets": "santa claus"},
            "'santa_claus.safetensors' belongs to this pack",
        ),
        (
            {"write_scores": True, "patch": ["save", 0], "targets": "dog\ncar"},
            "does not forget 'car'",
        ),
    ],
)
def test_what_is_wrong_is_said(server, inputs, told):
    with pytest.raises(PromptError) as caught:
        shipped = loading("demo/santa_claus.safetensors", "shipped")
        server.run(training(steps=1) | saving("refused") | shipped | bench(**inputs))
    assert told in str(caught.value)


def test_a_patch_for_something_the_suite_does_not_ask_about(server):
    with pytest.raises(PromptError, match="does not ask about"):
        server.run(training("broccoli", steps=1) | bench(patch=["train", 0], targets=""))


def test_cancel_keeps_what_is_finished(server):
    prompt_id = server.queue(bench(name="cancelled", count=4, targets="apple\ncar"))
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            if any("1 of 6 cells" in text for text in texts([(kind, data)])):
                server.post("/interrupt", {})
    assert 1 <= len(finished(server, "cancelled")) < 6


def test_the_model_comes_back_bit_identical(pack, demo, monkeypatch):
    model, clip, vae = demo
    host = pack("fmn.hosts.comfyui.model").ComfyModel(model, clip, vae)
    patch = pack("fmn.methods.resteer").run(host, [concept(pack)], settings(pack))
    before = state(model)
    # There is no server in this process to show it.
    monkeypatch.setattr(pack("nodes.bench"), "show_text", lambda text: None)
    node_class = pack("nodes.bench").ConceptBench
    with torch.inference_mode():
        node_class.execute(
            model, clip, vae, "demo", "dog", "pictures", "", 1, 0, "in_process", patch=patch
        )
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not leftovers(model.model)
