"""The shape of the code: imports run downwards, files and functions stay short, all is typed."""

import ast
import importlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Bottom to top; each package may import only from those before it (docs/architecture.md).
LAYERS = [
    "ground", "concepts", "models", "guidance", "patches", "training", "hosts", "closed_form",
    "metrics", "methods", "jobs", "bench", "cli",
]  # fmt: skip
FILES = sorted([*ROOT.glob("fmn/**/*.py"), *ROOT.glob("nodes/*.py")])
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
LINES, FUNCTION_LINES, MEDIAN_LINES = 350, 60, 10


@cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def functions_of(path):
    """(name, node) of all functions of a file, nested ones too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def public_functions(node):
    """Functions and methods that a caller outside may use, without those inside functions."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child)
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        public = is_function and not child.name.startswith("_")
        if public or (is_function and child.name in ("__init__", "__call__")):
            yield child


def modules_of(path):
    """Dotted names inside ``fmn`` that a file imports, as ("models", "families")."""
    package = path.relative_to(ROOT / "fmn").parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) + 1 - node.level]
            base = (*above, *(node.module.split(".") if node.module else ()))
            yield from ((*base, alias.name) for alias in node.names)


def layer_of(parts):
    return LAYERS.index(parts[0] if parts and parts[0] in LAYERS else "ground")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fmn/")])
def test_imports_run_downwards(name):
    path = ROOT / name
    if path.name == "__main__.py":
        return
    own = layer_of(path.relative_to(ROOT / "fmn").parent.parts)
    above = [".".join(parts) for parts in modules_of(path) if layer_of(parts) > own]
    assert not above, f"{name} imports from above: {above}"


def test_there_is_no_circle_of_imports():
    """At module level, within a package too; imports inside functions count as well."""
    files = {path.relative_to(ROOT / "fmn").with_suffix("").parts: path for path in FILES if
             path.is_relative_to(ROOT / "fmn")}  # fmt: skip
    files |= {parts[:-1]: path for parts, path in files.items() if parts[-1] == "__init__"}
    needs = {}
    for path in files.values():
        found = {m if m in files else m[:-1] for m in modules_of(path)}
        needs[path] = {files[m] for m in found if m in files and files[m] != path}
    done, open_ = set(), []

    def visit(path):
        assert path not in open_, f"circle: {[p.name for p in open_]} -> {path}"
        if path not in done:
            open_.append(path)
            for other in needs[path]:
                visit(other)
            open_.pop()
            done.add(path)

    for path in needs:
        visit(path)


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    path = ROOT / name
    assert len(path.read_text("utf-8").splitlines()) <= LINES
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions_of(path)}
    assert not {name: lines for name, lines in long.items() if lines > FUNCTION_LINES}


def test_most_functions_are_a_few_lines():
    lengths = [f.end_lineno - f.lineno + 1 for path in FILES for f in functions_of(path)]
    assert median(lengths) <= MEDIAN_LINES


@pytest.mark.parametrize("name", NAMES)
def test_public_functions_are_typed(name):
    untyped = []
    for function in public_functions(tree_of(ROOT / name)):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        missing = [a.arg for a in arguments if a and not a.annotation]
        missing = [each for each in missing if each not in ("self", "cls")]
        returns = function.returns or function.name == "__init__"
        if missing or not returns:
            untyped.append(f"{function.name}({', '.join(missing)})")
    assert not untyped


PROGRAMS = sorted(
    path for name in ("benchmarks", "demo", "tools") for path in ROOT.glob(f"{name}/**/*.py")
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_programs_import_names_that_are_there(path):
    """Programs that no test runs keep up with the package. (ComfyUI's part needs ComfyUI.)"""
    for node in ast.walk(tree_of(path)):
        source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if source.startswith("fmn") and not source.startswith("fmn.hosts.comfyui"):
            module = importlib.import_module(source)
            for name in (each.name for each in node.names):
                is_module = hasattr(module, "__path__") and find_spec(f"{source}.{name}")
                assert hasattr(module, name) or is_module, f"{source} has no {name}"
