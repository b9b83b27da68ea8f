"""Every example workflow in the real frontend: opened, understood and accepted.

Here the page only says what it would send; ``test_templates.py`` runs them.
"""

import json

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


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_example_has_a_picture_and_a_note(path):
    file = path.with_suffix(".jpg")
    assert file.stat().st_size < 150_000
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.width >= 200 and picture.height >= 200
    notes = [item for item in workflow(path)["nodes"] if item["type"] == "MarkdownNote"]
    assert len(notes) == 1 and len(notes[0]["widgets_values"][0]) > 80


def test_the_shipped_patch_is_for_the_demo_model(pack, demo):
    """What the template of a downloaded patch loads."""
    files = pack("nodes.patch").DEMO_PATCHES
    assert list(files) == ["demo/santa_claus.safetensors"]
    patch = pack("fmn.patch").load_patch(files["demo/santa_claus.safetensors"])
    host = pack("fmn.hosts.comfy").ComfyModel(*demo)
    assert patch.concepts == ["santa claus"]
    assert patch.info["base.fingerprint"] == host.fingerprint()


def test_merging_everything_leaves_the_shipped_patch_out(pack):
    """A pattern means the user's own files."""
    (shipped,) = pack("nodes.patch").DEMO_PATCHES.values()
    assert shipped.is_file()
    for pattern in ("*", "demo/*", "demo/santa_claus.safetensors"):
        assert shipped not in pack("nodes.merge")._matching(pattern)
