"""A hash of the code that makes a patch: older code may have made another."""

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def code_of(module):
    """The hash of a module of this package, of all that it imports from it, and of the lists of
    words: 64 hex digits. Comments count, other packages do not.

    Args:
        module: its ``__name__``. Of one of another package the hash is that of the lists.
    """
    files = {
        *_needed(module.removeprefix(f"{__package__.rpartition('.')[0]}.")),
        *(ROOT / "concepts" / "lists").glob("*.txt"),
    }
    digest = hashlib.sha256()
    for path in sorted(files):
        text = path.read_text("utf-8")  # lines end alike, whatever the checkout
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(text)} {text}".encode())
    return digest.hexdigest()


def _needed(module):
    """Files of a module, "methods.uce", and of what it imports, also later and by functions."""
    found, left = set(), [_file(module.split("."))]
    while left:
        path = left.pop()
        if path is not None and path not in found:
            found.add(path)
            left += map(_file, _imported(path))
    return found


def _file(parts):
    path = ROOT.joinpath(*parts)
    places = path.with_suffix(".py"), path / "__init__.py"
    return next((place for place in places if place.is_file()), None)


def _imported(path):
    """Names, in parts, that may be modules: ``from .a import b`` gives a and a.b."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) + 1 - node.level]
            base = *above, *(node.module.split(".") if node.module else ())
            yield from (base, *((*base, name.name) for name in node.names))
