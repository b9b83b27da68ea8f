"""Text files are read and written as UTF-8, whatever the locale."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "fmn", "nodes", "tools", "demo", "benchmarks"
FILES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
POSITION = {"read_text": 0, "write_text": 1}  # of the encoding among the arguments


def without_encoding(call):
    """Whether a call reads or writes text in the locale's encoding."""
    function, keywords = call.func, {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if isinstance(function, ast.Attribute) and function.attr in POSITION:
        return len(call.args) <= POSITION[function.attr]
    if not isinstance(function, ast.Name) or function.id != "open":
        return False
    mode = call.args[1] if len(call.args) > 1 else ast.Constant("r")
    return isinstance(mode, ast.Constant) and "b" not in mode.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_files_have_an_encoding(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert [call.lineno for call in calls if without_encoding(call)] == []
