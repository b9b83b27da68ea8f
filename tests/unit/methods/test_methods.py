"""What holds for every method: the registry, its settings, its pages."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import (
    DEFAULT,
    DEFAULT_MANY,
    MANY,
    METHODS,
    PRESETS,
    default_settings,
    forget,
    method,
    preset_of,
    settings_of,
)
from fmn.settings import Settings, setting

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_nodes_and_command_line_need(name):
    module = method(METHODS[name][0])
    assert tuple(module.PRESETS) == METHODS[name]
    assert module.TITLE and module.ABOUT.endswith(".")
    assert callable(module.run)
    for preset, settings in module.PRESETS.items():
        assert isinstance(settings, Settings) and preset_of(settings) == preset
        assert json.loads(json.dumps(asdict(settings))) == asdict(settings)
    for each in fields(module.Settings):
        assert len(each.metadata["help"]) > 15, each.name
        assert type(each.default) in (int, float, bool, str)
        if isinstance(each.default, (int, float)) and not isinstance(each.default, bool):
            assert each.metadata["low"] <= each.default <= each.metadata["high"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_two_pages(name):
    title = "".join(word.capitalize() for word in name.split("_"))
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith("# ")
    for each in fields(method(METHODS[name][0]).Settings):
        assert f"`{each.name}`" in page, f"docs/methods/{name}.md says nothing of {each.name}"
    help_page = ROOT / "web" / "docs" / f"FMN_Method{title}.md"
    assert help_page.read_text().startswith("# ")


def test_presets():
    assert DEFAULT in PRESETS
    few = [Concept(f"thing {i}") for i in range(MANY)]
    more = [*few, Concept("one more")]
    assert default_settings(few, unet=True) == settings_of(DEFAULT, {})
    assert default_settings(more, unet=True) == settings_of(DEFAULT_MANY, {})
    assert default_settings(more, unet=False) == settings_of(DEFAULT, {})
    assert settings_of("resteer", {"steps": 7}).steps == 7
    assert preset_of(settings_of("resteer-released", {"steps": 7})) == "resteer"
    with pytest.raises(ForgetError, match="resteer has no setting 'speed': use steps, lr, rank"):
        settings_of("resteer", {"speed": 1})


def test_nothing_to_forget():
    with pytest.raises(ForgetError, match="no concept to forget"):
        forget(None, [], settings_of(DEFAULT, {}))


@pytest.mark.parametrize(
    "told, value, message",
    [
        (setting(1, "", limits=(0, 4)), 5, "x is 5: use 0 to 4"),
        (setting(1, "", limits=(0, 4)), 1.0, r"x is 1.0: it has to be like 1\."),
        (setting(1, "", limits=(0, 4)), True, "x is True"),
        (setting(1.0, "", limits=(0, 4)), float("nan"), "x is nan: use 0 to 4"),
        (setting(1.0, "", limits=(0, 4)), "1", "x is '1'"),
        (setting(64, "", limits=(0, 640, 64)), 65, "x is 65: use a multiple of 64"),
        (setting("a", "", choices="ab"), "c", "x is 'c': choose one of a, b"),
        (setting("a", ""), 3, "x is 3"),
        (setting(False, ""), 1, "x is 1: it has to be like False"),
    ],
)
def test_wrong_values(told, value, message):
    from dataclasses import make_dataclass

    made = make_dataclass("Made", [("x", type(told.default), told)], bases=(Settings,), frozen=True)
    assert made().x == told.default
    with pytest.raises(ForgetError, match=message):
        made(x=value)


def test_a_whole_number_serves_as_a_float():
    assert settings_of("uce", {"erase": 2}).erase == 2
