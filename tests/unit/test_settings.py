"""Settings: their limits, and the names that files and commands of version 0.1 hold."""

from dataclasses import fields

import pytest

from fmn.cli.options import Parser, add_settings, given_options
from fmn.errors import ForgetError
from fmn.methods import METHODS, method, settings_of

FORMERLY = {
    "push": 0.5, "push_style": 1.5, "robust_push": 2.0, "kept": 7, "together": 2, "drawn": 3,
    "places": 5,
}  # fmt: skip
TODAY = {
    "overshoot": 0.5, "overshoot_style": 1.5, "robust_overshoot": 2.0, "keep_prompts": 7,
    "words_per_prompt": 2, "images_per_concept": 3, "query_positions": 5,
}  # fmt: skip


def test_former_names_are_read():
    assert settings_of("reread", FORMERLY) == settings_of("reread", TODAY)
    assert settings_of("reread-many", {"kept": 9}).keep_prompts == 9
    assert method("reread").Settings.current(FORMERLY | {"rank": 2}) == TODAY | {"rank": 2}


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(ForgetError, match="push, overshoot.*twice"):
        settings_of("reread", {"push": 1.0, "overshoot": 1.0})
    with pytest.raises(ForgetError, match="no setting 'kept'"):
        settings_of("uce", {"kept": 9})


def test_the_command_line_takes_former_names_without_listing_them():
    parser = Parser()
    add_settings(parser, settings_of("reread", {}))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in FORMERLY.items()]
    assert given_options(parser.parse_args(words)) == TODAY
    assert "--overshoot " in parser.format_help()
    assert "--push" not in parser.format_help() and "--kept" not in parser.format_help()


@pytest.mark.parametrize("name", METHODS)
def test_a_node_shows_five_settings_at_most(name):
    described = fields(method(METHODS[name][0]).Settings)
    shown = [field.name for field in described if not field.metadata["advanced"]]
    assert 1 <= len(shown) <= 5
    former = [field.metadata["formerly"] for field in described if field.metadata["formerly"]]
    assert len(set(former)) == len(former)
    assert not set(former) & {field.name for field in described}
