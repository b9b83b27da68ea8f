from dataclasses import asdict

import pytest

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import settings_of, uce
from fmn.methods.describe import describe
from fmn.patches.patch import load_patch, save_patch
from fmn.text import printable

from ..tiny import make_patch


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[2Jb\x07") == "a?[2Jb?"
    patch = make_patch()
    patch.info["concepts"][0]["name"] = "dog\x1b[2J\nforged: line"  # of a file from elsewhere
    text = describe(patch)
    assert "\x1b" not in text and "dog?[2J?forged: line" in text


def test_a_patch_in_words():
    patch = make_patch(rank=2)
    lines = describe(patch).splitlines()
    assert lines[0] == "forgets: dog (object), also puppy; van gogh (style)"
    assert "layers: 14, rank 2" in lines
    assert "loss: 2 -> 1" in lines
    patch.info["loss"]["steps"] = 35
    assert "loss: 2 -> 1 in 35 steps" in describe(patch).splitlines()


def settings_lines(method, settings):
    patch = make_patch()
    patch.info |= {"method": method, "settings": settings}
    lines = describe(patch).splitlines()
    return lines[lines.index(f"method: {method}") + 1 : -2]


def test_a_correction_names_its_anchor():
    concept = Concept("puppy", "custom", ("whelp",), ("a puppy",), anchor="dog")
    assert describe(make_patch(concepts=[concept])).startswith(
        "forgets: puppy (custom), also whelp -> dog\n"
    )


def test_settings_are_told_against_the_closest_preset():
    own = asdict(uce.PRESETS["uce-2023"])
    assert settings_lines("uce", own)[0] == "settings: as preset uce-2023"
    lines = settings_lines("uce", own | {"rank": 3})
    assert lines[:2] == ["settings: as preset uce-2023, except", "- rank 3"]
    assert not lines[2].startswith("-")


def test_former_names_of_settings_are_read():
    own = asdict(settings_of("reread-quick", {}))
    own = {"push" if name == "overshoot" else name: value for name, value in own.items()}
    assert settings_lines("reread", own)[0] == "settings: as preset reread-quick"
    lines = settings_lines("reread", own | {"push": 1.5})
    assert lines[:2] == ["settings: as preset reread-quick, except", "- overshoot 1.5"]


def test_settings_of_an_unknown_method_are_all_told():
    lines = settings_lines("theirs", {"a": 1, "b": "x\nforged: line"})
    assert lines[:3] == ["settings:", "- a 1", "- b x?forged: line"]
    many = settings_lines("theirs", {str(i): i for i in range(60)})
    assert "- 49 49" in many and "- and 10 more" in many and "- 50 50" not in many


@pytest.mark.parametrize("part", [{"anchor": 1}, {"aliases": "dog"}, {"aliases": [1]}])
def test_a_stranger_s_concept_of_other_kinds_is_refused(tmp_path, part):
    patch = make_patch()
    patch.info["concepts"][0] |= part
    path = save_patch(patch, tmp_path / "patch.safetensors")
    with pytest.raises(ForgetError, match="metadata"):
        load_patch(path)
