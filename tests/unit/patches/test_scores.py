"""Scores in a patch's own file: the header changes, the weights do not."""

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from fmn.bench.running.cells import Setup
from fmn.errors import ForgetError
from fmn.methods.describe import describe
from fmn.patches.library_entry import describe_file
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.scores import (
    bytes_of,
    check_targets,
    scores_of,
    scores_text,
    write_scores,
)

from ..conftest import PICTURE
from .test_patch import make_patch, metadata_of

MEASURED = {
    "suite": "Demo model", "targets": ["dog"], "judge": "demo", "count": 12, "seed": 0,
    "base": "f" * 32, "setup": "0" * 12, "version": "0.1.0",
    "date": "2026-05-04T03:02:01+00:00",
}  # fmt: skip
SCORES = {"UA": 0.98, "IRA": 0.951, "M-Score": 0.4123}


@pytest.fixture
def path(tmp_path):
    return save_patch(make_patch(), tmp_path / "dog.safetensors", PICTURE)


def weights(path):
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_only_the_header_changes(path):
    before, tensors, metadata = weights(path), load_file(path), metadata_of(path)
    source = load_patch(path).source
    write_scores(source, SCORES, MEASURED)
    assert weights(path) == before
    after = load_file(path)
    assert list(after) == list(tensors) and all(after[key].equal(tensors[key]) for key in tensors)
    written = {"fmn.scores": json.dumps(SCORES), "fmn.measured": json.dumps(MEASURED)}
    assert metadata_of(path) == metadata | written and PICTURE in metadata.values()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert [item.name for item in path.parent.iterdir()] == ["dog.safetensors"]
    assert bytes_of(source) == path.read_bytes()  # it is still the patch that was loaded


def test_what_reads_a_patch_tells_them(path):
    write_scores(load_patch(path).source, SCORES, MEASURED)
    info = load_patch(path).info
    assert info["scores"] == SCORES and info["measured"] == MEASURED
    text = describe(load_patch(path))
    assert "scores: UA 98 %, IRA 95 %, M-Score 0.4123\n" in text
    assert "measured: Demo model: dog; 12 pictures a question, judge demo, base ffff" in text
    entry = describe_file(path, path.stat())
    assert entry["scores"] == SCORES and entry["measured"] == ["Demo model", ["dog"]]


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({"date": "later"}, True),
        ({"count": 8}, False),
        ({"targets": ["cat"]}, False),
        ({"setup": "1" * 12}, False),
        ({"version": "0.2.0"}, False),
    ],
)
def test_scores_that_were_measured_alike_stay(path, changes, kept):
    write_scores(load_patch(path).source, SCORES, MEASURED)
    write_scores(load_patch(path).source, {"UA": 0.5}, MEASURED | changes)
    info = load_patch(path).info
    assert info["scores"] == (SCORES if kept else {}) | {"UA": 0.5}
    assert info["measured"] == MEASURED | changes


def test_what_is_there_already_is_not_written_again(path):
    write_scores(load_patch(path).source, SCORES, MEASURED)
    before = path.stat().st_mtime_ns, path.read_bytes()
    write_scores(load_patch(path).source, {"UA": 0.98}, MEASURED | {"date": "later"})
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_another_file_of_the_same_name_gets_none(path):
    source = load_patch(path).source
    save_patch(make_patch(rank=1), path)
    before = path.read_bytes()
    with pytest.raises(ForgetError, match="'dog.safetensors' has been replaced"):
        write_scores(source, SCORES, MEASURED)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(ForgetError, match="cannot be read .No such file"):
        write_scores(source, SCORES, MEASURED)


@pytest.mark.parametrize("stripped", [None, {"title": "mine"}])
def test_a_file_whose_header_was_replaced_gets_none(path, stripped):
    """Its weights are still the same, but nothing in it says that it is a patch."""
    source = load_patch(path).source
    content = {"__metadata__": stripped} if stripped else {}
    header = json.dumps(content).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + weights(path))
    before = path.read_bytes()
    with pytest.raises(ForgetError, match="'dog.safetensors' is damaged.*load it again"):
        write_scores(source, SCORES, MEASURED)
    assert path.read_bytes() == before


def test_a_file_without_our_metadata_gets_none(path):
    source = load_patch(path).source
    save_file(load_file(path), path, {"title": "mine"})
    with pytest.raises(ForgetError, match="'dog.safetensors' has been replaced"):
        write_scores(source, SCORES, MEASURED)
    assert metadata_of(path) == {"title": "mine"}


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make links")
def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    write_scores(load_patch(link).source, SCORES, MEASURED)
    assert link.is_symlink() and load_patch(path).info["scores"] == SCORES


def test_a_failure_leaves_the_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmn.files.os.replace", full)
    with pytest.raises(ForgetError, match="could not be saved in .* .No space left"):
        write_scores(load_patch(path).source, SCORES, MEASURED)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["dog.safetensors"]


def test_a_header_without_room(path, monkeypatch):
    before = path.read_bytes()
    header = int.from_bytes(before[:8], "little")
    monkeypatch.setattr("fmn.patches.scores.MAX_HEADER", header + 8)
    with pytest.raises(ForgetError, match="has no room for scores"):
        write_scores(load_patch(path).source, SCORES, MEASURED)
    assert path.read_bytes() == before


def test_which_figures_are_taken():
    """The method's last row of means, which is that over all targets; nobody's folders."""
    values = {"UA": {"value": 0.98765}, "HM": {"value": 0.5}, "seconds": {"value": 3.0}}
    means = [
        {"method": "untouched", "targets": ["dog"], "values": {"UA": {"value": 0.0}}},
        {"method": "a", "kind": "object", "targets": ["dog"], "values": {"UA": {"value": 0.1}}},
        {"method": "a", "kind": "all", "targets": ["dog", "oil"], "values": values},
    ]
    summary = {"suite": "Mine", "version": "9", "means": means}
    setup = Setup({}, "demo", "f" * 32, "clip:/home/somebody/vit-large", count=8, seed=3)
    scores, measured = scores_of(summary, setup, "a")
    assert scores == {"UA": 0.9877, "mean": 0.5}
    date = measured.pop("date")
    assert date.startswith("20") and measured == {
        "suite": "Mine", "targets": ["dog", "oil"], "judge": "clip:vit-large", "count": 8,
        "seed": 3, "base": "f" * 32, "setup": setup.key(), "version": "9",
    }  # fmt: skip


def test_only_what_a_patch_forgets():
    info = {"concepts": [{"name": "dog"}, {"name": "oil"}]}
    check_targets("dog.safetensors", info, ["dog"])
    with pytest.raises(ForgetError, match="'dog.safetensors' does not forget 'cat'"):
        check_targets("dog.safetensors", info, ["dog", "cat"])
    with pytest.raises(ForgetError, match="another program changed its weights: import it first"):
        check_targets("dog.safetensors", info | {"changed": True}, ["dog"])


def test_untrusted_scores_are_cut_to_size():
    odd = {f"{i}": i for i in range(99)} | {"UA": 1e250}
    lines = scores_text({"scores": {"a": "1", "b": None, "UA": 1e250, "c\n": 10**400} | odd})
    (line,) = lines
    assert line == "scores: " + ", ".join(["UA 1e+250", *(f"{i} {i}" for i in range(11))])


@pytest.mark.parametrize(
    "changes",
    [{"targets": "dog"}, {"suite": 3}, {"count": "many"}, {"targets": [1]}, {"base": None}],
)
def test_an_untrusted_record_is_checked(path, changes):
    write_scores(load_patch(path).source, SCORES, MEASURED | changes)
    with pytest.raises(ForgetError, match="metadata of 'dog.safetensors'"):
        load_patch(path)
    assert describe_file(path, path.stat())["problem"] == "damaged"


@pytest.mark.parametrize("measured", [{"suite": "Demo"}, {}])
def test_a_record_that_lacks_something(path, measured):
    write_scores(load_patch(path).source, SCORES, measured)
    with pytest.raises(ForgetError, match="metadata of 'dog.safetensors' is damaged"):
        load_patch(path)
