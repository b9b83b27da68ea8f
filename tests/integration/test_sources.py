"""The code's hash: of what a method needs, and of no more."""

import shutil
from pathlib import Path

import pytest

import fmn
from fmn.concepts.concept import Concept
from fmn.jobs import sources
from fmn.jobs.batch import recipe
from fmn.methods import METHODS, settings_of


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Function that adds a line to a file of a copy of the package; the next hash is of that."""
    copy = tmp_path / "fmn"
    here = Path(fmn.__file__).parent
    shutil.copytree(here, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(sources, "ROOT", copy)
    sources.code_of.cache_clear()

    def change(name):
        path = copy / name
        path.write_bytes(path.read_bytes() + b"# more\n")
        sources.code_of.cache_clear()

    yield change
    sources.code_of.cache_clear()


def key(preset="uce"):
    return recipe("", Concept("dog"), settings_of(preset, {}))


NEEDED = ("methods/uce.py", "closed_form.py", "keep.py", "settings.py", "lists/everyday.txt")


@pytest.mark.parametrize("name", NEEDED)
def test_what_a_method_needs_counts(changed, name):
    before = key()
    changed(name)
    assert key() != before


def test_what_it_does_not_need_counts_not(changed):
    before = key()
    for name in ("shelf.py", "cli.py", "methods/hirm.py", "bench/lab.py"):
        changed(name)
    assert key() == before


def test_hosts_count_by_themselves(changed):
    hosts = "fmn.hosts.comfyui.unknown_model", "fmn.hosts.diffusers.model"
    before = [sources.code_of(host) for host in hosts]
    changed("hosts/comfy_text.py")
    after = [sources.code_of(host) for host in hosts]
    assert before[0] != after[0] and before[1] == after[1]


def test_line_ends_do_not_count(changed):
    before = key()
    path = sources.ROOT / "closed_form.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    sources.code_of.cache_clear()
    assert key() == before


@pytest.mark.parametrize("module", METHODS)
def test_all_that_a_method_loads_is_found(module):
    names = {
        path.relative_to(sources.ROOT).as_posix() for path in sources._needed(f"methods.{module}")
    }
    assert {f"methods/{module}.py", "settings.py", "model.py", "families.py", "patch.py"} <= names
    assert "shelf.py" not in names and not any(name.startswith("bench/") for name in names)
