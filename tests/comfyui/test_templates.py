"""Every template in the real frontend, in both renderers, dark in one and light in the other:
opened, looked at, and in one of the two run by the page's own button."""

import json

import pytest

from .frontend import TEMPLATES, at_rest, dress, open_template
from .template_page import (
    PICTURES,
    SET,
    SIZES,
    TEXTS,
    choose_template,
    drawn,
    faults,
    photograph,
    run,
    seen,
)  # fmt: skip

# What makes a run short. The outcome is not looked at, only that all nodes do their work.
TINY = {
    "KSampler": {"steps": 2},
    "FMN_CompareBeforeAfter": {"steps": 2},
    "EmptyLatentImage": {"batch_size": 1},
    "FMN_KeepList": {"list": "none"},
    "FMN_MethodUce": {"keep_list": "none"},
    "FMN_MethodReread": {"prompts": 2, "kept": 4, "drawn": 1, "sampling_steps": 2, "near_words": 0},
    "FMN_MethodTrce": {"prompts": 4, "keep_list": "none"},
    "FMN_MethodRece": {"rounds": 1, "keep_list": "none"},
    "FMN_MethodAblation": {"steps": 2, "sample_steps": 2, "samples": 1},
    "FMN_ConceptInversionProbe": {"steps": 2, "batch": 1, "pictures": 1},
    "FMN_ConceptBench": {"count": 2},
    "FMN_MScore": {"steps": 2, "inversions": 1, "batch": 1, "pictures": 1},
}
AS_IT_IS = "Forget a concept (demo)"  # the first that users open: nothing made short
LOOKS = [(nodes_2, palette) for nodes_2 in (False, True) for palette in ("dark", "light")]
# By its number, the looks of a template: where it runs, and the other.
PAIRS = (LOOKS[0], LOOKS[3]), (LOOKS[1], LOOKS[2]), (LOOKS[2], LOOKS[1]), (LOOKS[3], LOOKS[0])
IN = {path.stem: PAIRS[i % len(PAIRS)] for i, path in enumerate(TEMPLATES)}
BY_CARD = TEMPLATES[: len(PAIRS)]  # one in each look
CASES = [(looks, path) for looks in LOOKS for path in TEMPLATES if looks in IN[path.stem]]
TELL = {  # types that always show a text once they have run
    "FMN_TrainForgetPatch", "FMN_TrainForgetPatches", "FMN_SaveForgetPatch",
    "FMN_InspectForgetPatch", "FMN_MergeForgetPatches", "FMN_ConceptBench", "FMN_MScore",
    "FMN_AttentionMap", "FMN_CompareBeforeAfter", "FMN_ConceptInversionProbe",
    "FMN_SafeLatentDiffusion",
}  # fmt: skip


def titled(looks):
    nodes_2, palette = looks
    return f"{'nodes 2' if nodes_2 else 'classic'}, {palette}"


def test_the_templates_are_listed_with_a_thumbnail(server):
    listed = server.get("/workflow_templates")["forget-me-not"]
    assert sorted(listed) == sorted(path.stem for path in TEMPLATES)
    assert "Forget a concept (demo)" in listed
    for path in TEMPLATES:
        assert path.with_suffix(".jpg").read_bytes()[:3] == b"\xff\xd8\xff"


def test_app_mode_shows_widgets_and_pictures_that_are_there():
    forms = {}
    for path in TEMPLATES:
        saved = json.loads(path.read_text(encoding="utf-8"))
        nodes = {item["id"]: item for item in saved["nodes"]}
        forms[path.stem] = form = saved["extra"].get("linearData", {"inputs": [], "outputs": []})
        for number, name in form["inputs"]:
            assert name in [part["name"] for part in nodes[number]["inputs"] if "widget" in part]
        assert {nodes[number]["type"] for number in form["outputs"]} <= {"PreviewImage"}
    shown = [name for name, form in forms.items() if form["outputs"]]
    assert shown == ["Apply a downloaded patch (demo)", AS_IT_IS]


@pytest.fixture(scope="module")
def wide(page):
    page.set_viewport_size({"width": 3100, "height": 1700})
    yield page
    dress(page, False, "dark")


@pytest.mark.parametrize(
    "looks, path",
    [pytest.param(looks, path, id=f"{path.stem}, {titled(looks)}") for looks, path in CASES],
)
def test_a_template_in_the_page(wide, page, server, looks, path):
    dress(page, *looks)
    page.fmn_errors.clear()
    page.fmn_console.clear()
    here = IN[path.stem][0] == looks
    nodes_2, _ = looks
    if path in BY_CARD and here:
        choose_template(page, path.stem)
    else:
        open_template(page, path, nodes_2)
    drawn(page, nodes_2)
    assert page.get_by_text("missing node", exact=False).count() == 0
    name = f"{path.stem}, {titled(looks)}"
    if not here:
        photograph(page, name)
    assert faults(page) == []
    if here:
        page.evaluate(SET, {} if path.stem == AS_IT_IS else TINY)
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
        sizes = page.evaluate(SIZES)
        told, cached, seconds = run(page, server)
        assert seconds < 120
        everything_came(server, page, prompt, told, cached)
        at_rest(page)
        photograph(page, f"{name}, run")
        assert page.evaluate(SIZES) == sizes
        assert faults(page) == []
    assert page.fmn_errors == [] and page.fmn_console == []


def everything_came(server, page, prompt, told, cached):
    """The server has made all outputs, and the page shows them."""
    types = {key: item["class_type"] for key, item in prompt.items()}
    previews = [key for key, name in types.items() if name == "PreviewImage"]
    assert previews
    for key in previews:
        picture = server.image(told["outputs"][key])
        assert min(picture.shape[:2]) > 100 and picture.std() > 0
    seen(page, PICTURES, {key: len(told["outputs"][key]["images"]) for key in previews})
    for key in (key for key, name in types.items() if name == "FMN_SaveForgetPatch"):
        saved = told["outputs"][key]["text"][0]
        assert (server.base / "output" / "forget_patches" / saved).is_file()
    seen(page, TEXTS, {key: 1 for key in types.keys() - set(cached) if types[key] in TELL})


def test_every_template_has_both_renderers_and_every_look_runs_some():
    assert all({nodes_2 for nodes_2, _ in pair} == {False, True} for pair in IN.values())
    assert all({palette for _, palette in pair} == {"dark", "light"} for pair in IN.values())
    assert {pair[0] for pair in IN.values()} == set(LOOKS)
