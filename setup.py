"""Puts the demo model, its judges and its control pictures into a wheel; all else of the build is
in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DEMO = Path(__file__).parent / "demo"


class BuildWithDemo(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the package finds them in the clone
            return
        target = Path(self.build_lib) / "fmn" / "assets" / "demo"
        for file in [*DEMO.glob("*.safetensors"), *DEMO.glob("controls/*.png")]:
            copy = target / file.relative_to(DEMO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithDemo})
