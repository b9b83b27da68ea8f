"""Say whether this commit is to be published: python tools/publishing.py

Prints publish=true if the version in pyproject.toml is another one than a commit before, else
publish=false. A new version without the addresses that the registry shows is an error.
"""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = (("project", "urls", "Repository"), ("tool", "comfy", "Icon"))


def left_out(path):
    """Whether .comfyignore keeps a file from the registry; its last line that fits counts."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    name, out = path.relative_to(ROOT).as_posix(), False
    above = [name, *(parent.as_posix() for parent in Path(name).parents)]
    for line in lines:
        pattern = line.removeprefix("!").rstrip("/")
        if not line.startswith("#") and any(fnmatch(each, pattern) for each in above):
            out = not line.startswith("!")
    return out


def packed():
    """The files of this checkout that the registry gets."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [file for file in files if file.is_file() and not left_out(file)]


def lacking(config):
    """Names of the addresses that pyproject.toml does not have, or not as https."""
    names = []
    for path in ADDRESSES:
        value = config
        for part in path:
            value = value.get(part, {})
        if not str(value).startswith("https://"):
            names.append(".".join(path))
    return names


def is_new(config, before):
    """Whether the version changed; ``before`` is None in a repository's first commit."""
    return before is None or config["project"]["version"] != before["project"]["version"]


def decision(config, before):
    """'true' or 'false'; exits with a sentence if a new version cannot be published."""
    if not is_new(config, before):
        return "false"
    if lacking(config):
        sys.exit(
            f"pyproject.toml lacks {' and '.join(lacking(config))}, as https addresses: fill them "
            "in before a new version is published."
        )
    return "true"


def main():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shown = subprocess.run(
        ["git", "show", "HEAD^:pyproject.toml"], cwd=ROOT, capture_output=True, text=True
    )
    before = tomllib.loads(shown.stdout) if shown.returncode == 0 else None
    print(f"publish={decision(config, before)}")


if __name__ == "__main__":
    main()
