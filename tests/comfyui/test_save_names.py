"""Names that Save Forget Patch and others take, with what ComfyUI's own savers replace."""

from datetime import datetime

import pytest


@pytest.fixture
def node(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return pack("nodes.patch")


@pytest.mark.parametrize(
    "prefix, pattern",
    [
        ("%year%-%month%-%day%", "%Y-%m-%d"),
        ("a/%year%/%month%/dog", "a/%Y/%m/dog"),
        ("%date:yyyy-MM-dd%", "%Y-%m-%d"),
        ("%date:yy/MM%/%day%_dog", "%y/%m/%d_dog"),
        ("Mr. T", "Mr. T"),
        ("100% dog", "100%% dog"),
    ],
)
def test_dates_are_written_out(node, tmp_path, prefix, pattern):
    expected = {f"{datetime.now().strftime(pattern)}_00001.safetensors"}
    made = node.output_path(prefix).relative_to(tmp_path / "forget_patches").as_posix()
    assert made in expected | {f"{datetime.now().strftime(pattern)}_00001.safetensors"}
    assert list(tmp_path.iterdir()) == []


def test_letters_of_a_date(node):
    moment = datetime(2031, 2, 3, 4, 5, 6)
    assert node._formatted("yyyy yy M MM d dd h hh m mm s ss", moment) == (
        "2031 31 2 02 3 03 4 04 5 05 6 06"
    )


@pytest.mark.parametrize("prefix", ["a:b", "con/dog", "dog?", "a./dog", "%date:hh:mm%", "NUL"])
def test_names_that_windows_cannot_have(node, pack, prefix):
    with pytest.raises(pack("fmn.errors").ForgetError, match="cannot be used on every system"):
        node.output_path(prefix)


def test_a_date_leads_nowhere_else(node, pack):
    for prefix in ("../%year%", "%date:../../yyyy%"):
        with pytest.raises(pack("fmn.errors").ForgetError, match="leads out of"):
            node.output_path(prefix)
