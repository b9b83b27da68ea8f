"""The pack as the registry has it: without tests, tools and what made the demo model."""

import json
import shutil

import pytest

from tools.publishing import packed

from .conftest import ROOT, comfyui_path, make_base
from .server import Server
from .workflows import demo_loader, saving, training


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A server with the packed files, and the folder they lie in."""
    base = make_base(tmp_path_factory.mktemp("installed"))
    folder = base / "custom_nodes" / "forget-me-not"
    folder.unlink()
    for file in packed():
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    with Server(comfyui_path(), base) as server:
        yield server, folder
    shutil.rmtree(base)


def test_the_packed_files_are_all_it_needs(installed):
    server, folder = installed
    assert not (folder / "tests").exists() and not (folder / "benchmarks").exists()
    made = server.run(demo_loader() | training() | saving("packed"))
    assert made["save"]["text"][0].endswith(".safetensors")
    templates = server.get("/workflow_templates")["forget-me-not"]
    known = server.get("/object_info")
    for name in templates:
        workflow = json.loads((folder / "example_workflows" / f"{name}.json").read_text())
        assert {each["type"] for each in workflow["nodes"]} <= known.keys() | {"MarkdownNote"}
    assert len(templates) == len(list((ROOT / "example_workflows").glob("*.json")))
