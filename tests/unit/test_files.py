"""Files are opened as untrusted, and written whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fmn.errors import ForgetError
from fmn.files import (
    check_file,
    checked_stem,
    chosen_files,
    file_and_strength,
    free_name,
    open_safetensors,
    write_whole,
)


@pytest.fixture
def saved(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"key": "value"})
    return tmp_path / "a.safetensors"


def test_a_sound_file_is_opened(saved):
    with open_safetensors(str(saved)) as file:
        assert list(file.keys()) == ["a"] and file.metadata() == {"key": "value"}
        assert file.get_tensor("a").equal(torch.ones(2))


@pytest.mark.parametrize(
    "spoil",
    [lambda data: b"", lambda data: b"\xff" * 40, lambda data: data[:-1], lambda data: data + b"0"],
)
def test_a_damaged_file_gives_one_sentence(saved, spoil):
    saved.write_bytes(spoil(saved.read_bytes()))
    with (
        pytest.raises(ForgetError, match=r"^'a.safetensors' is damaged .*\): make it anew\.$"),
        open_safetensors(saved, "make it anew"),
    ):
        pass


def test_a_missing_tensor_gives_the_same_sentence(saved):
    with pytest.raises(ForgetError, match="damaged.*b"), open_safetensors(saved) as file:
        file.get_tensor("b")


def test_the_header_is_bounded_before_it_is_read(saved):
    with open_safetensors(saved, max_header=200):
        pass
    with pytest.raises(ForgetError, match="at most 20 are read"), open_safetensors(saved, "", 20):
        pass


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ForgetError, match="cannot be read .*check"), open_safetensors(path):
            pass


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ForgetError, match="'file.txt' could not be saved.*No space"):
        write_whole(path, fail)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file.txt"]
    write_whole(path, lambda temporary: temporary.write_text("after"))
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file.txt"]


def test_names_are_refused_before_there_is_work_to_lose(tmp_path, saved):
    check_file(tmp_path / "new" / "b.safetensors", ".safetensors")
    assert not (tmp_path / "new").exists()
    check_file(saved, ".safetensors", replaces=True)
    for path, message in (
        (saved, "exists already"), (tmp_path, "is a folder"), (tmp_path / "b.png", "does not end"),
        (saved / "b.safetensors", "could not be saved"),
    ):  # fmt: skip
        with pytest.raises(ForgetError, match=message):
            check_file(path, ".safetensors")


def test_free_names(saved):
    assert free_name(saved.with_name("b.safetensors")).name == "b.safetensors"
    assert free_name(saved).name == "a_2.safetensors"
    saved.with_name("a_2.safetensors").touch()
    assert free_name(saved).name == "a_3.safetensors"


def test_strengths():
    assert file_and_strength("a.safetensors") == ("a.safetensors", 1.0)
    assert file_and_strength("C:\\a.safetensors:-0.5") == ("C:\\a.safetensors", -0.5)
    assert file_and_strength("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    for strength in ("nan", "101", "-inf"):
        with pytest.raises(ForgetError, match=f"is {strength}: use a number"):
            file_and_strength(f"a.safetensors:{strength}")


def test_strengths_of_a_file_on_several_lines_add_up():
    files = {"a*": ["ab", "ac"], "ab": ["ab"]}
    assert chosen_files(["a*:0.5", "ab"], files.get) == {"ab": 1.5, "ac": 0.5}
    with pytest.raises(ForgetError, match="No patch file matches 'x'"):
        chosen_files(["x"], lambda pattern: [])


@pytest.mark.parametrize(
    "name", ["a/b", "", " ", ".a", "a.", "CON", "com1.x", "a\nb", "x" * 181, None]
)
def test_names_that_some_system_refuses(name):
    with pytest.raises(ForgetError, match="name"):
        checked_stem(name, ".txt")
    assert checked_stem(" a b.TXT ", ".txt") == "a b"
