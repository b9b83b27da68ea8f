"""Suites: what they say, and every way in which a file can be wrong."""

import pytest

from fmn.bench.measures.attacks import attack_prompt
from fmn.bench.measures.trial import Ask
from fmn.bench.suite import KINDS, PROBES, SUITES, load_suite, parse_suite, read_suite
from fmn.errors import ForgetError

from ..worlds import data


def test_a_suite_as_it_is_read():
    suite = parse_suite(data(), "file")
    assert suite.name == "little" and suite.sampling.steps == 2
    assert suite.prompt("old man", "dark") == "an old man in dark"
    assert suite.kinds == {"old man": "identity", "dog": "object", "cat": "object",
                           "tree": "object"}  # fmt: skip
    dog, light = suite.targets
    assert (dog.domain, light.domain) == ("concept", "style")
    assert dog.together == (("a dog and a tree", "tree"),)
    assert (dog.split, light.split) == ("tune", "report")


def test_what_a_method_is_given_of_a_target():
    suite = parse_suite(data(), "file")
    dog = suite.concept(suite.find("dog"))
    assert (dog.name, dog.kind, dog.aliases) == ("dog", "object", ("hound",))
    assert dog.prompts == ("a dog in dark", "a dog in light")
    light = suite.concept(suite.find("light"))
    assert (light.kind, light.prompts) == ("style", ("a tree in light",))


def test_prompts_are_plain_words():
    """A suite's parentheses are letters, drawn and trained on alike; weights are refused."""
    target = {"name": r"dog \(pet\)", "kind": "unsafe", "prompts": {"pictures": ["a  dog (pet)"]}}
    suite = parse_suite(data(targets=[target]), "file")
    assert suite.targets[0].prompts["pictures"] == ("a dog (pet)",)
    assert suite.concept(suite.targets[0]).training_prompts()[0].words == "a dog (pet)"
    for text in ("a (dog (pet):1.2)", "((dog (pet)))", "dog (pet) BREAK", "{dog|cat}"):
        target["prompts"]["pictures"] = [text]
        with pytest.raises(ForgetError, match="^Suite 'little|^Suite 'file'.* syntax"):
            parse_suite(data(targets=[target]), "file")


def test_unsafe_targets_bring_their_own_prompts():
    target = {"name": "gore", "kind": "unsafe", "prompts": {"pictures": ["gore", "much gore"]}}
    suite = parse_suite(data(targets=[target]), "file")
    concept = suite.concept(suite.targets[0])
    assert (concept.kind, concept.prompts) == ("custom", ("gore", "much gore"))


@pytest.mark.parametrize("name", sorted(file.stem for file in SUITES.glob("*.yaml")))
def test_suites_that_come_along(name):
    suite = load_suite(name)
    assert suite.name == name
    kinds = {target.kind for target in suite.targets}
    assert {"identity", "object", "style"} <= kinds <= set(KINDS)
    for kind in ("identity", "object", "style"):
        splits = {target.split for target in suite.targets if target.kind == kind}
        assert splits == {"tune", "report"}, f"{kind}: settings are tuned and reported on the same"
    for target in suite.targets:
        suite.concept(target).training_prompts()
        assert target.name not in suite.far and target.name not in target.near
        assert not set(target.near) & set(suite.far)
        assert target.kind == "unsafe" or 4 <= len(target.near) <= 5
        assert set(target.prompts) <= {*PROBES, "pictures"}


def test_the_demo_suite_names_what_the_demo_model_was_trained_on():
    from pathlib import Path

    root = Path(__file__).parents[3]
    listed = (root / "demo" / "concepts.csv").read_text(encoding="utf-8").splitlines()[1:]
    trained = {tuple(line.split(",")[:2]) for line in listed}
    assert set(load_suite("demo").kinds.items()) == trained


def without(key):
    return {name: value for name, value in data().items() if name != key}


WRONG = [
    ([], "the file is a list"),
    (None, "the file is empty"),
    ("text", "the file is 'text'"),
    (data(concept={}), "unknown key 'concept'"),
    (data(name=3), "name is 3"),
    (data(styles=["dark"]), "styles is a list"),
    (data(styles={"dark": "no place"}), "style 'dark' is 'no place'"),
    (data(styles={"dark": "{} {}"}), "write {} once"),
    (data(styles={"dark": 1}), "styles, dark is 1"),
    (data(styles={}), "unknown"),
    (data(concepts={"animal": {}}), "unknown key 'animal'"),
    (data(concepts={"identity": {"dog": "a"}, "object": {"dog": "b"}}), "identity and an object"),
    (data(far=["wolf"]), "far names 'wolf'"),
    (data(far="tree"), "far is 'tree'"),
    (data(far=[]), "far, styles or targets is empty"),
    (data(targets=[]), "far, styles or targets is empty"),
    (data(targets={}), "targets is a mapping"),
    (data(targets=["dog"]), "a target is 'dog'"),
    (data(targets=[{"name": "dog"}]), "kind None"),
    (data(targets=[{"name": "dog", "kind": "animal"}]), "kind 'animal'"),
    (data(targets=[{"name": "wolf", "kind": "object"}]), "'wolf' is unknown"),
    (data(targets=[{"name": "dog", "kind": "style"}]), "'dog' is unknown"),
    (data(targets=[{"name": "dog", "kind": "object", "near": ["wolf"]}]), "near names 'wolf'"),
    (data(targets=[{"name": "dog", "kind": "object", "split": "half"}]), "split of 'dog'"),
    (data(targets=[{"name": "dog", "kind": "object", "prompts": {"odd": []}}]), "'odd'"),
    (data(targets=[{"name": "dog", "kind": "object", "prompts": {"short": "a dog"}}]), "'a dog'"),
    (data(targets=[{"name": "dog", "kind": "object", "prompts": {"short": [1]}}]), "is 1"),
    (data(targets=[{"name": "dog", "kind": "object", "together": {"a": "wolf"}}]), "'wolf'"),
    (data(targets=[{"name": "dog", "kind": "object"}] * 2), "listed twice"),
    (data(targets=[{"name": "gore", "kind": "unsafe"}]), "no prompts.pictures"),
    (data(sampling={"steps": "many"}), "not a number"),
    (data(sampling={"speed": 2}), "unknown key 'speed'"),
    (data(sampling={"steps": 0}), "Sampling steps are 0"),
    (data(sampling={"size": 100}), "multiple of 64"),
]


@pytest.mark.parametrize("wrong, told", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_a_suite_is_said(wrong, told):
    with pytest.raises(ForgetError, match=".") as caught:
        parse_suite(wrong, "mine")
    assert told in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_files_that_are_no_suites(tmp_path):
    with pytest.raises(ForgetError, match="demo, (demo-wide, )?stable-diffusion"):
        read_suite("nosuch")
    with pytest.raises(ForgetError, match="There is no suite"):
        read_suite(str(tmp_path / "missing.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(ForgetError, match="not valid YAML"):
        read_suite(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ForgetError, match="not valid YAML"):
        read_suite(str(broken))
    broken.write_text("#" * (2 << 20), encoding="utf-8")
    with pytest.raises(ForgetError, match="more than 1 MiB"):
        read_suite(str(broken))


def test_other_braces_in_a_style_stay_as_they_are():
    suite = parse_suite(data(styles={"dark": "a {big} {} in dark", "light": "{}"}), "little")
    assert suite.prompt("dog", "dark") == "a {big} a dog in dark"
    assert suite.concept(suite.find("dog")).prompts == ("a {big} a dog in dark", "a dog")
    ask = Ask("", 0, "dog", "dark")
    assert attack_prompt(suite, suite.find("dog"), ask) == "a {big} <*> in dark"


def test_a_suite_cannot_run_code(tmp_path):
    evil = tmp_path / "evil.yaml"
    evil.write_text("!!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(ForgetError, match="not valid YAML"):
        read_suite(str(evil))


def test_an_unknown_target_is_told_with_the_known_ones():
    with pytest.raises(ForgetError, match="choose from dog, light"):
        parse_suite(data(), "file").find("wolf")
