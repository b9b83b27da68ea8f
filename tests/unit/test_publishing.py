"""What ComfyUI's registry takes: metadata, pictures, and which files it leaves out."""

import copy
import re

import pytest
import tomllib
import yaml
from PIL import Image

from tools import artwork
from tools.publishing import ROOT, decision, left_out

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = (
    "__init__.py", "LICENSE", "NOTICE", "README.md", "docs", "example_workflows", "fmn",
    "install.py", "locales", "nodes", "pyproject.toml", "requirements.txt", "subgraphs", "web",
    "tools/run.py", "demo/README.md", "demo/fmn-demo.safetensors",
    "demo/fmn-demo-judges.safetensors", "demo/controls", "demo/patches",
)  # fmt: skip
UNNEEDED = "tests", "benchmarks", "CONTRIBUTING.md", "demo/train.py", "tools/chinese.json"


def test_metadata_as_the_registry_wants_it():
    project, comfy = CONFIG["project"], CONFIG["tool"]["comfy"]
    assert re.fullmatch(r"[a-z]([a-z0-9]|[-_.](?=[a-z0-9])){1,98}", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and comfy["PublisherId"] and comfy["DisplayName"]
    assert comfy["requires-comfyui"] == ">=0.3.75"


def test_only_what_nobody_needs_is_left_out():
    for name in NEEDED:
        path = ROOT / name
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        assert files and not [each for each in files if left_out(each)]
    assert all((ROOT / name).exists() and left_out(ROOT / name) for name in UNNEEDED)


def test_workflows_run_nothing_that_may_change_beside_the_secret():
    """Only actions of GitHub itself, read permission, and a pinned publisher."""
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert "permissions" not in job
            for step in job["steps"]:
                assert step.get("uses", "actions/").startswith("actions/")
                if "pip install" in step.get("run", ""):
                    assert re.fullmatch(r"pip install [\w-]+==[\d.]+", step["run"])


@pytest.mark.parametrize("name, make", [("icon", artwork.icon), ("banner", artwork.banner)])
def test_pictures_are_those_of_the_program(name, make):
    path = ROOT / "web" / f"{name}.png"
    assert path.stat().st_size < 60_000
    stored, made = Image.open(path), make()
    assert stored.size == made.size == {"icon": (400, 400), "banner": (1260, 540)}[name]
    # Another Pillow may round edges otherwise, and the banner has few colours.
    small = [each.convert("RGB").resize((40, 40)).tobytes() for each in (stored, made)]
    assert max(abs(a - b) for a, b in zip(*small)) < 16


def told(version, **addresses):
    config = copy.deepcopy(
        {"project": CONFIG["project"], "tool": {"comfy": CONFIG["tool"]["comfy"]}}
    )
    config["project"] |= {"version": version, "urls": {}}
    if "repository" in addresses:
        config["project"]["urls"]["Repository"] = addresses["repository"]
    if "icon" in addresses:
        config["tool"]["comfy"]["Icon"] = addresses["icon"]
    return config


def test_nothing_is_published_without_a_new_version():
    assert decision(told("1.0.0"), told("1.0.0")) == "false"


def test_a_new_version_is_published_with_its_addresses():
    config = told("1.0.1", repository="https://a.example/b", icon="https://a.example/icon.png")
    assert decision(config, told("1.0.0")) == "true"
    assert decision(config, None) == "true"


def test_a_new_version_without_an_address_is_refused():
    config = told("1.0.1", icon="web/icon.png")
    with pytest.raises(SystemExit, match="lacks project.urls.Repository and tool.comfy.Icon"):
        decision(config, told("1.0.0"))
