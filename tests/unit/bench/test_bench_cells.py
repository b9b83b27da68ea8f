"""Cells: their keys, their order, and what names a method."""

from dataclasses import dataclass, field, replace

import pytest

from fmn import __version__
from fmn.bench.running.cells import (
    Cell,
    Setup,
    given,
    parse_method,
    plan,
    shuffled_concepts,
    trained,
)
from fmn.bench.suite import parse_suite
from fmn.errors import ForgetError
from fmn.methods import PRESETS, method, preset_of, settings_of
from fmn.methods.resteer import RELEASED, Settings
from fmn.patches.patch import save_patch

from ..tiny import make_patch
from ..worlds import data, make_setup

SUITE = parse_suite(data(), "little")


def test_a_key_changes_with_everything_that_matters():
    setup, cell = make_setup(), Cell("pictures", "resteer", {"preset": "resteer"}, ("dog",))
    changed = [
        (setup, replace(cell, work="rungs")),
        (setup, replace(cell, settings={"preset": "other"})),
        (setup, replace(cell, targets=("cat",))),
        (setup, replace(cell, needs=("x",))),
        (setup, replace(cell, options={"a": 1})),
        (replace(setup, fingerprint="g"), cell),
        (replace(setup, judge="other"), cell),
        (replace(setup, judges="h"), cell),
        (replace(setup, count=5), cell),
        (replace(setup, seed=1), cell),
        (replace(setup, suite=data(far=["cat"])), cell),
    ]
    keys = {one.key(world) for world, one in changed}
    assert len(keys) == len(changed) and cell.key(setup) not in keys


def test_a_key_does_not_change_with_where_files_lie():
    setup, cell = make_setup(), Cell("pictures", "resteer", {}, ("dog",))
    assert cell.key(setup) == cell.key(replace(setup, model="elsewhere"))
    assert cell.key(setup) == cell.key(replace(setup, controls="elsewhere"))
    one, other = (replace(setup, judge=f"clip:{place}") for place in ("/a", "/b"))
    assert cell.key(one) == cell.key(other) != cell.key(setup)


def test_a_setup_s_key():
    """As a cell's: all that decides numbers, and no place of a file."""
    key = (setup := make_setup()).key()
    changes = [{"fingerprint": "g"}, {"judge": "other"}, {"judges": "h"}, {"check": "c"},
               {"count": 5}, {"seed": 1}, {"prediction": "v_prediction"},
               {"suite": data(far=["cat"])},
               {"suite": data(sampling={"steps": 3, "guidance": 2})}]  # fmt: skip
    keys = {replace(setup, **change).key() for change in changes}
    assert len(key) == 12 and len(keys) == len(changes) and key not in keys
    assert key == replace(setup, model="elsewhere", controls="elsewhere", vae="elsewhere").key()
    keys = {
        ending: [replace(setup, judge=f"clip:{place}{ending}").key() for place in ("/a", "/b")]
        for ending in ("", "+nudenet")
    }
    assert all(one == other for one, other in keys.values()) and keys[""] != keys["+nudenet"]


def test_keys_are_those_of_stores_that_exist():
    """Also the same in every process and on every platform."""
    setup = Setup(
        suite={"name": "s"}, model="demo", fingerprint="f" * 32, judge="demo", check="demo:2",
        controls="/x", judges="j", count=9, seed=3,
    )  # fmt: skip
    cell = Cell("pictures", "uce", {"preset": "uce", "settings": {"a": 1}}, ("dog",), ("x",))
    assert setup.key() == "2391ce91fd1e"
    if __version__ == "0.1.0":
        assert cell.key(setup) == "713e5686a3f179355037e21990338cc2"
        assert replace(cell, work="train").key(setup) == "9acb20d32963a5a322f0ceb8ca853cbe"


def test_a_method_s_new_revision_makes_new_cells(monkeypatch):
    def keys():
        cells = plan(make_setup(), SUITE, ["dog"], [parse_method("uce")], ("pictures",))
        return [cell.key(make_setup()) for cell in cells]

    before = keys()
    assert "revision" not in parse_method("uce").settings  # as in stores that are older
    monkeypatch.setattr(method("uce"), "REVISION", 2)
    after = keys()
    assert after[0] == before[0]  # the untouched model's pictures
    assert not set(after[1:]) & set(before[1:])


def test_a_renamed_setting_keeps_its_former_name_in_cells():
    @dataclass(frozen=True)
    class Renamed:
        overshoot: float = field(default=0.5, metadata={"formerly": "push"})
        steps: int = 3

    assert trained("m", "uce", Renamed()).settings["settings"] == {"push": 0.5, "steps": 3}


def test_a_plan_lists_what_others_need_first():
    setup = make_setup()
    cells = plan(setup, SUITE, ["dog", "light"], [parse_method("resteer")], ("pictures", "rungs"))
    assert [(c.work, c.method, c.targets[0]) for c in cells] == [
        ("pictures", "untouched", "dog"),
        ("rungs", "untouched", "dog"),
        ("pictures", "untouched", "light"),
        ("rungs", "untouched", "light"),
        ("train", "resteer", "dog"),
        ("pictures", "resteer", "dog"),
        ("rungs", "resteer", "dog"),
        ("train", "resteer", "light"),
        ("pictures", "resteer", "light"),
        ("rungs", "resteer", "light"),
    ]
    assert cells[5].needs == (cells[4].key(setup),) and cells[0].needs == ()


def test_scale_uses_each_patch_once():
    setup = make_setup()
    cells = plan(setup, SUITE, ["dog"], [parse_method("resteer")], (), ("many", "sequence"))
    order = shuffled_concepts(SUITE)
    assert sorted(order) == ["cat", "dog", "old man"]  # the far ones stay
    assert [c.targets for c in cells if c.work == "many"] == [tuple(order[:1])]
    first, second = (c.targets for c in cells if c.work == "sequence")
    assert first == tuple(order) == second[::-1]


def test_methods_by_name():
    named = parse_method("resteer:steps=100,lr=0.5,full_weights=true,layers=unet")
    assert named.settings["preset"] == "resteer" and named.patch is None
    chosen = named.settings["settings"]
    assert (chosen["steps"], chosen["lr"], chosen["full_weights"]) == (100, 0.5, True)
    assert chosen["layers"] == "unet" and chosen["rank"] == Settings().rank
    assert parse_method("resteer-released").settings["settings"]["lr"] == RELEASED.lr


def test_methods_that_are_files(tmp_path):
    path = save_patch(make_patch(), tmp_path / "dog.safetensors")
    made = parse_method(f"{path}:-0.5")
    assert made.name == "dog.safetensors:-0.5" and made.settings["strength"] == -0.5
    assert made.patch == path.read_bytes()
    assert given("x", made.patch).settings["sha256"] == made.settings["sha256"]


@pytest.mark.parametrize(
    "text, told",
    [
        ("nosuch", "There is no method 'nosuch'"),
        ("nosuch.safetensors:0.5", "There is no patch file 'nosuch.safetensors'"),
        ("resteer:steps", "is not a setting"),
        ("resteer:speed=1", "has no setting 'speed'"),
        ("resteer:steps=many", "steps is 'many': it has to be like 100"),
        ("resteer:steps=1.5", "is 1.5"),
        ("resteer:steps=true", "is True"),
        ("resteer:full_weights=1", "is 1"),
        ("resteer:layers=all", "layers is 'all'"),
        ("resteer:steps=0", "steps is 0"),
        ("resteer:lr=[1]", "is [1]"),
        ("", "There is no method ''"),
    ],
)
def test_methods_that_are_none(text, told):
    with pytest.raises(ForgetError) as caught:
        parse_method(text)
    assert told in str(caught.value)


def test_a_file_that_is_no_patch_is_refused_before_the_run(tmp_path):
    path = tmp_path / "no.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ForgetError, match="not a safetensors"):
        parse_method(str(path))


def test_presets_know_their_settings():
    for name in PRESETS:
        settings = settings_of(name, {})
        assert preset_of(settings) == name
        assert callable(method(name).run)
    assert preset_of(Settings(steps=7)) == "resteer"
    assert trained("mine", "resteer", Settings(steps=7)).settings["settings"]["steps"] == 7
