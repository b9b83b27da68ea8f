"""CASteer on the tiny model, against the paper's equations written out with loops."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.keep_list import keep_for
from fmn.errors import ForgetError
from fmn.methods import casteer
from fmn.models.adapters import FixedAdapter, attached
from fmn.models.families import cross_attention_names, layers, layers_by_name
from fmn.models.sampling import trailing_timesteps
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import save_patch

from ..tiny import TINY, TinyModel, make_scheduler, same_tensors, traces, weights_of

DOG, CAR = Concept("dog"), Concept("car", aliases=("red car",))
OIL = Concept("oil painting", "style", anchor="photo")
FEW = casteer.Settings(pairs=3, sampling_steps=3, guidance=4.0, size=64)


@pytest.fixture
def model():
    return TinyModel()


def texts_of(concept, settings):
    """(with, without), written out: 'a WORD with NAME', or 'a WORD, STYLE'."""
    words = keep_for([DOG, CAR, OIL], (), "common")
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(settings.seed))
    for i in range(settings.pairs):
        word = words[order[i % len(words)]]
        if not word.startswith("a "):
            word = f"an {word}" if word[0] in "aeiou" else f"a {word}"
        if concept is OIL:
            yield f"{word}, oil painting", f"{word}, photo"
        else:
            yield f"{word} with {concept.subjects[i % len(concept.subjects)]}", word


def trajectory(model, prompt, noise, settings):
    """What every attn2 gives at every step of DDIM for the prompt: a list of {name: [P, C]}."""
    unet, alphas = model.unet, make_scheduler().alphas_cumprod
    given = {}
    handles = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: given.__setitem__(name, output[0].double())
        )
        for name in cross_attention_names(TINY)
    ]
    context = model.encode(Prompt(prompt, prompt)).context
    empty = model.encode(Prompt("", "")).context
    x, seen = noise, []
    times = trailing_timesteps(1000, settings.sampling_steps)
    with torch.no_grad():
        for i, t in enumerate(times):
            without = unet(x, t, empty).sample
            predicted = unet(x, t, context).sample
            seen.append(dict(given))
            predicted = without + settings.guidance * (predicted - without)
            alpha = alphas[t]
            later = alphas[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0)
            clean = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
            x = later.sqrt() * clean + (1 - later).sqrt() * predicted
    for handle in handles:
        handle.remove()
    return seen


def vectors(model, concept, settings):
    """The paper's s of each layer and step, unit(mean with - mean without); then their mean."""
    differences = [{} for _ in range(settings.sampling_steps)]
    for i, pair in enumerate(texts_of(concept, settings)):
        generator = torch.Generator().manual_seed(settings.seed + i)
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        runs = [trajectory(model, prompt, noise, settings) for prompt in pair]
        for step, (having, lacking) in enumerate(zip(*runs)):
            for name in having:
                difference = having[name].mean(0) - lacking[name].mean(0)
                differences[step][name] = differences[step].get(name, 0) + difference
    found = {}
    for name in cross_attention_names(TINY):
        steps = [step[name] / step[name].norm() for step in differences]
        found[name] = sum(steps) / len(steps)
    return found


def weight_of(model, name):
    return model.unet.get_submodule(name).weight.detach().double()


def steered(model, concepts, settings):
    """(I - b S S^T) W of each layer."""
    found = [vectors(model, concept, settings) for concept in concepts]
    made = {}
    for name in cross_attention_names(TINY):
        basis = torch.linalg.qr(torch.stack([each[name] for each in found], 1)).Q
        weight = weight_of(model, f"{name}.to_out.0")
        eye = torch.eye(len(basis), dtype=torch.float64)
        made[f"{name}.to_out.0"] = (eye - settings.strength * basis @ basis.T) @ weight
    return made


@pytest.mark.parametrize(
    "concepts, settings",
    [
        ([DOG], FEW),
        ([DOG, CAR, OIL], replace(FEW, strength=2.0)),
        ([OIL], replace(FEW, strength=0.5, guidance=1.0, seed=5)),
    ],
)
def test_it_is_the_paper_as_rank_one_a_concept(model, concepts, settings, monkeypatch):
    # The words that go with a concept do not depend on the others here.
    monkeypatch.setattr(
        casteer, "keep_for", lambda _, keep, name: keep_for([DOG, CAR, OIL], keep, name)
    )
    patch = casteer.run(model, concepts, settings)
    expected = steered(model, concepts, settings)
    assert patch.changes.keys() == expected.keys()
    assert patch.ranks == [len(concepts)]
    assert patch.info["truncation_error"] == 0
    for name, (up, down) in patch.changes.items():
        weight = weight_of(model, name)
        edited = weight + up.double() @ down.double()
        # Means over float32 activations, drawn in another order.
        assert (edited - expected[name]).norm() < 1e-4 * weight.norm(), name


def test_a_projection_takes_all_concepts_out(model):
    patch = casteer.run(model, [DOG, CAR], FEW)
    for name, (up, down) in patch.changes.items():
        weight = weight_of(model, name)
        edited = weight + up.double() @ down.double()
        assert (up.double().mT @ edited).norm() < 1e-6 * weight.norm()


def test_what_the_bias_leaves(model):
    """A patch steers W a, not the bias b: it falls short of the paper by strength S S^T b."""
    patch = casteer.run(model, [DOG, CAR], replace(FEW, strength=2.0))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    module, x = model.unet.get_submodule(name), torch.randn(2, 9, 16)
    up, down = patch.changes[name]
    basis = torch.linalg.qr(up).Q
    with torch.no_grad():
        plain = module(x)
        with attached({name: FixedAdapter([(up, down, 1.0)], "cpu")}, model.unet.get_submodule):
            patched = module(x)
        paper = plain - 2 * plain @ basis @ basis.T
        left = 2 * basis @ (basis.T @ module.bias)
    assert left.norm() > 0.01
    assert torch.allclose(patched, paper + left, atol=1e-5)


@pytest.mark.parametrize("guidance, passes", [(1.0, 2), (4.0, 4)])
def test_the_number_of_forwards(model, guidance, passes):
    """pairs x steps x 2 prompts, twice that with guidance; in fewer calls with a batch."""
    casteer.run(model, [DOG], replace(FEW, guidance=guidance, batch=2))
    assert len(model.seen) == 2 * FEW.sampling_steps  # 3 pairs in batches of 2
    assert sum(len(x) for x, _, _ in model.seen) == FEW.pairs * FEW.sampling_steps * passes


def test_an_earlier_end(model):
    casteer.run(model, [DOG], replace(FEW, sampling_steps=4, end=0.5))
    times = [int(t[0]) for _, t, _ in model.seen]
    assert times == trailing_timesteps(1000, 4)[:2] * FEW.pairs


def test_the_batch_does_not_count(model):
    one, all_at_once = (casteer.run(model, [DOG], replace(FEW, batch=b)) for b in (1, 3))
    for name in one.changes:
        assert torch.allclose(one.change_of(name), all_at_once.change_of(name), atol=1e-5)


def test_the_order_of_concepts_does_not_count(model):
    first, second = (casteer.run(model, each, FEW) for each in ([DOG, OIL], [OIL, DOG]))
    for name in first.changes:
        assert torch.allclose(first.change_of(name), second.change_of(name), atol=1e-5)


def test_the_same_concept_twice_counts_once(model):
    once, twice = (casteer.run(model, each, FEW) for each in ([DOG], [DOG, DOG]))
    assert twice.ranks == [1]
    for name in once.changes:
        assert torch.allclose(once.change_of(name), twice.change_of(name), atol=1e-5)


def test_seed_and_size_count(model):
    plain, seeded, small = (
        casteer.run(model, [DOG], replace(FEW, **more)) for more in ({}, {"seed": 1}, {"size": 128})
    )
    again = casteer.run(model, [DOG], FEW)
    name = next(iter(plain.changes))
    assert torch.equal(plain.change_of(name), again.change_of(name))
    assert not torch.allclose(plain.change_of(name), seeded.change_of(name), atol=1e-3)
    assert model.seen[-1][0].shape[-1] == 8 and not torch.allclose(
        plain.change_of(name), small.change_of(name), atol=1e-3
    )


def test_prompt_pairs():
    def texts(concept, count=2, words=("apple", "a man", "Titian", "car")):
        pairs = casteer.prompt_pairs(concept, list(words), count)
        return [(pair.concept.text, pair.other.text) for pair in pairs]

    dog = Concept("dog", aliases=("puppy",))
    assert texts(dog, 5) == [
        ("an apple with dog", "an apple"),
        ("a man with puppy", "a man"),
        ("Titian with dog", "Titian"),
        ("a car with puppy", "a car"),
        ("an apple with dog", "an apple"),
    ]
    assert texts(replace(dog, anchor="cat"), 1) == [("an apple with dog", "an apple with cat")]
    assert texts(Concept("oil", "style"), 1) == [("an apple, oil", "an apple")]
    assert texts(OIL, 1) == [("an apple, oil painting", "an apple, photo")]
    assert texts(Concept("naked", "unsafe", anchor="clothed"), 1) == [
        ("an apple, naked", "an apple, clothed")
    ]
    own = Concept("dog", "custom", prompts=("my dog", "the dog's bed"), anchor="cat")
    assert texts(own, 3) == [
        ("my dog", "my cat"),
        ("the dog's bed", "the cat's bed"),
        ("an apple with dog", "an apple with cat"),
    ]
    assert texts(own, 1) == [("my dog", "my cat")]
    assert texts(replace(own, anchor=""), 1) == [("an apple with dog", "an apple")]


def test_words_for_unsafe_content_are_people(model):
    nude = Concept("nudity", "unsafe")
    words = casteer._words([nude], nude, FEW)
    assert "a man" in words and "tree" not in words
    assert "dog" not in casteer._words([DOG, CAR], CAR, FEW)


def test_the_file_is_a_plain_lora(model, tmp_path):
    patch = casteer.run(model, [DOG, OIL], FEW)
    tensors = load_file(save_patch(patch, tmp_path / "dog.safetensors"))
    for name in patch.changes:
        prefix = file_name(TINY, layers_by_name(TINY)[name])
        down, up = (
            tensors[f"{prefix}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight")
        )
        change = patch.change_of(name).double()
        assert (up @ down - change).norm() < 2e-3 * change.norm()
    wanted = [layer.name for layer in layers(TINY) if layer.name.endswith("attn2.to_out.0")]
    assert list(patch.changes) == wanted


def test_steps_are_told_and_the_model_stays_as_it_was(model):
    before, steps = weights_of(model.unet), []
    patch = casteer.run(model, [DOG, OIL], replace(FEW, batch=2), steps.append)
    assert [(step.index, step.total, len(step.losses)) for step in steps] == [
        (1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 4, 4),
    ]  # fmt: skip
    assert steps[-1].seconds_left == 0 and min(steps[-1].losses) > 0
    first, *_, last = steps[-1].losses
    assert patch.info["loss"] == {"first": first, "last": last, "steps": 4}
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


def test_cancelling(model):
    before = weights_of(model.unet)

    def cancel(step):
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        casteer.run(model, [DOG], FEW, cancel)
    assert len(model.seen) == 2 * FEW.sampling_steps
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


def test_refusals(model):
    model.poisoned = True
    with pytest.raises(ForgetError, match="not finite while pairs were drawn: load the model"):
        casteer.run(model, [DOG], FEW)
    model.poisoned = False
    long = Concept("dog", prompts=("very " * 80 + "good dog",), anchor="cat")
    with pytest.raises(ForgetError, match="is too long: shorten it to 75 tokens"):
        casteer.run(model, [long], FEW)
    with torch.no_grad():
        for name in cross_attention_names(TINY):
            model.unet.get_submodule(f"{name}.to_v").weight.zero_()
    with pytest.raises(ForgetError, match="'dog' makes no difference to cross-attention"):
        casteer.run(model, [DOG], FEW)
    assert not traces(model.unet)


def test_too_many_concepts(model):
    many = [Concept(f"word{i}") for i in range(8)]
    with pytest.raises(ForgetError, match=r"as many directions .* outputs \(8\)"):
        casteer.run(model, many, replace(FEW, pairs=1, sampling_steps=1))


@pytest.mark.parametrize(
    "changes", [{"end": 0.0}, {"guidance": 0.5}, {"pairs": 0}, {"size": 65}, {"strength": -1.0}]
)
def test_wrong_settings(changes):
    with pytest.raises(ForgetError, match=next(iter(changes))):
        replace(FEW, **changes)
