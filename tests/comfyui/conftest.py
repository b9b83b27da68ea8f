"""A real ComfyUI: in this process for what needs its objects, as a server for what users do."""

import importlib
import importlib.util
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Error, sync_playwright

from .frontend import launched, opened, told_of
from .others import Words, make
from .server import Server
from .shelf_page import opened_shelf

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items):
    """Tests of a page get a second try, on the page loaded anew: a browser that shares few cores
    fails now and then for reasons of its own. The summary tells which, and what was seen."""
    for item in items:
        if {"page", "chromium"} & set(item.fixturenames):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    page = item.funcargs.get("page") if hasattr(item, "funcargs") else None
    if report.failed and page and hasattr(report.longrepr, "addsection"):
        report.longrepr.addsection("the page", told_of(page, item.name))
    return report


def comfyui_path():
    path = os.environ.get("COMFYUI_PATH", ROOT / ".venv-tests" / "comfyui")
    if not (Path(path) / "comfy").is_dir():
        pytest.fail(f"No ComfyUI at {path}: set COMFYUI_PATH, or run python3 tools/run.py tests.")
    return Path(path)


def make_base(folder):
    """A base directory as ComfyUI expects it, with the pack in custom_nodes."""
    for name in ("custom_nodes", "models/checkpoints", "models/loras", "input", "user/default"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "forget-me-not").symlink_to(ROOT, target_is_directory=True)
    settings = '{"Comfy.TutorialCompleted": true, "Comfy.InstalledVersion": "1.32.9"}'
    (folder / "user" / "default" / "comfy.settings.json").write_text(settings)
    return folder


# Server and browser serve all files of this folder, which run first, and end before the others.
@pytest.fixture(scope="package")
def base(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("comfyui"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def server(base):
    with Server(comfyui_path(), base) as running:
        yield running


@pytest.fixture(scope="package")
def playwright():
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="package")
def browser(playwright, tmp_path_factory):
    """A list with the Chromium that is open, if any."""
    contexts = []
    yield contexts
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(server, playwright, browser, tmp_path_factory):
    """A new page of the frontend; in a new Chromium if the last has crashed."""
    try:
        found = opened(browser[-1], server.url)
    except (IndexError, Error):
        browser[:] = [launched(playwright.chromium, tmp_path_factory.mktemp("browser"))]
        found = opened(browser[-1], server.url)
    yield found
    with suppress(Error):  # it may have crashed
        found.goto("about:blank")  # a page that nobody looks at draws all the same


@pytest.fixture
def shelf(page, server):
    """The page with the patch shelf open over a few files."""
    with opened_shelf(page, server) as opened_page:
        yield opened_page


@pytest.fixture(scope="package")
def pack(tmp_path_factory):
    """The pack loaded into this process, as ComfyUI's loader would."""
    path = str(comfyui_path())
    # First, or the pack's nodes/ would be taken for ComfyUI's nodes.py; and only for a while, as
    # other tests, and processes that they start, would take its modules for ours.
    sys.path.insert(0, path)
    importlib.import_module("utils.install_util")  # before anything else can claim the name
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(make_base(tmp_path_factory.mktemp("in_process")))
    spec = importlib.util.spec_from_file_location(
        "forget_me_not_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["forget_me_not_pack"] = module
    spec.loader.exec_module(module)
    yield lambda name: importlib.import_module(f"forget_me_not_pack.{name}")
    sys.path.remove(path)


@pytest.fixture
def demo(pack):
    """MODEL, CLIP and VAE of the demo model, made in inference mode as in a running server."""
    with torch.inference_mode():
        return pack("nodes.demo").load_demo_checkpoint()


@pytest.fixture
def short_drawings(pack, monkeypatch):
    """Pictures to train on take two steps."""
    monkeypatch.setattr(pack("fmn.methods.resteer"), "SAMPLE_STEPS", 2)
    monkeypatch.setattr(pack("fmn.methods.reread.training_images"), "DRAWING_STEPS", 2)


@pytest.fixture
def comfy_model(pack, demo):
    return pack("fmn.hosts.comfyui.model").ComfyModel(*demo)


@pytest.fixture
def other_host(pack):
    """Function from the name of a model class, and changes of its config, to a host of it."""

    def made(name, **changes):
        return pack("fmn.hosts.comfyui.unknown_model").host_of(make(name, changes), Words(name))

    return made
