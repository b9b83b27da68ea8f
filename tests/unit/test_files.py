"""Files are opened as untrusted, and written whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fmn.downloads import first_bytes
from fmn.errors import ForgetError
from fmn.files import (
    check_file,
    check_parts,
    check_portable,
    check_texts,
    check_weights,
    checked_stem,
    chosen_files,
    file_and_strength,
    free_name,
    matching_files,
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


STAND_INS = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*pull"),
    "page": (b"<!DOCTYPE html><html>", "web page"),
    "page with a mark": (b"\xef\xbb\xbf\n <HTML lang=en>", "web page"),
    "page in UTF-16": ("<html>".encode("utf-16"), "web page"),
    "comment first": (b"<!-- saved --><html>", "web page"),
    "answer": (b'{"error":"Unauthorized"}', "server's error message"),
    "words": (b"Entry not found", "server's error message"),
    "no access": (b"Access to model x/y is restricted.", "server's error message"),
}


@pytest.mark.parametrize("content, message", STAND_INS.values(), ids=STAND_INS)
def test_what_was_saved_in_place_of_a_file_is_named(saved, content, message):
    saved.write_bytes(content)
    for read in (first_bytes, check_weights, lambda path: open_safetensors(path).__enter__()):
        with pytest.raises(ForgetError, match=f"^'a.safetensors' is an? .*{message}"):
            read(saved)


OTHER_KINDS = {
    "empty": (b"", "it is empty"),
    "torch": (b"PK\x03\x04" + bytes(99), "it is a torch file"),
    "pickle": (b"\x80\x02}q\0" + bytes(99), "it is a pickle"),
    "GGUF": (b"GGUF\3" + bytes(99), "it is a GGUF file"),
    "macOS": (b"\0\5\x16\7\0\2\0\0Mac OS X", "what macOS keeps"),
    "text": (b"I am a text file", "does not begin like one"),
    "cut header": (lambda data: data[:30], "does not fit its 30 bytes: it may be cut off"),
    "cut data": (lambda data: data[:-1], "it may be cut off"),
}


@pytest.mark.parametrize("content, message", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_other_files_and_cut_off_ones_are_named(saved, content, message):
    saved.write_bytes(content if isinstance(content, bytes) else content(saved.read_bytes()))
    with pytest.raises(ForgetError, match=f"damaged or not a safetensors file .*{message}"):
        check_weights(saved)


def test_torch_files_are_checked_to_their_end(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(9)}, path)
    check_weights(path)
    for content in (path.read_bytes()[:-30], b""):
        path.write_bytes(content)
        with pytest.raises(ForgetError, match="a.ckpt' is empty or cut off"):
            check_weights(path)


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "vae/a.safetensors"])
def test_parts_of_a_folder_are_checked(tmp_path, saved, name):
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    check_parts(tmp_path)
    check_texts(tmp_path)
    (tmp_path / name).write_bytes(STAND_INS["LFS"][0])
    check = check_parts if name.endswith(".safetensors") else check_texts
    with pytest.raises(ForgetError, match=f"'{name.rpartition('/')[2]}' is a Git LFS pointer"):
        check(tmp_path)


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


@pytest.mark.parametrize(
    "name, better",
    [
        ("Mr. T", "Mr. T.safetensors"), ("v1.5", "v1.5.safetensors"), ("dog", "dog.safetensors"),
        ("dog.pt", "dog.safetensors"), ("dog.CKPT", "dog.safetensors"),
    ],
)  # fmt: skip
def test_a_name_with_another_ending_gets_a_better_one(tmp_path, name, better):
    with pytest.raises(ForgetError, match=f"name it {better}\\.$"):
        check_file(tmp_path / name, ".safetensors")


NOT_PORTABLE = "CON", "aux.txt", "com1.tar.gz", "a.", "a ", "a:b", "a*", "wh?t", 'a"b', "a|b", "a<b"


@pytest.mark.parametrize("name", NOT_PORTABLE)
def test_names_that_windows_cannot_have(tmp_path, name):
    with pytest.raises(ForgetError, match="cannot be used on every system"):
        check_portable(name)
    with pytest.raises(ForgetError, match="cannot be used on every system"):
        check_file(tmp_path / name / "b.safetensors", ".safetensors")
    for folder in ("Mr. T and con", "caf\u00e9\u00a0\u200d\u732b"):
        check_file(tmp_path / folder / "B.SAFETENSORS", ".safetensors")


def test_files_that_exist_may_have_any_name(tmp_path):
    (tmp_path / "a:b").mkdir()
    check_file(tmp_path / "a:b" / "c.safetensors", ".safetensors")


def test_patterns_in_folders_with_brackets(tmp_path):
    for name in ("run [1]/a.safetensors", "run [1]/B.SAFETENSORS", "run 1/c.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run [1]" / "._a.safetensors").touch()

    def names(pattern):
        return [file.name for file in matching_files(str(tmp_path / pattern), ".safetensors")]

    assert names("run [1]/*") == ["B.SAFETENSORS", "a.safetensors"]
    assert names("run [12]/*") == ["c.safetensors"]
    assert names("run [1]/a.safetensors") == ["a.safetensors"]
    assert names("run [3]/*") == [] and names("none") == ["none"]


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
