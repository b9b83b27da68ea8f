"""A normal installation, not an editable one, has all that the commands need."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import fmn
from fmn.bench.running.lab import demo_controls, read_controls
from fmn.hosts.diffusers.open import open_model
from fmn.metrics.load import load_judge

families = [open_model(name).family.title for name in ("demo", "demo-dit")]
judges = [sorted(load_judge(name).labels) for name in ("demo", "demo:2")]
controls = sorted(read_controls(demo_controls()))
print(json.dumps([fmn.__file__, families, judges, controls]))
"""


def run(wheel, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=wheel, capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHONPATH": str(wheel)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_wheel_holds_the_demo_models_their_judges_and_controls(wheel):
    place, families, judges, controls = json.loads(run(wheel, "-c", PROGRAM))
    assert Path(place).is_relative_to(wheel) and families[1] == "Flux.1"
    assert judges[0] == judges[1] and controls == ["accordion", "kangaroo"]
    (scripts,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "fmn = fmn.cli.main:main" in scripts.read_text()


def test_a_wheel_holds_every_data_file(wheel):
    data = [path for path in (ROOT / "fmn").rglob("*") if path.is_file() and path.suffix not in
            (".py", ".pyc")]  # fmt: skip
    assert data and all((wheel / path.relative_to(ROOT)).is_file() for path in data)


def test_the_program_runs_from_a_wheel(wheel):
    merged = wheel / "merged.safetensors"
    run(wheel, "-m", "fmn", "merge", ROOT / "demo/patches/santa_claus.safetensors", "--out", merged)
    run(wheel, "-m", "fmn", "apply", "demo", merged, "--checkpoint", wheel / "safe.safetensors")
    assert (wheel / "safe.safetensors").stat().st_size > 40_000_000
