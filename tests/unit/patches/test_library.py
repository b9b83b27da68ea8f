"""The list of patches; notes, thumbnails, and what may be deleted."""

import json
import os

import pytest

from fmn.errors import ForgetError
from fmn.models.families import SD1
from fmn.patches.library import MAX_NOTES, Library
from fmn.patches.patch import save_patch

from ..shelves import files, named
from ..tiny import make_patch, rewrite


def test_what_is_listed(shelf, folders, whole):
    dog, cat = shelf.entries()
    beside = {key: dog.pop(key) for key in ("notes", "beside", "picture")}
    assert cat.pop("picture") and cat.pop("folder") == 1
    assert cat.pop("name") == "deep/er/cat.safetensors"
    assert dog.pop("folder") == 0 and dog.pop("name") == "dog.safetensors"
    assert dog == cat == {
        "size": len(whole), "date": 1777863721,
        "concepts": [["dog", "object", "", "puppy"], ["van gogh", "style", "", ""]],
        "method": "resteer", "family": "demo", "base": "f" * 32, "prediction": "epsilon",
        "rank": "1", "loss": [2.0, 1.0], "scores": {"UA": 0.97},
    }  # fmt: skip
    assert beside["notes"] == "works"
    assert beside["beside"] == ["dog.png", "dog.fmn.json", "dog.fmn-train"]
    stamp = (folders[0] / "dog.png").stat().st_mtime_ns
    assert beside["picture"] == f"{stamp:x}"  # the file beside it goes first


def test_nothing_there(tmp_path):
    assert Library([]).entries() == Library([tmp_path / "not made yet"]).entries() == []


def test_only_what_changed_is_read_again(shelf, folders, monkeypatch):
    shelf.entries()
    read = []
    real = Library.entries.__globals__["describe_file"]
    monkeypatch.setitem(
        Library.entries.__globals__, "describe_file",
        lambda path, stat: read.append(os.path.basename(path)) or real(path, stat),
    )  # fmt: skip
    shelf.entries()
    assert read == []
    cat = folders[1] / "deep" / "er" / "cat.safetensors"
    save_patch(make_patch(SD1, scope=lambda layer: layer.name.endswith("attn2.to_k")), cat)
    assert named(shelf)["deep/er/cat.safetensors"]["family"] == "sd1"
    assert read == ["cat.safetensors"]
    cat.unlink()
    assert list(named(shelf)) == ["dog.safetensors"]


def test_the_second_of_two_with_one_name_is_marked(shelf, folders, whole):
    (folders[1] / "dog.safetensors").write_bytes(whole)
    found = [(e["folder"], e.get("problem")) for e in shelf.entries() if "dog" in e["name"]]
    assert found == [(0, None), (1, "hidden")]


def test_links_are_followed_once(shelf, folders, tmp_path, whole):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.safetensors").write_bytes(whole)
    (folders[0] / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folders[0] / "round").symlink_to(folders[0], target_is_directory=True)
    (folders[0] / "itself.safetensors").symlink_to(folders[0] / "itself.safetensors")
    (folders[0] / "nowhere.safetensors").symlink_to(tmp_path / "nowhere")
    (folders[0] / "folder.safetensors").mkdir()
    assert set(named(shelf)) == {
        "dog.safetensors", "linked/far.safetensors", "deep/er/cat.safetensors",
    }  # fmt: skip


def without_format(path):
    rewrite(path, lambda tensors, metadata: metadata.pop("fmn.format"))


def changed(path, **values):
    rewrite(path, lambda tensors, metadata: metadata.update(values))


def given(**values):
    values = {f"fmn.{key}": value for key, value in values.items()}
    return lambda path: changed(path, **values)


def header(text):
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text)


PROBLEMS = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_bytes(b"not a patch at all" * 9), "damaged"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
    "huge length": (lambda path: path.write_bytes(b"\xff" * 80), "damaged"),
    "no object": (header(b"[]"), "damaged"),
    "no JSON": (header(b'{"__metadata__":{"fmn.format"'), "damaged"),
    "not UTF-8": (header(b'{"a":"\xff"}'), "damaged"),
    "deep metadata": (header(b'{"__metadata__":' + b"[" * 50_000), "damaged"),
    "deep header": (header(b'{"a":' + b"[" * 200_000), "damaged"),
    "metadata a list": (header(b'{"__metadata__":[1]}'), "damaged"),
    "metadata of numbers": (header(b'{"__metadata__":{"fmn.format":1}}'), "damaged"),
    "metadata null": (header(b'{"__metadata__":null}'), "foreign"),
    "no metadata": (header(b"{}"), "foreign"),
    "another LoRA": (without_format, "foreign"),
    "next format": (given(format="2"), "newer"),
    "concepts of numbers": (given(concepts="[1]"), "damaged"),
    "concepts no JSON": (given(concepts="<b>"), "damaged"),
    "name a list": (given(concepts='[{"name":[],"kind":"a"}]'), "damaged"),
    "loss NaN": (given(loss='{"first":NaN,"last":1,"steps":1}'), "damaged"),
    "method a list": (given(method="[]"), "damaged"),
    "scores a list": (given(scores="[]"), "damaged"),
    "measured nothing": (given(measured="{}"), "damaged"),
}


@pytest.mark.parametrize("spoil, problem", PROBLEMS.values(), ids=PROBLEMS)
def test_files_that_cannot_be_used_are_listed_with_the_reason(shelf, folders, spoil, problem):
    path = folders[0] / "dog.safetensors"
    spoil(path)
    entry = named(shelf)["dog.safetensors"]
    assert entry["problem"] == problem and entry["size"] == path.stat().st_size
    assert "concepts" not in entry


def test_a_file_that_may_not_be_read_keeps_its_notes(shelf, monkeypatch):
    def closed(path, stat):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(Library.entries.__globals__, "describe_file", closed)
    entry = named(shelf)["dog.safetensors"]
    assert (entry["problem"], entry["notes"]) == ("unreadable", "works")
    assert shelf.write_notes(0, "dog.safetensors", "new", before=entry["notes"]) == "new"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_closed_file(shelf, folders):
    (folders[0] / "dog.safetensors").chmod(0)
    assert named(shelf)["dog.safetensors"]["problem"] == "unreadable"


def test_anchor_and_aliases_are_listed(shelf, folders):
    concepts = [
        {"name": "puppy", "kind": "custom", "anchor": "dog", "aliases": ["pup", "whelp"]},
        {"name": "cat", "kind": "object"},
        {"name": "owl", "kind": "object", "anchor": "\x1b" * 999,
         "aliases": ["y" * 150, "z" * 150]},
    ]  # fmt: skip
    changed(folders[0] / "dog.safetensors", **{"fmn.concepts": json.dumps(concepts)})
    puppy, cat, owl = named(shelf)["dog.safetensors"]["concepts"]
    assert puppy == ["puppy", "custom", "dog", "pup, whelp"]
    assert cat == ["cat", "object", "", ""]
    assert owl == ["owl", "object", "?" * 200, "y" * 150 + ", " + "z" * 48]


def test_untrusted_texts_are_bounded_and_cleared(shelf, folders):
    many = [{"name": "x" * 9999 + str(i), "kind": "k\x1b[31m\u202e"} for i in range(500)]
    scores = {f"{i}\n": value for i, value in enumerate([1, "1", None, 1e999, 10**400, *[2] * 99])}
    changed(folders[0] / "dog.safetensors", **{
        "fmn.concepts": json.dumps(many), "fmn.method": json.dumps("m" * 9999),
        "fmn.base.family": "../../etc", "fmn.scores": json.dumps(scores), "fmn.date": '"soon"',
    })  # fmt: skip
    entry = named(shelf)["dog.safetensors"]
    assert len(entry["concepts"]) == 64
    assert entry["concepts"][0] == ["x" * 200, "k?[31m?", "", ""]
    assert entry["method"] == "m" * 200 and "family" not in entry
    assert entry["scores"] == {"0?": 1} | {f"{i}?": 2 for i in range(5, 16)}
    assert entry["date"] == int((folders[0] / "dog.safetensors").stat().st_mtime)
    assert len(json.dumps(entry, allow_nan=False)) < 20_000


def test_metadata_that_is_long_or_not_first(shelf, folders, whole):
    path = folders[0] / "dog.safetensors"
    changed(path, **{"modelspec.thumbnail": "x" * 200_000})
    assert named(shelf)["dog.safetensors"]["method"] == "resteer"
    length = int.from_bytes(whole[:8], "little")
    content = json.loads(whole[8 : 8 + length])
    text = json.dumps(dict(reversed(content.items()))).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert named(shelf)["dog.safetensors"]["method"] == "resteer"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"notes": 3}', "[" * 60_000, "x" * 100_000])
def test_odd_notes_count_as_none(shelf, folders, text):
    (folders[0] / "dog.fmn.json").write_text(text)
    assert named(shelf)["dog.safetensors"]["notes"] == ""


def test_notes_are_kept_and_taken_away(shelf, folders):
    text = 'two\nlines, <b>"quoted"</b>, 好'
    shelf.write_notes(1, "deep/er/cat.safetensors", text)
    assert named(shelf)["deep/er/cat.safetensors"]["notes"] == text
    shelf.write_notes(1, "deep/er/cat.safetensors", "  ")
    assert files(folders[1]) == ["deep/er/cat.safetensors"]
    shelf.write_notes(1, "deep/er/cat.safetensors", "")


def test_notes_changed_elsewhere_are_not_overwritten(shelf, folders):
    kept, name = folders[0] / "dog.fmn.json", "dog.safetensors"
    assert shelf.write_notes(0, name, "mine", before="works") == "mine"
    assert shelf.write_notes(0, name, "mine", before="works") == "mine"  # they are there already
    for before in ("works", "", 3):
        with pytest.raises(ForgetError, match="changed elsewhere meanwhile"):
            shelf.write_notes(0, name, "others", before=before)
    assert json.loads(kept.read_text()) == {"notes": "mine"}
    assert shelf.write_notes(0, name, " ", before="mine") == ""
    assert not kept.exists()
    assert shelf.write_notes(0, name, "again", before="") == "again"


@pytest.mark.parametrize("notes", [None, 3, ["a"], "x" * (MAX_NOTES + 1)])
def test_bad_notes_are_refused(shelf, notes):
    with pytest.raises(ForgetError, match="at most 4000 letters"):
        shelf.write_notes(0, "dog.safetensors", notes)


def test_thumbnail_of_the_file(shelf):
    assert shelf.picture(1, "deep/er/cat.safetensors")[:3] == b"\xff\xd8\xff"
    with pytest.raises(ForgetError, match="no readable JPEG, PNG or WebP"):
        shelf.picture(0, "dog.safetensors")  # the file beside it is none


def test_a_thumbnail_on_the_list_takes_one_look_up(shelf, monkeypatch):
    walked = []
    real = Library.entries.__globals__["_walk"]
    monkeypatch.setitem(
        Library.entries.__globals__, "_walk", lambda root: walked.append(root) or real(root)
    )
    shelf.entries()
    assert len(walked) == 2
    for _ in range(3):
        assert shelf.picture(1, "deep/er/cat.safetensors")[:3] == b"\xff\xd8\xff"
    assert len(walked) == 2


def test_a_thumbnail_of_what_has_gone(shelf, folders):
    shelf.entries()
    shelf.delete(1, "deep/er/cat.safetensors")
    with pytest.raises(ForgetError, match="There is no patch"):
        shelf.picture(1, "deep/er/cat.safetensors")
    shelf.entries()
    (folders[0] / "dog.png").unlink()
    (folders[0] / "dog.safetensors").unlink()
    with pytest.raises(ForgetError, match="thumbnail.*No such file"):
        shelf.picture(0, "dog.safetensors")


def test_no_thumbnail(shelf, folders):
    (folders[0] / "dog.png").unlink()
    rewrite(folders[0] / "dog.safetensors", lambda _, data: data.pop("modelspec.thumbnail"))
    assert "picture" not in named(shelf)["dog.safetensors"]
    with pytest.raises(ForgetError, match="has no thumbnail"):
        shelf.picture(0, "dog.safetensors")


def test_delete_takes_what_lies_beside(shelf, folders):
    beside = ["dog.png", "dog.fmn.json", "dog.fmn-train"]
    assert shelf.delete(0, "dog.safetensors") == ["dog.safetensors", *beside]
    assert files(folders[0]) == ["dog.txt"]


def test_delete_of_a_link_leaves_the_file(shelf, folders, tmp_path, whole):
    (tmp_path / "real.safetensors").write_bytes(whole)
    (folders[0] / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    shelf.delete(0, "link.safetensors")
    assert (tmp_path / "real.safetensors").read_bytes() == whole


STRANGE = [
    (0, "../secret.safetensors"), (0, "/secret.safetensors"), (0, "./dog.safetensors"),
    (0, "deep/../dog.safetensors"), (0, "dog.safetensors\0"), (0, "dog.txt"), (0, "dog.png"),
    (0, "dog"), (0, "DOG.safetensors"), (0, ""), (0, None), (0, 3), (0, ["dog.safetensors"]),
    (0, {}), (0, "..\\secret.safetensors"), (1, "dog.safetensors"), (2, "dog.safetensors"),
    (-1, "dog.safetensors"), (-2, "dog.safetensors"), (None, "dog.safetensors"),
    ("0", "dog.safetensors"), (0.0, "dog.safetensors"), (False, "dog.safetensors"),
    (0, "x" * 100_000), (1, "deep\\er\\cat.safetensors"), (1, "deep/er/"), (1, "deep"),
]  # fmt: skip


@pytest.mark.parametrize("folder, name", STRANGE, ids=lambda value: repr(value)[:40])
def test_what_is_not_listed_is_not_touched(shelf, folders, whole, folder, name):
    (folders[0].parent / "secret.safetensors").write_bytes(whole)
    before = files(folders[0].parent)
    for act in (
        shelf.delete, shelf.picture,
        lambda *given: shelf.rename(*given, "new"), lambda *given: shelf.write_notes(*given, "new"),
    ):  # fmt: skip
        with pytest.raises(ForgetError, match="There is no patch") as caught:
            act(folder, name)
        assert len(str(caught.value)) < 400
    assert files(folders[0].parent) == before


def test_a_folder_that_cannot_be_read_is_said(folders):
    loop = folders[0] / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ForgetError, match="cannot be read .Too many levels"):
        Library([loop]).entries()


def test_a_file_in_place_of_a_folder_holds_no_patches(folders):
    """As for ComfyUI; the other folders are listed."""
    shelf = Library([folders[0] / "dog.txt", folders[0]])
    assert {entry["folder"] for entry in shelf.entries()} == {1}
