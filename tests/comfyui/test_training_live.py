"""What a training node tells the page, saves and resumes, through a real server."""

import base64
import io
import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from .server import Interrupted, PromptError
from .workflows import demo_loader, node, saving, training

EVENT = "forget-me-not.train"
WORKFLOW = "3f6c"


def options(**changes):
    widgets = {
        "preview_every": 0, "forgotten_prompt": "", "kept_prompt": "a photo of a house",
        "preview_steps": 2, "preview_seed": 1, "save_every": 0, "filename_prefix": "training",
        "keep_best": False, "resume": "start anew",
    } | changes  # fmt: skip
    return {"options": node("FMN_TrainingOptions", **widgets)}


def watched(settings, vae=True, method=None, **widgets):
    """A training with options, as the page would queue it."""
    prompt = demo_loader() | training(**settings) | options(**widgets)
    prompt["train"]["inputs"]["options"] = ["options", 0]
    if method:
        prompt["method"] = method
    if not vae:
        del prompt["train"]["inputs"]["vae"]
    return prompt


def start(server, prompt):
    given = {
        "prompt": prompt,
        "client_id": server.client,
        "extra_data": {"extra_pnginfo": {"workflow": {"id": WORKFLOW}}},
    }
    return server.post("/prompt", given)["prompt_id"]


def events_of(server, prompt):
    prompt_id = start(server, prompt | saving("watched"))
    return [data for kind, data in server.events(prompt_id) if kind == EVENT]


def kept(server):
    states = server.get("/forget-me-not/train", client=server.client)["states"]
    return next((s for s in states if (s["node"], s["workflow"]) == ("train", WORKFLOW)), None)


def picture(text):
    data = base64.b64decode(text, validate=True)
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    image.load()
    return image


def options_of(server, kind, widget):
    """What a node offers in a list; ComfyUI's older nodes tell it in another way."""
    given = server.get(f"/object_info/{kind}")[kind]["input"]["required"][widget]
    return given[0] if isinstance(given[0], list) else given[1]["options"]


def files(server, prefix):
    folder = server.base / "output" / "forget_patches"
    return sorted(path.name for path in folder.glob(f"{prefix}*"))


def test_curves_and_previews_reach_the_page(server):
    events = events_of(server, watched({"steps": 5, "training_seed": 301}, preview_every=2))
    assert events[0]["status"] == "running" and events[0]["step"] == 0
    last = events[-1]
    assert last["status"] == "done" and last["title"] == "dog" and last["error"] == ""
    assert last["memory"].startswith("memory: weights ")
    assert [index for index, _ in last["losses"]] == [1, 2, 3, 4, 5]
    assert [index for index, _ in last["attention"]] == [0, 1, 2, 3, 4, 5]
    assert all(0 < share < 1 for _, share in last["attention"])
    assert all(len(json.dumps(event)) < 200_000 for event in events)
    shown = [event for event in events if event.get("previews")]
    assert sorted({event["previews_at"] for event in shown}) == [2, 4, 5]
    for pair in shown[0]["previews"]:
        before, now = picture(pair["before"]), picture(pair["now"])
        assert before.size == now.size == (128, 128)
    assert [pair["prompt"] for pair in last["previews"]] == ["a photo of dog", "a photo of a house"]
    assert last["previews"][0]["before"] == shown[0]["previews"][0]["before"]
    assert last["previews"][0]["now"] != last["previews"][0]["before"]
    assert kept(server) == last


def test_the_state_can_be_asked_for_while_it_runs_and_after_cancel(server):
    prompt_id = start(server, watched({"steps": 3000, "training_seed": 302}) | saving("never"))
    asked = None
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            if kind == EVENT and data["step"] >= 3 and asked is None:
                asked = kept(server)
                server.post("/interrupt", {})
    assert asked["status"] == "running" and asked["step"] >= 3 and asked["prompt_id"] == prompt_id
    assert asked["losses"][-1][0] == asked["step"] and asked["seconds_left"] > 0
    assert kept(server)["status"] == "cancelled"
    other = server.get("/forget-me-not/train", client="somebody else")
    assert other == {"states": []} == server.get("/forget-me-not/train")


def test_an_error_ends_the_state_too(server):
    with pytest.raises(PromptError, match="does not contain the concept"):
        prompt = watched({"training_seed": 303}) | saving("never")
        prompt["concept"]["inputs"]["prompts"] = "a cat"
        for _ in server.events(start(server, prompt)):
            pass
    assert kept(server)["status"] == "failed"
    assert "does not contain the concept 'dog'" in kept(server)["error"]


def test_a_closed_form_shows_one_pair_at_the_end(server):
    solve = node("FMN_MethodUce")
    events = events_of(server, watched({"training_seed": 304}, method=solve, preview_every=1))
    last = events[-1]
    assert last["status"] == "done" and len(last["previews"]) == 2
    assert last["previews"][0]["now"] != last["previews"][0]["before"]
    assert len([event for event in events[1:-1] if event.get("previews")]) == 1
    assert last["outcome"].startswith("dog: ") and "% of its effect is left" in last["outcome"]


def test_a_text_encoder_in_training_is_previewed_too(server):
    hirm = node("FMN_MethodHirm", steps=4)
    events = events_of(server, watched({"training_seed": 305}, method=hirm, preview_every=2))
    shown = [event for event in events if event.get("previews")]
    assert {event["previews_at"] for event in shown} == {2, 4}
    first = shown[0]["previews"][0]
    assert first["now"] != first["before"]


def test_without_a_vae_there_are_no_previews(server):
    events = events_of(
        server, watched({"steps": 3, "training_seed": 306}, vae=False, preview_every=1)
    )
    assert not any(event.get("previews") for event in events)
    assert events[-1]["note"] == "No previews: the vae input is empty."


def test_previews_change_nothing(server):
    made = []
    for every in (0, 1):
        prompt = watched({"steps": 3, "training_seed": 307}, preview_every=every)
        outputs = server.run(prompt | saving("plain"))
        made.append(load_file(server.base / "output/forget_patches" / outputs["save"]["text"][0]))
    assert all(made[0][key].equal(made[1][key]) for key in made[0])


def test_saved_on_the_way_cancelled_and_resumed(server):
    """The patch of a run that was cancelled and resumed is that of an uninterrupted one."""
    settings = {"steps": 30, "training_seed": 308, "batch": 2}
    whole = server.run(watched(settings) | saving("whole"))["save"]["text"][0]
    # Previews make the steps slow, so that Cancel comes before the next state.
    slow = {"preview_every": 1, "preview_steps": 4}
    part = {"save_every": 10, "filename_prefix": "part/dog"} | slow
    prompt_id = start(server, watched(settings, **part) | saving("never"))
    with pytest.raises(Interrupted):
        for kind, data in server.events(prompt_id):
            if kind == "progress" and data["node"] == "train" and data["value"] == 21:
                server.post("/interrupt", {})
    state = "dog_step20_00001.fmn-train"
    assert files(server, "part/dog") == [
        "dog_step10_00001.safetensors", state, "dog_step20_00001.safetensors",
    ]  # fmt: skip
    assert f"part/{state}" in options_of(server, "FMN_TrainingOptions", "resume")
    for loader, widget in (("FMN_LoadForgetPatch", "file"), ("LoraLoader", "lora_name")):
        listed = options_of(server, loader, widget)
        assert "part/dog_step20_00001.safetensors" in listed
        assert not any("fmn-train" in name for name in listed)

    events = events_of(server, watched(settings, resume=f"part/{state}"))
    assert events[-1]["step"] == 30 and len(events[-1]["losses"]) == 30
    folder = server.base / "output" / "forget_patches"
    resumed, expected = load_file(folder / files(server, "watched")[-1]), load_file(folder / whole)
    assert all(resumed[key].equal(expected[key]) for key in expected)

    with pytest.raises(PromptError, match="made with seed 308, and this is 309"):
        server.run(watched(settings | {"training_seed": 309}, resume=f"part/{state}") | saving())
    load = {
        "load": node("FMN_LoadForgetPatch", file=f"part/{state}"),
        "inspect": node("FMN_InspectForgetPatch", patch=["load", 0]),
    }
    with pytest.raises(PromptError, match="There is no patch"):
        server.run(load)


def test_the_best_step_is_marked_and_kept(server):
    settings = {"steps": 14, "training_seed": 310, "lr": 0.05}
    last = events_of(server, watched(settings, keep_best=True))[-1]
    means = [sum(v for _, v in last["losses"][i - 10 : i]) for i in range(10, 15)]
    assert last["best"] == 10 + means.index(min(means))


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "missing.fmn-train"])
def test_resuming_outside_the_folder_is_refused(server, name):
    with pytest.raises(PromptError, match="There is no training state|resume: .* not in"):
        server.run(watched({"training_seed": 311}, resume=name) | saving("never"))


def test_saving_outside_the_folder_is_refused_before_training(server):
    prompt = watched({"training_seed": 312}, save_every=1, filename_prefix="../../escape")
    with pytest.raises(PromptError, match="leads out of output/forget_patches") as caught:
        server.run(prompt | saving("never"))
    assert caught.value.data["node_type"] == "FMN_TrainingOptions"
