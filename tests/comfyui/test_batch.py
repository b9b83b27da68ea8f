"""A list of concepts, one patch each, through a real server."""

import time

import pytest

from fmn.bench.suite import load_suite
from fmn.patches.patch import load_patch

from .server import LATE, Interrupted, PromptError, texts
from .test_server import unrelated_picture, unseen_seed
from .workflows import demo_loader, drawing, node


def batch(folder, text, method="FMN_MethodUce", **settings):
    return demo_loader() | {
        "concepts": node("FMN_ConceptList", text=text, kind="object"),
        "method": node(method, **settings),
        "batch": node(
            "FMN_TrainForgetPatches",
            model=["demo", 0], clip=["demo", 1], concepts=["concepts", 0], method=["method", 0],
            folder=folder,
        ),
    }  # fmt: skip


def files(server, folder):
    return sorted((server.base / "output" / "forget_patches" / folder).glob("*"))


def test_a_hundred_concepts_in_one_run(server):
    """With a closed form, in less than five minutes; the bar and the text tell of the whole."""
    kinds = list(load_suite("demo").kinds.items())[:100]
    text = "\n".join(f"{kind}:{name}" for name, kind in kinds)
    start = time.monotonic()
    messages = list(server.events(server.queue(batch("hundred", text))))
    seconds = time.monotonic() - start
    print(f"100 concepts in {seconds:.1f} s")  # shown by pytest -rP
    assert seconds < 300
    found = {load_patch(path).concepts[0] for path in files(server, "hundred")}
    assert found == {name for name, _ in kinds}
    bar = [(data["value"], data["max"]) for kind, data in messages if kind == "progress"]
    assert bar == sorted(bar) and bar[-1] == (10000, 10000)
    lines = texts(messages)
    name = kinds[49][0]
    assert any(f"{name}: 50/100, " in line and "s left" in line for line in lines)
    (told,) = [data["output"]["node_text"] for kind, data in messages if kind == "executed"]
    assert "100 of 100 concepts have a patch" in told[0]


def test_a_failure_in_the_middle_and_going_on(server):
    """What cannot be made is told; the next run makes only what is new."""
    prompt = batch("middle", "dog", keep_list="none")
    prompt["bad"] = node(
        "FMN_Concept", name="cat", kind="object", prompts="a bush", concepts=["concepts", 0]
    )
    prompt["last"] = node("FMN_Concept", name="fox", kind="object", concepts=["bad", 0])
    prompt["batch"]["inputs"]["concepts"] = ["last", 0]
    report = server.run(prompt)["batch"]["text"][0]
    assert report.startswith("2 of 3 concepts have a patch, 0 of them from before; 1 failed")
    assert "failed: cat: The prompt 'a bush' does not contain" in report
    stamps = {path: path.stat().st_mtime_ns for path in files(server, "middle")}
    assert len(stamps) == 2
    prompt["bad"]["inputs"]["prompts"] = "a cat"
    report = server.run(prompt)["batch"]["text"][0]
    assert report.startswith("3 of 3 concepts have a patch, 2 of them from before; 0 failed")
    after = {path: path.stat().st_mtime_ns for path in files(server, "middle")}
    assert len(after) == 3 and stamps.items() <= after.items()


def test_files_that_were_deleted_are_made_again(server):
    """And what was made makes nothing run again: the node and what is behind it stay cached."""
    prompt = batch("deleted", "dog\ncat", "FMN_MethodUce", keep_list="none")
    prompt["merge"] = node(
        "FMN_MergeForgetPatches", patches=["batch", 0], how="concatenate", budget_kb=0,
        strength=1.0, files="",
    )  # fmt: skip
    prompt["inspect"] = node("FMN_InspectForgetPatch", patch=["merge", 0])

    def ran():
        key = server.queue(prompt)
        list(server.events(key))
        messages = dict(server.history(key)["status"]["messages"])
        return {"batch", "merge"} - set(messages["execution_cached"]["nodes"])

    assert ran() == {"batch", "merge"} and ran() == set()
    whole = files(server, "deleted")
    assert len(whole) == 2
    whole[0].unlink()
    assert ran() == {"batch", "merge"} and files(server, "deleted") == whole
    assert ran() == set()


def test_cancel_in_the_middle_keeps_the_finished_files(server):
    prompt = batch(
        "stopped", "dog\ncat\nfox", "FMN_MethodResteer", steps=30, lr=0.002, rank=4, layers="kv",
        full_weights=False, end_tokens="none", references="zeros", samples=1, batch=1, size=64,
        checkpointing=False, training_seed=0,
    )  # fmt: skip
    seed, cancelled, after = unseen_seed(), False, 0
    before = unrelated_picture(server, seed)
    with pytest.raises(Interrupted):
        for kind, data in server.events(server.queue(prompt)):
            after += cancelled and kind == "progress"
            if kind == "progress" and data["value"] > 0.6 * data["max"] and not cancelled:
                server.post("/interrupt", {})
                cancelled = True
    assert after <= LATE
    server.run(demo_loader() | drawing(text="a dog", seed=unseen_seed()))  # defeats the cache
    assert unrelated_picture(server, seed) == before
    stamps = {path: path.stat().st_mtime_ns for path in files(server, "stopped")}
    assert [load_patch(path).concepts for path in stamps][0] == ["dog"]
    assert len(stamps) < 3  # one, unless Cancel came late
    report = server.run(prompt)["batch"]["text"][0]
    told = f"3 of 3 concepts have a patch, {len(stamps)} of them from before; 0 failed"
    assert report.startswith(told)
    after = {path: path.stat().st_mtime_ns for path in files(server, "stopped")}
    assert len(after) == 3 and stamps.items() <= after.items()


def test_nothing_at_all_is_an_error(server):
    prompt = batch("none", "", keep_list="none")
    prompt["concepts"] = node("FMN_Concept", name="cat", kind="object", prompts="a bush")
    with pytest.raises(PromptError, match="0 of 1 concepts have a patch"):
        server.run(prompt)
    assert files(server, "none") == []


@pytest.mark.parametrize("folder", ["../escape", "/etc/escape", "a/../../b"])
def test_a_folder_outside_is_refused(server, folder):
    with pytest.raises(PromptError, match="leads out of output/forget_patches"):
        server.run(batch(folder, "dog"))


def test_a_list_in_a_file(server):
    (server.base / "input" / "pets.csv").write_text(
        "name,kind,anchor,aliases,prompts\ndog,object,cat,puppy|hound,\nfox,object,,,\n"
    )
    prompt = batch("pets", "not read", keep_list="none")
    prompt["concepts"]["inputs"]["file"] = "pets.csv"
    report = server.run(prompt)["batch"]["text"][0]
    assert report.startswith("2 of 2 concepts have a patch")
    described = [load_patch(path).info["concepts"][0] for path in files(server, "pets")]
    assert described[0]["aliases"] == ["puppy", "hound"] and described[0]["anchor"] == "cat"
    # Another content under the same name is read again.
    (server.base / "input" / "pets.csv").write_text("name,kind\ndog,beast\n")
    with pytest.raises(PromptError, match="'pets.csv', line 2: Unknown kind 'beast'"):
        server.run(prompt)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hosts.txt", "missing.csv"])
def test_a_list_outside_the_input_folder_is_refused(server, name):
    (server.base / "secret.txt").write_text("dog")
    prompt = batch("never", "dog")
    prompt["concepts"]["inputs"]["file"] = name
    with pytest.raises(
        PromptError, match="There is no list .* in the input folder|file: .* not in"
    ):
        server.run(prompt)
