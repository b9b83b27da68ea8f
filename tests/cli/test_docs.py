"""The commands and the Python of README.md and docs/ do what the pages say.

Blocks of one page run in order, in a folder and a namespace of their own, all in this process. A
block that cannot run here stands below ``<!-- not run: REASON -->``; its commands of ours are
still parsed, and its Python compiled. What a ``text`` block right below a command shows has to
come out, numbers aside. ``<!-- file: NAME -->`` makes the block below a file.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fmn.cli.main import main, parse
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- not run: (.{10,}) -->")
FILE = re.compile(r"<!-- file: ([\w.-]+) -->")
PROGRAMS = ("python", "python3", "pip", "eval-unlearn")
# Names that a page uses for what the reader has, and how much less work will do here.
GIVEN = {"training.md": ("model",), "inversion.md": ("images",)}
FASTER = {
    "training.md": {"40": "4", "80": "8", "10": "2"},
    "inversion.md": {"200": "2"},
}


class Block(NamedTuple):
    """Lines of a page.

    Attributes:
        language: "python", "text", "shell", or "file" with a name behind it.
        reason: why it is not run, or "".
    """

    language: str
    text: str
    reason: str
    line: int


def blocks(page):
    """Fenced blocks of commands, Python or output, and indented commands."""
    lines = page.read_text(encoding="utf-8").split("\n")
    found, i = [], 0
    while i < len(lines):
        start, language, text = i, None, []
        if lines[i].startswith("```"):
            language, i = lines[i][3:].strip(), i + 1
            while lines[i] != "```":
                text.append(lines[i])
                i += 1
        elif lines[i].startswith("    ") and not lines[i - 1].strip():
            while lines[i].startswith("    "):
                text.append(lines[i][4:])
                i += 1
        i += 1
        text, above = "\n".join(text), _above(lines, start)
        if (named := FILE.fullmatch(above)) and language is not None:
            found.append(Block(f"file {named[1]}", text, "", start + 1))
        elif language in ("python", "text"):
            found.append(Block(language, text, _reason(above), start + 1))
        elif any(_program(command) for command in _commands(text)):
            found.append(Block("shell", text, _reason(above), start + 1))
    return found


def _above(lines, start):
    """The line of text above a block, without the empty ones between."""
    return next((line.strip() for line in reversed(lines[:start]) if line.strip()), "")


def _reason(above):
    match = MARK.fullmatch(above)
    return match[1] if match else ""


def _commands(text):
    """Whole commands as lists of words: continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    try:
        split = [shlex.split(line, comments=True) for line in joined.split("\n")]
    except ValueError:  # an open quote: prose or a picture, no command
        return []
    return [words for words in split if words]


def _program(words):
    """The program that is called, behind variables that are set; None if it is not one of ours."""
    called = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    return called[0] if called and called[0] in PROGRAMS else None


def _ours(words):
    """The arguments of ``python -m fmn``, or None."""
    if words[1:3] == ["-m", "fmn"]:
        return words[3:]
    if words[1:3] == ["tools/run.py", "bench"]:
        return words[2:]
    return None


def _faster(page, text):
    for number, smaller in FASTER.get(page.name, {}).items():
        text = re.sub(
            rf"(?<![\w.]){number}\b|(?<=_step){number}\b|(?<=dog_){number}\b", smaller, text
        )
    return text


def _parsed(words):
    """Fail if the parser would not take a command of ours, or a script is not there."""
    arguments = _ours(words)
    if arguments is not None:
        parse(arguments)
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), word


def _shape(line):
    """A line without its numbers, times and spacing."""
    return " ".join(re.sub(r"\d[\d.,:T+e-]*|[0-9a-f]{8,}", "#", line).split())


@pytest.fixture(scope="module")
def model():
    return DiffusersModel.load("demo")


def test_every_page_is_looked_at():
    assert len(PAGES) > 25
    assert sum(len(blocks(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch, capsys, request):
    found = blocks(page)
    runs = [block for block in found if not block.reason]
    given = {"images": torch.rand(2, 128, 128, 3)}
    if runs and "model" in GIVEN.get(page.name, ()):
        given["model"] = request.getfixturevalue("model")
    namespace = {name: given[name] for name in GIVEN.get(page.name, ())}
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    shown = ""
    for block in found:
        text, place = _faster(page, block.text), f"{page.name}, line {block.line}"
        if block.language == "python":
            code = compile(text, place, "exec", dont_inherit=True)
            if not block.reason:
                exec(code, namespace)  # noqa: S102
                shown = capsys.readouterr().out
        elif block.language == "shell":
            commands = _commands(text)
            for words in commands:
                _parsed(words)
            if not block.reason:
                shown = _run(commands, place, capsys)
        elif block.language.startswith("file "):
            Path(block.language.removeprefix("file ")).write_text(text, encoding="utf-8")
        elif not block.reason:
            _compare(block.text, shown, place)


def _run(commands, place, capsys):
    for words in commands:
        arguments = _ours(words)
        assert arguments is not None and words[0] == "python", f"{place}: mark it, or run {words}"
        assert main(arguments) == 0, f"{place}: {shlex.join(words)}"
    return capsys.readouterr().out


def _compare(expected, shown, place):
    actual = [_shape(line) for line in shown.split("\n")]
    for line in expected.split("\n"):
        if line.strip() and line.strip() != "...":
            assert _shape(line) in actual, f"{place}: nothing printed looks like {line!r}"


def test_a_block_that_is_wrong_is_found(tmp_path, capsys):
    """The checks themselves can fail."""
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n    python -m fmn methods \\\n        --json\n\n"
        "<!-- not run: no -->\n\n```python\n1\n```\n"
    )
    shell, python = blocks(page)
    assert _commands(shell.text) == [["python", "-m", "fmn", "methods", "--json"]]
    assert python.reason == ""  # too short to justify anything
    with pytest.raises(ForgetError, match="no setting 'stepz'"):
        _parsed(["python", "-m", "fmn", "forget", "demo", "dog", "--stepz", "3"])
    with pytest.raises(AssertionError):
        _parsed(["python", "benchmarks/nothing.py"])
    with pytest.raises(AssertionError):
        _compare("forgets: dog (object)", "forgets: cat (object)\n", "here")
    _compare("layers: 14, rank 4\n...", "layers: 7, rank 12\n", "here")
