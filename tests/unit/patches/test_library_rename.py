"""New names for the files of a patch."""

import os

import pytest

from fmn.errors import ForgetError
from fmn.patches.library import Library

from ..shelves import files, named


@pytest.mark.parametrize("to", ["a new one", "a new one.safetensors", "  a new one.SafeTensors "])
def test_rename_takes_what_lies_beside(shelf, folders, whole, to):
    assert shelf.rename(0, "dog.safetensors", to) == "a new one.safetensors"
    assert files(folders[0]) == [
        "a new one.fmn-train", "a new one.fmn.json", "a new one.png", "a new one.safetensors",
        "dog.txt",
    ]  # fmt: skip
    assert (folders[0] / "a new one.safetensors").read_bytes() == whole
    assert named(shelf)["a new one.safetensors"]["notes"] == "works"


def test_rename_stays_in_its_folder(shelf, folders):
    assert shelf.rename(1, "deep/er/cat.safetensors", "v1.5") == "deep/er/v1.5.safetensors"
    assert files(folders[1]) == ["deep/er/v1.5.safetensors"]


@pytest.mark.parametrize("taken", ["cat.safetensors", "cat.png", "cat.fmn.json"])
def test_rename_overwrites_nothing(shelf, folders, taken):
    (folders[0] / taken).write_text("mine")
    before = files(folders[0])
    with pytest.raises(ForgetError, match=f"There is a file '{taken}' already"):
        shelf.rename(0, "dog.safetensors", "cat")
    assert files(folders[0]) == before and (folders[0] / taken).read_text() == "mine"


@pytest.fixture
def one_case(monkeypatch):
    """Upper and lower case are one for names of files, as on Windows and macOS: to what makes
    new files and compares them, which is all that matters to a rename."""
    real = os.path.samefile

    def taking(path, mode):
        if path.name.lower() in (name.lower() for name in os.listdir(path.parent)):
            raise FileExistsError(17, "File exists", str(path))
        return open(path, mode)

    def same(source, target):
        names = {name.lower(): name for name in os.listdir(target.parent)}
        return real(source, target.with_name(names.get(target.name.lower(), target.name)))

    monkeypatch.setitem(Library.rename.__globals__, "open", taking)
    monkeypatch.setattr(os.path, "samefile", same)


def test_rename_changes_the_case_where_case_is_one(shelf, folders, whole, one_case):
    (folders[0] / "cat.safetensors").write_bytes(b"mine")
    for taken in ("CAT", "dog"):
        with pytest.raises(ForgetError, match="There is a file .* already"):
            shelf.rename(0, "dog.safetensors", taken)
    assert shelf.rename(0, "dog.safetensors", "Dog") == "Dog.safetensors"
    assert files(folders[0]) == [
        "Dog.fmn-train", "Dog.fmn.json", "Dog.png", "Dog.safetensors", "cat.safetensors", "dog.txt",
    ]  # fmt: skip
    assert (folders[0] / "Dog.safetensors").read_bytes() == whole


def test_rename_is_all_or_nothing(shelf, folders, whole, monkeypatch):
    real, calls = os.replace, []

    def fails_at_the_patch(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", fails_at_the_patch)
    before = files(folders[0])
    with pytest.raises(ForgetError, match="could not be renamed .Permission denied"):
        shelf.rename(0, "dog.safetensors", "cat")
    assert files(folders[0]) == before
    assert (folders[0] / "dog.safetensors").read_bytes() == whole


BAD_TO = [
    None, 3, ["a"], "", " ", ".", "..", ".hidden", ".safetensors", "a/b", "../b", "/etc/passwd",
    "a\\b", "..\\b", "C:b", "a\0b", "a\nb", "a\tb", "\u202ea", "a*", "a?", 'a"', "a<b", "a|b",
    "con", "NUL.txt", "com1.safetensors", "ends.", "x" * 181, "好" * 61, "\udc80",
]  # fmt: skip


@pytest.mark.parametrize("to", BAD_TO, ids=repr)
def test_bad_new_names_are_refused_in_one_sentence(shelf, folders, to):
    before = files(folders[0].parent)
    with pytest.raises(ForgetError) as caught:
        shelf.rename(0, "dog.safetensors", to)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 300
    assert files(folders[0].parent) == before
