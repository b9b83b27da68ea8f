"""Re-read on the tiny model, from its sentences to its file, against attention in loops."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.closed_form.nearest import nearest_kept
from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.keep_list import keep_for
from fmn.concepts.prompt_templates import kept_sentences, sentences, together
from fmn.errors import ForgetError
from fmn.methods import forget
from fmn.methods.reread import method
from fmn.methods.reread.attention_output import record_queries
from fmn.methods.reread.regression import both_sides
from fmn.methods.reread.regression_data import QuerySampler
from fmn.models.families import cross_attention_names, layers, layers_by_name
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import save_patch

from ..literal import near
from ..tiny import TINY, TinyModel, same_tensors, traces, weights_of
from .test_attention_output import read_by_loops
from .test_reread import best, jointly

DOG = Concept("dog", anchor="cat", aliases=("red hound",), prompts=("my dog on grass",))
OIL = Concept("oil painting", "style")
CAR = Concept("car")
FEW = method.Settings(
    prompts=2, keep_prompts=4, near_words=0, images_per_concept=2, sampling_steps=2, guidance=2.0,
    query_positions=2, size=64, damping=0.05, overshoot=0.7, overshoot_style=0.7,
)  # fmt: skip
NAMES = cross_attention_names(TINY)
OUTPUTS = [f"{name}.to_out.0" for name in NAMES]
STEPS = 2 + len(NAMES)  # of one concept: drawn with and without it, kept ones; then the layers


@pytest.fixture
def model():
    return TinyModel()


def weight_of(model, name):
    return model.unet.get_submodule(name).weight.detach().double()


def drawn_of(texts, settings):
    count = min(settings.images_per_concept, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def queries_of(model, texts, settings):
    """Queries of drawings of some of the texts, layer name -> [drawn, S, C]."""
    encoded = [model.encode(Prompt(text, text)) for text in drawn_of(texts, settings)]
    with model.borrow_denoiser() as denoiser:
        empty = model.encode(Prompt("", ""))
        return record_queries(denoiser, TINY, encoded, empty, settings, 8)


def spoken_of(concept, settings):
    """([text], [other text]) of a concept."""
    return tuple(map(list, zip(*sentences(concept, settings.prompts))))


def literal_rows(model, concepts, keep, settings):
    """Layer name -> ([(o, o*) of each concept], kept rows), read place by place."""
    words = keep_for(concepts, (), settings.keep_list)
    styles = keep_for(concepts, (), "styles")
    near = nearest_kept(model, concepts, settings.near_words)
    nearby = kept_sentences(near, styles, settings.near_prompts * len(near))[1:]
    kept = [*kept_sentences(words, styles, settings.keep_prompts), *nearby, *keep]
    kept_queries = queries_of(model, kept, settings)
    sides = [
        [(texts, queries_of(model, texts, settings)) for texts in spoken_of(concept, settings)]
        for concept in concepts
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    found = {}
    for name in NAMES:
        module, read = model.unet.get_submodule(name), []
        everywhere = list(kept_queries[name].flatten(0, 1))
        for both in sides:
            # Each drawing's places with the concept, then those without it.
            queries = torch.cat([own[name] for _, own in both], 1)
            everywhere += queries.flatten(0, 1)
            read.append(
                tuple(
                    torch.cat(
                        [
                            read_by_loops(
                                module, queries[i % len(queries)], model.encode_all([text])[0]
                            )
                            for i, text in enumerate(texts)
                        ]
                    )
                    for texts, _ in both
                )
            )
        chosen = torch.randint(len(everywhere), (len(kept), 4), generator=generator)
        stay = [
            read_by_loops(
                module, torch.stack([everywhere[i] for i in line]), model.encode_all([text])[0]
            )
            for text, line in zip(kept, chosen.tolist())
        ]
        found[name] = read, torch.cat(stay)
    return found


CASES = {
    "one": ([DOG], ("blue house", "a man on a horse"), replace(FEW, rank=0)),
    "near": ([CAR], ("blue house",), replace(FEW, near_words=3, near_prompts=2)),
    "bounded": ([CAR], (), replace(FEW, rank=2, overshoot=2.0, keep_list="none")),
    "several": (
        [CAR, OIL, DOG],
        ("blue house",),
        replace(FEW, rank=2, images_per_concept=3, seed=5),
    ),
    "plain": (
        [OIL],
        ("blue house",),
        replace(FEW, rank=1, guidance=1.0, preserve=0.5, keep_prompts=0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_equations(model, case, tmp_path):
    concepts, keep, settings = CASES[case]
    before = weights_of(model.unet)
    patch = method.run(model, concepts, settings, keep=keep)
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)
    wanted = [layer.name for layer in layers(TINY) if layer.name.endswith("attn2.to_out.0")]
    assert list(patch.changes) == OUTPUTS == wanted
    allowed = settings.rank * len(concepts) or 1024
    widths = {name: len(weight_of(model, name)) for name in OUTPUTS}
    file = load_file(save_patch(patch, tmp_path / "patch.safetensors"))
    assert sum(key.endswith(".lora_up.weight") for key in file) == len(OUTPUTS)
    left = []
    for name, (read, kept) in literal_rows(model, concepts, keep, settings).items():
        name = f"{name}.to_out.0"
        weight, (up, down) = weight_of(model, name), patch.changes[name]
        rank = min(allowed, widths[name])
        assert up.dtype == down.dtype == torch.float32 and len(down) == rank
        alone = min(settings.rank or rank, rank)
        if len(read) > 1:
            change = jointly(weight, read, kept, settings, alone)
        else:
            change, _ = best(weight, read, kept, settings, alone)
        near(up.double() @ down.double(), change, 1e-3)
        _assert_in_file(file, name, weight, weight + change)
        left += [_left(weight, weight + change, concept, other) for concept, other in read]
    loss = patch.info["loss"]
    assert loss["first"] == 1.0 and loss["steps"] == 2
    assert math.isclose(loss["last"], sum(left) / len(left), rel_tol=1e-3)
    assert patch.info["method"] == "reread" and patch.concepts == [each.name for each in concepts]


def _assert_in_file(file, name, weight, edited):
    """W + up down is W' within fp16 rounding of the change."""
    prefix = file_name(TINY, layers_by_name(TINY)[name])
    down, up = (file[f"{prefix}.{part}"] for part in ("lora_down.weight", "lora_up.weight"))
    assert up.dtype == down.dtype == torch.float16
    found = weight + up.double() @ down.double()
    assert float((found - edited).norm()) < 5e-3 * float((edited - weight).norm())


def _left(weight, edited, concept, other):
    """|W' o - W o*|^2 / |W o - W o*|^2 over all rows."""
    after = before = 0.0
    for o, target in zip(concept, other):
        after += float(((edited @ o - weight @ target) ** 2).sum())
        before += float(((weight @ o - weight @ target) ** 2).sum())
    return after / before


def test_ranks(model):
    assert method.run(model, [DOG], replace(FEW, rank=3)).ranks == [3]
    assert method.run(model, [DOG, OIL], replace(FEW, rank=3)).ranks == [6]
    assert method.run(model, [DOG, OIL, CAR], replace(FEW, rank=3)).ranks == [8, 9]
    assert method.run(model, [DOG], replace(FEW, rank=0)).ranks == [8, 16]


def test_what_is_kept(model):
    concepts = [DOG, OIL]
    settings = method.Settings(keep_prompts=20, near_words=0)
    found = method.kept_texts(model, concepts, ("blue house", "My Cat"), settings)
    assert found[0] == "" and len(found) == 1 + 20 + 2
    assert found[-2:] == ["blue house", "My Cat"]
    words, styles = keep_for(concepts), keep_for(concepts, (), "styles")
    assert "dog" not in words and "oil painting" not in styles
    assert found[1:21] == kept_sentences(words, styles, 20)[1:]
    fours = kept_sentences(together(words, 4), styles, 20)
    assert method.kept_texts(model, concepts, (), replace(settings, words_per_prompt=4)) == fours
    nearest = replace(settings, near_words=3, near_prompts=2)
    found = method.kept_texts(model, concepts, ("blue house",), nearest)
    near = nearest_kept(model, concepts, 3)
    assert 3 <= len(near) <= 6 and len(found) == 1 + 20 + 2 * len(near) + 1
    assert all(sum(word in text for text in found[21:-1]) >= 2 for word in near)
    alone = ["", "blue house"]
    assert (
        method.kept_texts(model, concepts, alone[1:], replace(settings, keep_list="none")) == alone
    )
    assert method.kept_texts(model, concepts, alone[1:], replace(settings, keep_prompts=0)) == alone
    assert method.kept_texts(model, concepts, alone[1:], replace(settings, preserve=0.0)) == [""]


def test_seed_counts(model):
    first, again, other = (
        method.run(model, [DOG], replace(FEW, seed=seed)).change_of(OUTPUTS[0])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)


def test_size_counts(model):
    method.run(model, [DOG], replace(FEW, size=128))
    assert {x.shape[2:] for x, _, _ in model.seen} == {(16, 16)}
    model.seen.clear()
    method.run(model, [DOG], replace(FEW, size=0))
    assert {x.shape[2:] for x, _, _ in model.seen} == {(8, 8)}  # the family's 64 pixels


def test_what_is_drawn(model):
    method.run(model, [DOG, CAR], replace(FEW, images_per_concept=3, guidance=1.0))
    texts = [spoken_of(concept, FEW) for concept in (DOG, CAR)]
    words, styles = keep_for([DOG, CAR]), keep_for([DOG, CAR], (), "styles")
    lists = [*texts[0], *texts[1], kept_sentences(words, styles, 4)]
    expected = [drawn_of(each, replace(FEW, images_per_concept=3)) for each in lists]
    assert [len(each) for each in expected] == [3, 3, 2, 2, 3]
    seen = [text.context for _, _, text in model.seen[::2]]
    assert len(model.seen) == 2 * len(expected) == 2 * len(seen)
    for context, prompts in zip(seen, expected):
        assert torch.equal(context, model.encode_all(prompts))


@pytest.mark.parametrize("drawn, batches", [(1, [4, 1]), (2, [4, 4, 2]), (3, [3, 3, 2, 2, 3])])
def test_short_lists_share_a_batch(model, drawn, batches):
    """The noise of a list's i-th text, and what is seen, is the same as where it is alone."""
    settings = replace(FEW, images_per_concept=drawn)
    pairs = [sentences(each, FEW.prompts + (each is DOG)) for each in (DOG, CAR)]
    lists = [*both_sides(pairs), ["a house", "a tree", "the sea"]]
    with model.borrow_denoiser() as denoiser:
        sampler = QuerySampler(model, denoiser, settings, lambda step: None, lists)
        found = sampler.draw(lists)
    assert [len(x) for x, _, _ in model.seen[1::2]] == batches  # a step with guidance, one without
    for texts, queries in zip(lists, found):
        alone = queries_of(model, texts, settings)
        assert queries.keys() == alone.keys()
        for name in NAMES:
            torch.testing.assert_close(queries[name], alone[name])


@pytest.mark.parametrize(
    "concepts, drawn, total",
    [
        ([DOG], 1, STEPS - 1),
        ([DOG], 2, STEPS),
        ([DOG, OIL], 2, STEPS + 1),
        ([DOG], 4, STEPS + 1),
        ([DOG], 5, STEPS + 4),
        ([CAR], 64, STEPS + 2),
    ],  # fmt: skip
)
def test_steps_are_told(model, concepts, drawn, total):
    """A step for every four drawings, of one list or of several whole ones, and for each layer."""
    steps = []
    patch = method.run(model, concepts, replace(FEW, images_per_concept=drawn), steps.append)
    assert [(step.index, step.total, len(step.losses)) for step in steps] == [
        (i, total, i) for i in range(1, total + 1)
    ]
    drawings = total - len(NAMES)
    assert steps[-1].losses[:drawings] == [1.0] * drawings and steps[-1].seconds_left == 0
    assert steps[-1].losses[-1] == patch.info["loss"]["last"] != 1.0


@pytest.mark.parametrize("last", [1, 2, STEPS])
def test_cancelling(model, last):
    before, seen = weights_of(model.unet), []

    def cancel(step):
        seen.append(step.index)
        if step.index == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.run(model, [DOG], FEW, cancel)
    assert seen == list(range(1, last + 1))
    assert len(model.seen) == min(last, 2) * FEW.sampling_steps
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


def test_it_runs_in_inference_mode(model):
    with torch.inference_mode():
        inner = forget(model, [DOG], FEW)
    outer = method.run(model, [DOG], FEW)
    assert all(torch.equal(inner.change_of(name), outer.change_of(name)) for name in OUTPUTS)
    assert not any(each.is_inference() for pair in inner.changes.values() for each in pair)


@pytest.mark.parametrize("word", ["dog", "Red Hound", "a dog"])
def test_what_is_kept_and_forgotten_is_refused(model, word):
    with pytest.raises(ForgetError, match=f"'{word}' is both to be kept and to be forgotten"):
        method.run(model, [DOG], FEW, keep=("blue house", word))
    assert not model.seen


def test_long_prompts_are_refused(model):
    fits, long = ("very " * count + "good dog" for count in (73, 74))
    method.run(model, [Concept("dog", prompts=(fits,))], replace(FEW, images_per_concept=3))
    with pytest.raises(ForgetError, match="'very very .*' is too long: shorten it to 75 tokens"):
        method.run(model, [Concept("dog", prompts=(long,))], replace(FEW, images_per_concept=3))
    assert not traces(model.unet)


def test_other_refusals(model):
    same = Concept("red car", anchor="blue car")
    object.__setattr__(same, "anchor", "red  car")  # as an encoder may read two texts alike
    with pytest.raises(ForgetError, match="'a photo of red car' is encoded as"):
        method.run(model, [same], FEW)
    before = weights_of(model.unet)
    model.poisoned = True
    with pytest.raises(ForgetError, match="not finite while prompts were drawn: load the model"):
        method.run(model, [DOG], FEW)
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


@pytest.mark.parametrize(
    "changes",
    [
        {"overshoot": -0.1}, {"preserve": -1.0}, {"damping": 0.0}, {"prompts": 0}, {"prompts": 181},
        {"keep_prompts": -1}, {"images_per_concept": 0}, {"sampling_steps": 0}, {"guidance": 0.5},
        {"query_positions": 0}, {"rank": -1}, {"size": 65}, {"keep_list": "all"},
    ],
)  # fmt: skip
def test_wrong_settings(changes):
    with pytest.raises(ForgetError, match=next(iter(changes))):
        replace(FEW, **changes)
