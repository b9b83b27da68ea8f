"""Merging through a real server: lists, files by pattern, a budget, jointly."""

import numpy as np
import pytest

from fmn.patches.patch import load_patch

from .server import PromptError
from .test_batch import batch, files
from .workflows import demo_loader, drawing, node


def merging(**inputs):
    given = {"how": "concatenate", "budget_kb": 0, "strength": 1.0, "files": ""} | inputs
    return {
        "merge": node("FMN_MergeForgetPatches", **given),
        "save": node("FMN_SaveForgetPatch", patch=["merge", 0], filename_prefix="merged"),
        "inspect": node("FMN_InspectForgetPatch", patch=["merge", 0]),
    }


def saved(server, outputs):
    return load_patch(server.base / "output" / "forget_patches" / outputs["save"]["text"][0])


@pytest.fixture(scope="module")
def made(server):
    """Two patches in the folder ``merge``."""
    server.run(batch("merge", "dog\ncat", keep_list="none"))
    return {load_patch(path).concepts[0]: path for path in files(server, "merge")}


def test_a_batch_is_merged_and_applied(server):
    """Batch, merge, save, draw in one run; the same as putting on one after another."""
    prompt = batch("run", "dog\ncat", keep_list="none") | merging(patches=["batch", 0])
    prompt["apply"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["merge", 0], strength=1.0
    )
    outputs = server.run(prompt | drawing(["apply", 0], name="merged") | drawing(name="plain"))
    assert "merged: dog (uce) at 1; cat (uce) at 1" in outputs["inspect"]["text"][0]
    names = [path.relative_to(path.parents[1]).as_posix() for path in files(server, "run")]
    chained = demo_loader()
    for i, name in enumerate(names):
        chained[f"load{i}"] = node("FMN_LoadForgetPatch", file=name)
        chained[f"apply{i}"] = node(
            "FMN_ApplyForgetPatch", patch=[f"load{i}", 0], strength=1.0,
            model=["demo", 0] if i == 0 else [f"apply{i - 1}", 0],
        )  # fmt: skip
    both = server.run(chained | drawing(["apply1", 0], name="chained"))
    merged, chained = server.image(outputs["merged"]), server.image(both["chained"])
    assert np.abs(merged - chained).max() <= 2.5 / 255
    assert np.abs(merged - server.image(outputs["plain"])).mean() > 0.01


def test_files_by_pattern_and_a_list_with_strengths(server, made):
    prompt = merging(files="merge/cat*:-0.5\n\nmerge/dog*", strength=2.0, patches=["two", 0])
    dog = made["dog"].relative_to(made["dog"].parents[1]).as_posix()
    prompt["load"] = node("FMN_LoadForgetPatch", file=dog)
    prompt["one"] = node("FMN_PatchList", patch=["load", 0], strength=0.25)
    prompt["two"] = node("FMN_PatchList", patch=["load", 0], strength=1.0, patches=["one", 0])
    patch = saved(server, server.run(prompt))
    parts = [(part["concepts"], part["strength"]) for part in patch.info["merged"]]
    assert parts == [(["dog"], 0.5), (["dog"], 2.0), (["cat"], -0.5), (["dog"], 1.0)]
    name = next(iter(patch.changes))
    own = {key: load_patch(path).change_of(name) for key, path in made.items()}
    expected = 3.5 * own["dog"] - 0.5 * own["cat"]
    assert (patch.change_of(name) - expected).norm() < 2e-3 * expected.norm()


def test_a_budget_holds_for_the_saved_file(server, made):
    outputs = server.run(merging(files="merge/*", budget_kb=12))
    path = server.base / "output" / "forget_patches" / outputs["save"]["text"][0]
    assert 9_000 < path.stat().st_size <= 12_000
    assert "cut off by the rank: 0.00%" not in outputs["inspect"]["text"][0]


def test_a_file_that_changes_is_read_again(server, made):
    prompt = merging(files="again/*")
    server.run(batch("again", "dog", keep_list="none"))
    first = saved(server, server.run(prompt))
    server.run(batch("again", "fox", keep_list="none"))
    assert saved(server, server.run(prompt)).concepts == ["dog", "fox"] != first.concepts


@pytest.mark.parametrize("method", ["FMN_MethodUce", "FMN_MethodReread"])
def test_jointly(server, method):
    short = {
        "FMN_MethodUce": {"keep_list": "none"},
        "FMN_MethodReread": {"prompts": 3, "kept": 8, "sampling_steps": 2, "size": 64},
    }[method]
    prompt = batch(f"joint{method}", "dog\ncat", method, **short) | merging(
        how="joint", patches=["batch", 0], model=["demo", 0], clip=["demo", 1], preserve=5.0
    )
    prompt_id = server.queue(prompt)
    messages = list(server.events(prompt_id))
    outputs = server.history(prompt_id)["outputs"]
    loss = saved(server, outputs).info["loss"]
    assert loss["last"] < loss["first"]
    assert "how joint" in outputs["inspect"]["text"][0]
    bars = [data for kind, data in messages if kind == "progress" and data["node"] == "merge"]
    assert bars[-1]["value"] == bars[-1]["max"]


BAD = {
    "nothing": ({}, "nothing to merge"),
    "no match": ({"files": "nowhere/*"}, "No patch file matches 'nowhere/"),
    "outside": ({"files": "../../custom_nodes/*"}, "No patch file matches"),
    "no model": ({"files": "merge/*", "how": "joint"}, "the model or the clip input is empty"),
    "small": ({"files": "merge/*", "budget_kb": 1}, "1 kB are too few"),
    "how": ({"files": "merge/*", "how": "mean"}, "how is 'mean'|not in"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_merged_is_said_in_one_sentence(server, made, case):
    inputs, message = BAD[case]
    with pytest.raises(PromptError, match=message):
        server.run(merging(**inputs))


def test_joint_refuses_layers_of_which_it_knows_nothing(server):
    prompt = batch(
        "whole", "dog", "FMN_MethodResteer", steps=1, lr=0.002, rank=1, layers="unet",
        full_weights=False, end_tokens="none", references="zeros", samples=1, batch=1, size=64,
        checkpointing=False, training_seed=0,
    )  # fmt: skip
    prompt |= merging(
        how="joint", patches=["batch", 0], model=["demo", 0], clip=["demo", 1], preserve=5.0
    )
    with pytest.raises(PromptError, match="joint merging .*only .*concatenate"):
        server.run(prompt)


def test_joint_is_for_u_nets(server, made):
    prompt = demo_loader() | merging(
        files="merge/*", how="joint", model=["demo", 0], clip=["demo", 1]
    )
    prompt["demo"]["inputs"]["network"] = "transformer"
    with pytest.raises(PromptError, match="Joint .* is for U-Nets.*Flux.1 is none.*concatenate"):
        server.run(prompt)
