"""Attacks on the text: what may stand in their prompts, the search, and what is drawn."""

import pytest
import torch

from fmn.bench.measures import attacks
from fmn.bench.measures import ring_a_bell as module
from fmn.bench.measures.attacks import attack_prompt, inversion, name_pattern
from fmn.bench.measures.ring_a_bell import RingABellSettings, ring_a_bell
from fmn.bench.measures.trial import Ask
from fmn.bench.suite import Target, parse_suite
from fmn.concepts.concept import Prompt
from fmn.concepts.prompt_templates import PLACEHOLDER
from fmn.errors import ForgetError
from fmn.models.image_sampler import open_sampler
from fmn.training import textual_inversion as learning

from ..tiny import TinyModel, same_tensors, weights_of
from ..worlds import SUITE, Odd, Sees, data, make_trial

QUICK = learning.Settings(steps=2, batch=2, tokens=2)
WORDS = ("red", "blue", "green", "wet", "tall", "old")
SMALL = RingABellSettings(length=3, population=8, generations=4, searches=2, vocabulary=WORDS)


def small_suite(concepts, styles, target, **more):
    made = {
        "concepts": {"object": concepts},
        "styles": styles,
        "far": ["tree"],
        "targets": [target],
    }
    return parse_suite(data(**made, **more), "small")


@pytest.mark.parametrize(
    "text",
    ["a golf ball", "A Golf-Ball!", "golf_ball", "golfball", "two golf  balls", "(GOLF BALL:1.2)"],
)
def test_a_name_is_found_however_it_is_written(text):
    assert name_pattern("golf ball").search(text) and name_pattern("golf_ball").search(text)


@pytest.mark.parametrize("text", ["golf", "a ball", "minigolf ball", "golf ballet", PLACEHOLDER])
def test_other_words_are_not_the_name(text):
    assert not name_pattern("golf ball").search(text)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("golf ball", "a golf ball"), ("jack-o-lantern", "a jack-o-lantern"), ("tree", "a Tree")],
)
def test_a_concepts_attack_prompt_lacks_its_name(name, phrase):
    target = {"name": name, "kind": "object"}
    suite = small_suite({name: phrase, "tree": "a tree"}, {"dark": "{} in dark"}, target)
    prompt = attack_prompt(suite, suite.targets[0], Ask("", 0, name, "dark"))
    assert prompt == "<*> in dark"


@pytest.mark.parametrize(
    ("name", "template", "made"),
    [
        ("Van Gogh", "{} in the style of Van Gogh", "a tree in the style of <*>"),
        ("van gogh", "Van-Gogh's painting of {}", "<*>'s painting of a tree"),
        ("vangogh", "{}, Van Gogh", "a tree, <*>"),
        ("3d render", "{}, 3D-render", "a tree, <*>"),
        ("ink", "{}, ink drawing, ink", "a tree, <*> drawing, <*>"),
    ],
)
def test_a_styles_attack_prompt_lacks_its_name(name, template, made):
    target = {"name": name, "kind": "style"}
    suite = small_suite({"tree": "a tree"}, {name: template}, target)
    assert attack_prompt(suite, suite.targets[0], Ask("", 0, "tree", name)) == made


def test_an_alias_is_replaced_where_the_name_does_not_stand():
    target = {"name": "impasto", "kind": "style", "aliases": ["thick paint"]}
    suite = small_suite({"tree": "a tree"}, {"impasto": "{} in thick paint"}, target)
    prompt = attack_prompt(suite, suite.targets[0], Ask("", 0, "tree", "impasto"))
    assert prompt == "a tree in <*>"


@pytest.mark.parametrize(
    ("kind", "name", "alias", "template", "match"),
    [
        ("object", "dog", "pup", "{} and a dog", "names its target 'dog'"),
        ("object", "dog", "hound", "{} with Hounds", "names its target 'hound'"),
        ("style", "dark", "night", "{} without light", "neither the name"),
        ("style", "dark", "night", "{}, dark night", "names its target"),
    ],
)
def test_a_prompt_that_would_name_the_target_is_refused(kind, name, alias, template, match):
    target = {"name": name, "kind": kind, "aliases": [alias]}
    suite = small_suite({"dog": "a dog", "tree": "a tree"}, {"dark": template}, target)
    with pytest.raises(ForgetError, match=match):
        attack_prompt(suite, suite.targets[0], Ask("", 0, "tree", "dark"))


def test_unsafe_content_has_a_plain_attack_prompt():
    target = Target("gore", "unsafe", prompts={"pictures": ("something gory",)})
    assert attack_prompt(SUITE, target, Ask("something gory", 0)) == "a photo of <*>"
    with pytest.raises(ForgetError, match="names its target"):
        attacks.check_absent("so much GORE", target)


def test_examples_are_those_that_show_the_target(sampler):
    trial = make_trial(sampler, judge=Odd())
    asks = trial.target_asks(8)
    images = trial.untouched(asks)
    shown = trial.shows_target(images)
    assert 0 < sum(shown) < 8  # or this test could not fail
    kept, pictures = attacks.recognised_examples(trial, asks)
    assert kept == [ask for ask, found in zip(asks, shown) if found]
    assert torch.equal(pictures, images[torch.tensor(shown)])
    with pytest.raises(ForgetError, match="in none of 8 pictures"):
        attacks.recognised_examples(make_trial(sampler, judge=Sees("cat")), asks)


def test_inversion_draws_what_it_learned(sampler, monkeypatch):
    seen, calls = [], []
    draw, invert = sampler.draw_texts, attacks.invert

    def watched(text, seeds, **options):
        seen.append((text, list(seeds)))
        return draw(text, seeds, **options)

    def kept(*args):
        calls.append((args, invert(*args)))
        return calls[-1][1]

    monkeypatch.setattr(sampler, "draw_texts", watched)
    monkeypatch.setattr(attacks, "invert", kept)
    model, trial = sampler.model, make_trial(sampler)
    before, embedding = weights_of(model.unet), model.embedding.clone()
    result = inversion(trial, QUICK)
    assert same_tensors(weights_of(model.unet), before) and model.embedding.equal(embedding)
    asks = trial.target_asks()
    assert [row["prompt"] for row in result["rows"]] == [ask.prompt for ask in asks]
    assert [row["attack"] for row in result["rows"]] == [f"<*> in {ask.style}" for ask in asks]
    assert len(result["losses"]) == 2 and result["pictures"] == attacks.EXAMPLES
    (_, _, pictures, settings, _), found = calls[0]
    assert settings == QUICK
    assert torch.equal(pictures, trial.untouched(trial.target_asks(3 + attacks.EXAMPLES)[3:]))
    # Drawn were the attacker's pictures, the attack, the same without words, the untouched ones.
    text, seeds = seen[1]
    assert len(seen) == 4 and result["control"] == "absent"
    assert seeds == [ask.seed for ask in asks]
    with model.borrow_text_encoder() as encoder:
        wanted = encoder.encode(f"<*> in {asks[1].style}", found.vectors)[0].context
    assert torch.equal(text.context[1:2], wanted)


def test_what_is_drawn_without_words_and_by_words_for_a_stranger(sampler, monkeypatch):
    """The floor of an inversion, and what the same attack makes of a thing that was never known."""
    drawn, taught = [], []

    def learned(model, denoiser, pictures, settings, on_step):
        taught.append(pictures)
        return learning.Inverted(torch.zeros(2, 12), torch.zeros(2, 12), [1.0])

    strips = {"tree": torch.rand(20, 8, 8, 3), "cat": torch.rand(2, 8, 8, 3)}
    trial = make_trial(sampler, judge=Sees("cat"), controls=strips)
    monkeypatch.setattr(attacks, "invert", learned)
    monkeypatch.setattr(attacks, "recognised_examples", lambda *_: ([], torch.zeros(1, 8, 8, 3)))
    monkeypatch.setattr(trial, "draw", lambda asks: drawn.append(asks) or torch.zeros(3, 8, 8, 3))
    result = inversion(trial, QUICK)
    asks = trial.target_asks()
    assert [ask.prompt for ask in drawn[0]] == [f"in {ask.style}" for ask in asks]
    assert [ask.seed for ask in drawn[0]] == [ask.seed for ask in asks]
    assert [row["nothing"] for row in result["rows"]] == [False] * 3  # a judge of cats alone
    # crc32("dog") is odd, so the second of the sorted names: all but 16 of its pictures left out.
    assert taught[0].shape == (16, 8, 8, 3) and torch.equal(taught[0][0], strips["tree"][0])
    assert [row["concept"] for row in result["control"]] == ["tree"] * 3
    assert not any(row["still"] for row in result["control"])
    trial.controls = {"cat": strips["cat"]}
    assert all(row["still"] for row in inversion(trial, QUICK)["control"])
    trial.controls = {"boat": strips["cat"]}
    with pytest.raises(ForgetError, match="no label for the control 'boat'"):
        inversion(trial, QUICK)


def test_inversion_is_told_a_template_of_the_kind_and_the_seed(sampler, monkeypatch):
    told = []

    def stop(model, denoiser, images, settings, on_step):
        told.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "invert", stop)
    for target in ("dog", "light"):
        with pytest.raises(KeyboardInterrupt):
            inversion(make_trial(sampler, target, seed=5))
    assert [settings.templates for settings in told] == [
        ("a photo of {}",), ("a photo in the style of {}",),
    ]  # fmt: skip
    assert {settings.seed for settings in told} == {5}


def test_the_vocabulary_lacks_the_targets_own_words(sampler):
    trial = make_trial(sampler)  # a dog, also known as hound
    words = ("Dog", "dogs", "hounds", "bulldog", "do", "cat", "sea dog")
    assert list(module.vocabulary(trial, RingABellSettings(vocabulary=words, length=3))) == [
        "do",
        "cat",
    ]
    short = Target("of", "object")
    kept = module.vocabulary(
        make_trial(sampler, short), RingABellSettings(vocabulary=("of", "offer", "a"))
    )
    assert list(kept) == ["offer", "a"]
    with pytest.raises(ForgetError, match="0 words to search among"):
        module.vocabulary(trial, RingABellSettings(vocabulary=("dog",)))


def test_words_that_do_not_fit_are_left_out(sampler):
    trial = make_trial(sampler)
    words = ("one two", "three", "four")  # the tiny tokenizer has one token a word
    assert list(module.vocabulary(trial, RingABellSettings(vocabulary=words, length=75))) == [
        "three",
        "four",
    ]


def test_words_of_the_suite_and_of_clip():
    assert module.suite_words(SUITE) == [
        "a", "an", "cat", "dark", "dog", "in", "light", "man", "old", "tree",
    ]  # fmt: skip
    words = module.whole_words()
    # Ids of openai/clip-vit-large-patch14's tokenizer.
    assert words["dog"] == [1929] and words["the"] == [518] and words["photo"] == [1125]
    assert all(word.isalpha() and word.islower() and len(word) > 2 for word in words)


def test_concept_vector_is_a_difference_of_means(sampler):
    def mean(*prompts):
        return torch.cat([sampler.text(prompt).context for prompt in prompts]).mean(0, keepdim=True)

    vector = module.concept_vector(make_trial(sampler))
    wanted = mean("a dog in dark", "a dog in light") - mean("a tree in dark", "a tree in light")
    assert torch.allclose(vector, wanted, atol=1e-6) and vector.shape == (1, 77, 12)
    vector = module.concept_vector(make_trial(sampler, "light"))
    wanted = mean("a tree in light") - mean("a tree in dark")
    assert torch.allclose(vector, wanted, atol=1e-6)


def test_concept_vector_needs_something_else():
    suite = small_suite({"tree": "a tree"}, {"ink": "{}, ink"}, {"name": "ink", "kind": "style"})
    with (
        open_sampler(TinyModel(), suite.sampling) as sampler,
        pytest.raises(ForgetError, match="no prompt without 'ink'"),
    ):
        module.concept_vector(make_trial(sampler, "ink", suite=suite))


def test_scores_are_distances_of_whole_prompts(sampler):
    model, target = sampler.model, SUITE.find("dog")
    trial = make_trial(sampler)
    words = module.vocabulary(
        trial, RingABellSettings(vocabulary=("tall", "red", "do", "g"), length=2)
    )
    wanted = model.encode(Prompt("red tall", "")).context
    with model.borrow_text_encoder() as text:
        scorer = module.Scorer(model, text, words, wanted, target)
        rows = torch.tensor([[1, 0], [0, 1], [2, 3]])
        assert scorer.row(rows[0]) == model.tokenize(Prompt("red tall", ""))
        scores = scorer(rows)
    other = model.encode(Prompt("tall red", "")).context
    assert scores[0] == 0
    assert scores[1] == pytest.approx(float((other - wanted).square().sum()), rel=1e-5)
    assert scores[2] == torch.inf  # "do g" spells the target


def test_search_finds_the_best_row_and_never_gets_worse():
    goal = torch.tensor([3, 1, 4, 1])
    settings = RingABellSettings(length=4, population=20, generations=60)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return module.search(lambda rows: (rows != goal).sum(1).float(), 6, settings, generator)

    best, scores = run(0)
    assert best.equal(goal) and scores[-1] == 0 and len(scores) == 60
    assert all(after <= before for before, after in zip(scores, scores[1:]))
    assert run(0)[1] == scores != run(1)[1]


def test_search_scores_each_candidate_once():
    seen = []

    def score(rows):
        seen.append(len(rows))
        return rows.sum(1).float()

    settings = RingABellSettings(length=2, population=9, generations=3)
    module.search(score, 5, settings, torch.Generator().manual_seed(0))
    assert seen == [9, 5, 5]


def test_children_mix_two_parents_or_change_a_word():
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    crossed = RingABellSettings(length=4, mutate=0, crossover=1)
    made = module.children(parents, 50, 9, crossed, generator)
    assert made.max() == 1 and {0, 1} == set(made.flatten().tolist())
    turns = (made[:, 1:] != made[:, :-1]).sum(1)
    assert turns.max() == 1  # one cut
    mutated = RingABellSettings(length=4, mutate=1, crossover=0)
    made = module.children(parents[:1], 50, 9, mutated, generator)
    assert (made != 0).sum(1).max() == 1 and made.max() == 8
    # Neither: still something new is tried.
    neither = RingABellSettings(length=4, mutate=0, crossover=0)
    assert (module.children(parents[:1], 50, 9, neither, generator) != 0).any()


def test_ring_a_bell_draws_the_prompts_it_found(sampler):
    trial = make_trial(sampler)
    result = ring_a_bell(trial, SMALL)
    searches = result["searches"]
    assert [one["start"] for one in searches] == ["a dog in dark", "a dog in light"]
    distance = float((3 * module.concept_vector(trial)).square().sum())
    assert searches[0]["start_loss"] == pytest.approx(distance)
    for one in searches:
        assert set(one["prompt"].split()) <= set(WORDS) and len(one["prompt"].split()) == 3
        assert len(one["losses"]) == 4 and one["losses"][-1] <= one["losses"][0]
    prompts = [row["prompt"] for row in result["rows"]]
    assert prompts == [searches[0]["prompt"], searches[1]["prompt"], searches[0]["prompt"]]
    assert all(row["still"] and row["untouched"] for row in result["rows"])
    assert result["settings"]["vocabulary"] == len(WORDS)


def test_ring_a_bell_searches_once_for_all_methods(sampler, monkeypatch):
    trial = make_trial(sampler)
    first = ring_a_bell(trial, SMALL)
    monkeypatch.setattr(module, "search", None)  # a second search would fail
    again = ring_a_bell(make_trial(sampler, cache=trial.cache), SMALL)
    assert again == first
    with pytest.raises(TypeError):
        ring_a_bell(make_trial(sampler, cache=trial.cache, seed=1), SMALL)
