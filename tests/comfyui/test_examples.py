"""Every example workflow in the real frontend: opened, understood and accepted.

Here the page only says what it would send, and one is run without it; ``test_templates.py`` runs
them all.
"""

import copy
import json
import uuid

import pytest
from PIL import Image

from .frontend import TEMPLATES, open_template


@pytest.fixture(scope="module")
def prompts(page):
    """Example -> what its page would send to the server, and the titles of its previews."""
    made = {}
    for path in TEMPLATES:
        page.fmn_errors.clear()
        open_template(page, path, nodes_2=False)
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
        missing = page.get_by_text("missing node", exact=False).count()
        made[path.stem] = prompt, missing, list(page.fmn_errors)
    return made


def workflow(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_example_opens_whole(server, prompts, path):
    """No node is missing, no error in the page, and no link or node gets lost on the way."""
    prompt, missing, errors = prompts[path.stem]
    assert missing == 0 and errors == []
    saved = workflow(path)
    known = server.get("/object_info")
    real = [item for item in saved["nodes"] if item["type"] != "MarkdownNote"]
    assert {item["type"] for item in real} <= known.keys()
    assert {(str(item["id"]), item["type"]) for item in real} == {
        (number, item["class_type"]) for number, item in prompt.items()
    }
    linked = [value for item in prompt.values() for value in item["inputs"].values()]
    assert sum(isinstance(value, list) for value in linked) == len(saved["links"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_example_sets_what_it_shows(server, prompts, path):
    """Values are saved by position: each reaches the input that it stands beside."""
    prompt = prompts[path.stem][0]
    info = server.get("/object_info")
    for item in workflow(path)["nodes"]:
        if not item["type"].startswith("FMN_"):
            continue
        widgets = [part["name"] for part in item["inputs"] if "widget" in part]
        values = item.get("widgets_values") or []
        sent = prompt[str(item["id"])]["inputs"]
        assert dict(zip(widgets, values)) == {name: sent[name] for name in widgets}, item["type"]
        current = info[item["type"]]["input"]
        assert set(sent) <= {*current.get("required", {}), *current.get("optional", {})}
        assert set(widgets) == {
            name
            for part in current.values()
            for name, spec in part.items()
            if spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        }, f"{item['type']} has other widgets now: run tools/examples.py"


def nodes_of(path, kind):
    return [item for item in workflow(path)["nodes"] if item["type"] == kind]


def note_of(path):
    (note,) = nodes_of(path, "MarkdownNote")
    return note["widgets_values"][0]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_example_opens_so_that_it_can_be_read(path):
    """Below 0.6 the page draws no texts. The note is in sight."""
    view = workflow(path)["extra"]["ds"]
    assert view["scale"] >= 0.65
    (note,) = nodes_of(path, "MarkdownNote")
    left, top = ((at + shift) * view["scale"] for at, shift in zip(note["pos"], view["offset"]))
    assert 50 <= left < 300 and 80 <= top < 300


def test_each_opening_gets_an_id_of_its_own(page):
    """By which the page finds curves and previews again: an earlier opening's are not its own."""
    assert not any("id" in workflow(path) for path in TEMPLATES)
    ids = set()
    for path in (*TEMPLATES[:2], TEMPLATES[0]):
        open_template(page, path, False)
        ids.add(str(uuid.UUID(page.evaluate("app.graph.id"))))
    assert len(ids) == 3


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_saved_gets_a_picture(path):
    for item in nodes_of(path, "FMN_SaveForgetPatch"):
        (thumbnail,) = [each for each in item["inputs"] if each["name"] == "thumbnail"]
        assert thumbnail["link"] is not None


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_note_says_what_goes_along_with_another_name(prompts, path):
    """Each widget that holds the name of the concept; and the prompts that are drawn."""
    sent, note = prompts[path.stem][0], note_of(path)
    ours = [item for item in sent.values() if item["class_type"].startswith("FMN_")]
    names = {i["inputs"]["name"] for i in ours if i["class_type"] == "FMN_Concept"}
    for name in names:
        told = {
            widget
            for item in ours
            for widget, value in item["inputs"].items()
            if isinstance(value, str) and name in value.replace("_", " ")
        }
        assert [each for each in told if f"**{each}**" not in note] == []
        drawn = [i for i in sent.values() if i["class_type"] == "CLIPTextEncode"]
        if any(name in item["inputs"]["text"] for item in drawn):
            assert "prompt" in note


def test_the_first_example_runs_with_another_name_alone(server, prompts):
    prompt = copy.deepcopy(prompts["Forget a concept (demo)"][0])
    for item in prompt.values():
        if item["class_type"] == "FMN_Concept":
            item["inputs"]["name"] = "cat"
    outputs = server.run(prompt)
    (key,) = [k for k, item in prompt.items() if item["class_type"] == "FMN_SaveForgetPatch"]
    (name,) = outputs[key]["text"]
    listed = server.get("/forget-me-not/shelf")["patches"]
    (entry,) = [each for each in listed if each["name"] == name]
    assert entry["concepts"] == [["cat", "object", "", ""]] and entry["picture"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_example_has_a_picture_and_a_note(path):
    file = path.with_suffix(".jpg")
    assert file.stat().st_size < 150_000
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.width >= 200 and picture.height >= 200
    assert len(note_of(path)) > 80


def test_the_shipped_patch_is_for_the_demo_model(pack, demo):
    """What the template of a downloaded patch loads."""
    files = pack("nodes.patch").DEMO_PATCHES
    assert list(files) == ["demo/santa_claus.safetensors"]
    patch = pack("fmn.patches.patch").load_patch(files["demo/santa_claus.safetensors"])
    host = pack("fmn.hosts.comfyui.model").ComfyModel(*demo)
    assert patch.concepts == ["santa claus"]
    assert patch.info["base.fingerprint"] == host.fingerprint()


def test_merging_everything_leaves_the_shipped_patch_out(pack):
    """A pattern means the user's own files."""
    (shipped,) = pack("nodes.patch").DEMO_PATCHES.values()
    assert shipped.is_file()
    for pattern in ("*", "demo/*", "demo/santa_claus.safetensors"):
        assert shipped not in pack("nodes.merge")._matching(pattern)
