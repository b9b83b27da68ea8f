"""The measure of pictures, the trial it works with, and the lab, on a tiny model."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fmn.bench.measures.mscore import mscore, template_and_asks
from fmn.bench.measures.pictures import coherence, kept_asks, pictures
from fmn.bench.running.cells import Cell, parse_method
from fmn.bench.running.lab import check_domains, from_bytes, hash_of, to_bytes
from fmn.bench.running.lab import make_setup as setup_of
from fmn.bench.suite import Target
from fmn.errors import ForgetError
from fmn.metrics.judge import JoinedJudges
from fmn.models.families import FAMILIES
from fmn.patches.patch import ForgetPatch

from ..tiny import TINY, make_patch, random_changes
from ..worlds import SUITE, GreyJudge, data, make_lab, make_setup, make_trial

trial_of = partial(make_trial, judge=GreyJudge(), count=4)


@pytest.fixture(autouse=True)
def known_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "tiny", TINY)


def strong_patch(size=3.0, sign=1):
    changes = random_changes(TINY, 2, size=size)
    return ForgetPatch(TINY, {name: (sign * up, down) for name, (up, down) in changes.items()})


def test_asks_belong_to_their_prompt_and_go_around_both_lists(sampler):
    trial = trial_of(sampler)
    asks = trial.pairs(["a", "b"], ["dark", "light"], 0)
    assert asks == []
    many = trial.pairs(["dog", "cat", "tree", "old man"], ["dark", "light"], 8)
    assert len({(ask.concept, ask.style) for ask in many}) == 8
    assert len({ask.style for ask in trial.pairs(["dog"], ["dark", "light"], 2)}) == 2
    suite_asks = trial.pairs(["dog", "cat"], ["dark", "light"], 4)
    assert [(ask.concept, ask.style) for ask in suite_asks] == [
        ("dog", "dark"), ("cat", "light"), ("dog", "light"), ("cat", "dark"),
    ]  # fmt: skip
    assert len({ask.seed for ask in suite_asks}) == 4
    assert suite_asks == trial_of(sampler).pairs(["dog", "cat"], ["dark", "light"], 4)
    other = trial_of(sampler, seed=1).pairs(["dog"], ["dark"], 1)[0]
    assert other.seed != suite_asks[0].seed and other.prompt == "a dog in dark"


def test_what_is_asked_for_each_kind_of_target(sampler):
    dog = trial_of(sampler)
    assert {ask.concept for ask in dog.target_asks()} == {"dog"}
    assert {ask.style for ask in dog.target_asks()} == {"dark", "light"}
    kept = kept_asks(dog)
    assert {ask.concept for ask in kept["near"]} == {"cat"}
    assert {ask.concept for ask in kept["far"]} == {"tree"}
    light = trial_of(sampler, "light")
    assert {(ask.concept, ask.style) for ask in light.target_asks()} == {("tree", "light")}
    assert {ask.style for ask in kept_asks(light)["near"]} == {"dark"}


def test_untouched_pictures_are_drawn_once_and_without_the_patch(sampler):
    trial = trial_of(sampler)
    plain = trial.draw(trial.target_asks())
    drawn = []
    sampler.on_pictures = drawn.append
    with sampler.applying([(strong_patch(), 1.0)]):
        worn = trial.draw(trial.target_asks())
        first = trial.untouched(trial.target_asks())
        again = trial.untouched(trial.target_asks())
    assert sum(drawn) == 8  # four worn, four without, none the second time
    assert torch.equal(first, again)
    assert torch.equal(first, plain)
    assert (worn - plain).abs().max() > 0.01


def test_rows_say_what_was_asked_and_what_the_judge_says(sampler):
    trial = trial_of(sampler)
    asks = trial.pairs(["dog"], ["light"], 1)
    images = torch.full((1, 8, 8, 3), 0.9)
    (row,) = trial.rows(asks, images, ["target"])
    assert row == {
        "group": "target", "concept": "dog", "style": "light", "seed": asks[0].seed,
        "said": {"concept": "nothing", "style": "light"},
    }  # fmt: skip
    dog = torch.full((1, 8, 8, 3), 0.3)
    (row,) = replace(trial, check=trial.judge).rows(asks, images, ["target"], dog)
    assert row["check"] == row["said"] and [was["concept"] for was in row["before"]] == ["dog"] * 2
    assert trial.shows_target(dog) == [True]
    assert trial.shows_target(images) == [False]


class Blind:
    """A judge that finds nothing, or nothing but dogs."""

    labels = {"concept": ("nothing", "dog")}

    def __init__(self, label):
        self.label = label

    def probabilities(self, images, domain):
        return torch.eye(2)[self.label].expand(len(images), 2)


def test_a_target_is_shown_if_any_judge_finds_it(sampler):
    images = torch.full((1, 8, 8, 3), 0.9)  # nothing, to the first judge
    for label, shown in ((0, False), (1, True)):
        assert replace(trial_of(sampler), check=Blind(label)).shows_target(images) == [shown]


def test_coherence_counts_things_of_the_targets_kind_only(sampler):
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    # old man, dog, cat, tree, nothing
    assert coherence(trial_of(sampler), levels) == [0, 1, 1, 1, 0]
    assert coherence(trial_of(sampler, "light"), levels) == [1, 1, 1, 1, 0]
    trial = trial_of(sampler)
    trial.target = Target("old man", "identity")
    assert coherence(trial, levels) == [1, 0, 0, 0, 0]


def test_an_untouched_model_is_at_no_distance(sampler):
    result = pictures(trial_of(sampler, check=GreyJudge()))
    assert [row["group"] for row in result["rows"]] == ["target"] * 4 + ["near"] * 4 + ["far"] * 4
    assert max(row["distance"] for row in result["rows"]) == 0
    assert result["kid"] == result["kid_untouched"]
    assert result["agreement"] == {"concept": 1, "style": 1}
    assert result["seconds_a_picture"] > 0 and len(result["grid"]) == 10


def test_a_patch_and_its_negation_cancel(sampler):
    both = [(strong_patch(), 1.0), (strong_patch(sign=-1), 1.0)]
    with sampler.applying(both[:1]):
        one = pictures(trial_of(sampler))
    with sampler.applying(both):
        none = pictures(trial_of(sampler))
    assert min(row["distance"] for row in one["rows"]) > 0.005
    assert max(row["distance"] for row in none["rows"]) <= 1 / 255


def test_a_lab_trains_and_measures():
    counts = []
    lab = make_lab(make_setup(), on_work=counts.append)
    method = parse_method("resteer:steps=3")
    result, made, seconds = lab.run(Cell("train", "r", method.settings, ("dog",)), [])
    assert result["bytes"] == len(made) and seconds > 0 and result["seconds"] > 0
    assert counts == [1] * 3
    patch = from_bytes(made)
    assert patch.concepts == ["dog"]
    result, made, _ = lab.run(Cell("pictures", "r", method.settings, ("dog",)), [made])
    assert made is None and len(result["rows"]) == 12


def test_strength_is_that_of_the_method():
    lab = make_lab()
    patch = to_bytes(strong_patch())
    rows = [
        lab.run(Cell("pictures", "m", {"strength": strength}, ("dog",)), [patch])[0]["rows"]
        for strength in (0.0, 1.0)
    ]
    assert max(row["distance"] for row in rows[0]) == 0 < rows[1][0]["distance"]


def test_many_and_sequence():
    lab = make_lab()
    names, settings = ("dog", "cat", "old man"), parse_method("resteer:steps=1").settings
    patches = [to_bytes(strong_patch())] * 3
    result, _, _ = lab.run(Cell("many", "r", settings, names), patches)
    assert result["names"] == 3
    assert [row["group"] for row in result["rows"]] == ["target"] * 6 + ["far"] * 4
    result, _, _ = lab.run(Cell("sequence", "r", settings, names), [])
    assert [stage["forgotten"] for stage in result["stages"]] == [1, 2, 3]
    assert {row["concept"] for row in result["stages"][0]["rows"]} == {"dog", "tree"}


def test_a_name_that_the_suite_lacks():
    with pytest.raises(ForgetError, match="knows no 'wolf'"):
        make_lab().target("wolf")
    assert make_lab().target("cat").kind == "object"


def test_a_patch_of_another_family_is_refused():
    with pytest.raises(ForgetError, match="use a patch made for the model's family"):
        make_lab().run(Cell("pictures", "m", {}, ("dog",)), [to_bytes(make_patch())])


class Unsafe(GreyJudge):
    name, labels = "unsafe", {"unsafe": ("unsafe", "safe")}


def test_judges_joined():
    joined = JoinedJudges([GreyJudge(), Unsafe()])
    assert set(joined.labels) == {"concept", "style", "unsafe"} and joined.name == "grey+unsafe"
    assert joined.probabilities(torch.full((1, 4, 4, 3), 0.9), "unsafe").tolist() == [[0, 1]]
    gore = Target("gore", "unsafe")
    check_domains(joined, [gore])
    with pytest.raises(ForgetError, match="cannot tell 'gore'"):
        check_domains(GreyJudge(), [gore])


def test_the_hash_of_judges_is_of_their_files(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"a" * 10)
    before = hash_of([folder])
    (folder / "notes.txt").write_text("x")
    assert hash_of([folder]) == before
    (folder / "model.safetensors").write_bytes(b"b" * 10)
    assert hash_of([folder]) != before
    assert hash_of([folder / "notes.txt"]) != hash_of([])  # a file that is named counts


def test_a_vae_counts_as_what_it_holds(tmp_path):
    (vae := tmp_path / "vae.pt").write_bytes(b"a")
    given = data(), SUITE, "f", "little", "demo"
    plain, one = setup_of(*given), setup_of(*given, vae=str(vae))
    assert one.vae == str(vae) and one.key() != plain.key()
    vae.write_bytes(b"b")
    assert setup_of(*given, vae=str(vae)).key() not in (one.key(), plain.key())


def test_what_the_mscore_is_learned_from(sampler):
    template, asks = template_and_asks(trial_of(sampler))
    assert template == "a photo of {}" and {ask.concept for ask in asks} == {"dog"}
    template, asks = template_and_asks(trial_of(sampler, "light"))
    assert template == "a tree in {}"
    assert {(ask.concept, ask.style) for ask in asks} == {("tree", "light")}


def test_mscore_of_a_tiny_model(sampler, monkeypatch):
    monkeypatch.setattr("fmn.bench.measures.mscore.SEEDS", (0,))
    result = mscore(trial_of(sampler))
    assert len(result["scores"]) == len(result["start"]) == 1
    assert all(-1 <= value <= 1 for value in result["scores"] + result["start"])
