"""Where models/ cannot be written: patches come from the pack and go to output/.

A file lies where models/forget_patches would be, so that nobody, not even root, can make or list
the folder.
"""

import pytest

from .conftest import comfyui_path, make_base
from .server import Server
from .test_batch import batch, files
from .workflows import demo_loader, drawing, node, saving, training

BLOCKED = "forget_patches", "forget_suites"


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("blocked") / "base")
    for name in BLOCKED:
        (base / "models" / name).write_text("a file where a folder would be")
    with Server(comfyui_path(), base) as running:
        yield running


def below_models(server):
    return sorted((server.base / "models").rglob("*"))


def test_everything_but_writing_there_works(blocked):
    before = below_models(blocked)
    info = blocked.get("/object_info/FMN_LoadForgetPatch")["FMN_LoadForgetPatch"]
    assert "demo/santa_claus.safetensors" in str(info["input"])
    assert blocked.get("/object_info/FMN_ConceptBench")

    outputs = blocked.run(demo_loader() | training() | saving("dog"))
    name = outputs["save"]["text"][0]
    assert (blocked.base / "output" / "forget_patches" / name).is_file()
    load = {
        "load": node("FMN_LoadForgetPatch", file=name),
        "apply": node("FMN_ApplyForgetPatch", model=["demo", 0], patch=["load", 0], strength=1.0),
    }
    assert blocked.run(demo_loader() | load | drawing(["apply", 0]))["image"]["images"]

    report = blocked.run(batch("many", "dog\ncat", keep_list="none"))["batch"]["text"][0]
    assert report.startswith("2 of 2 concepts have a patch"), report
    assert len(files(blocked, "many")) == 2

    shelf = {entry["name"] for entry in blocked.get("/forget-me-not/shelf")["patches"]}
    assert name in shelf and len(shelf) == 3
    assert below_models(blocked) == before
