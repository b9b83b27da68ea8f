"""What cross-attention reads out of texts, against the tiny U-Net and attention in loops."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fmn.concepts.concept import Prompt
from fmn.methods.reread import attention_output
from fmn.methods.reread.attention_output import (
    cross_attention_layers,
    read_out,
    record_queries,
    recorded,
)
from fmn.models.families import cross_attention_names
from fmn.models.sampling import trailing_timesteps

from ..literal import near
from ..tiny import TINY, TinyDenoiser, TinyModel, make_scheduler, same_tensors, traces, weights_of

NAMES = cross_attention_names(TINY)
PROMPTS = "a dog on grass", "red car", "", "a man with a hat at sunset", "blue house"
ALL = 1024  # more places than a layer has


@pytest.fixture
def model():
    return TinyModel()


@contextmanager
def watched(unet, suffix, inputs=False):
    """Collects (name, tensor) of each call of the layers that end like that, in order."""
    seen = []

    def hook_of(name):
        return lambda module, args, output: seen.append((name, args[0] if inputs else output))

    modules = {name: unet.get_submodule(name + suffix) for name in NAMES}
    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def forward(model, prompts, dtype=torch.float32):
    """Queries and inputs of to_out of one forward: layer name -> [B, S, C] each."""
    unet = model.unet.to(dtype)
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ends = watched(unet, ".to_q"), watched(unet, ".to_out.0", inputs=True)
    with torch.no_grad(), ends[0] as queries, ends[1] as read:
        unet(noise.to(dtype), 500, model.encode_all(prompts).to(dtype))
    assert [name for name, _ in queries] == [name for name, _ in read] == NAMES
    return dict(queries), dict(read)


def read_by_loops(module, queries, context):
    """o of queries [S, C] and one text [T, D]: softmax_t(q . W_k c_t / sqrt(d)) and W_v, float64.

    Head by head, place by place.
    """
    keys, values = (part.weight.detach().double() for part in (module.to_k, module.to_v))
    width, found = len(keys) // module.heads, []
    for q in queries.double():
        out = []
        for head in range(module.heads):
            rows = slice(head * width, (head + 1) * width)
            scores = [
                float(q[rows] @ keys[rows] @ token) / math.sqrt(width) for token in context.double()
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            x = sum(w * token for w, token in zip(weights, context.double())) / sum(weights)
            out.append(values[rows] @ x)
        found.append(torch.cat(out))
    return torch.stack(found)


def test_layers_are_those_of_the_model(model):
    found = cross_attention_layers(TinyDenoiser(model), TINY)
    assert [layer.name for layer in found] == NAMES and len(NAMES) == 7
    for layer in found:
        module = model.unet.get_submodule(layer.name)
        for heads, part in ((layer.key, module.to_k), (layer.value, module.to_v)):
            assert module.heads == 2 and heads.shape == (2, part.weight.shape[0] // 2, 12)
            assert torch.equal(heads.flatten(0, 1), part.weight) and not heads.requires_grad


def test_layers_of_a_half_precision_model_are_float32(model):
    model.unet.half()
    layer = cross_attention_layers(TinyDenoiser(model), TINY)[0]
    assert layer.key.dtype == layer.value.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_it_is_what_the_model_reads_out_of_its_own_text(model, at_once, monkeypatch):
    monkeypatch.setattr(attention_output, "TEXTS_AT_ONCE", at_once)
    queries, read = forward(model, PROMPTS)
    contexts = model.encode_all(PROMPTS)
    sizes = []
    for layer in cross_attention_layers(TinyDenoiser(model), TINY):
        found = read_out(layer, queries[layer.name], contexts)
        expected = read[layer.name]
        assert found.shape == expected.shape
        # Every place of every text by itself.
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(errors.max()) < 1e-5, layer.name
        sizes.append(found.shape[1:])
    assert set(sizes) == {(64, 8), (16, 16)}


def test_it_is_what_the_model_would_read_out_of_another_text(model):
    """The same queries beside another text, in the model itself and in loops."""
    queries, _ = forward(model, PROMPTS[:2], torch.float64)
    others = model.encode_all(["a ship in the rain", "monet"]).double()
    layers = cross_attention_layers(TinyDenoiser(model), TINY)
    for layer in layers:
        module = model.unet.get_submodule(layer.name)
        found = read_out(layer, queries[layer.name], others)
        for text, context in enumerate(others):
            by_loops = read_by_loops(module, queries[layer.name][text, ::7], context)
            near(found[text, ::7].double(), by_loops, 1e-5)
        handle = module.to_q.register_forward_hook(lambda *_: queries[layer.name])  # noqa: B023
        with torch.no_grad(), watched(model.unet, ".to_out.0", inputs=True) as read:
            module(torch.zeros_like(queries[layer.name]), encoder_hidden_states=others)
        handle.remove()
        near(found.double(), read[0][1], 1e-5)


def settings_of(**more):
    given = {"sampling_steps": 3, "guidance": 1.0, "query_positions": 5, "seed": 7}
    return SimpleNamespace(**given | more)


def record(model, settings, prompts=PROMPTS[:3], batch=2, **more):
    with model.borrow_denoiser() as denoiser:
        texts = [model.encode(Prompt(text, text)) for text in prompts]
        empty = model.encode(Prompt("", ""))
        return record_queries(denoiser, TINY, texts, empty, settings, 8, batch, **more)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_recorded(model, batch, guidance):
    """Places are drawn by one generator, call after call, and are the same for a whole batch."""
    settings = settings_of(guidance=guidance)
    with watched(model.unet, ".to_q") as calls:
        found = record(model, settings, batch=batch)
    batches = [range(3)[first : first + batch] for first in range(0, 3, batch)]
    assert len(calls) == len(batches) * 3 * len(NAMES)
    generator, calls = torch.Generator().manual_seed(7), iter(calls)
    expected = {name: [[] for _ in range(3)] for name in NAMES}
    for texts in batches:
        for _ in range(3 * len(NAMES)):
            name, output = next(calls)
            places = torch.randperm(output.shape[1], generator=generator)[:5]
            for row, text in enumerate(texts):  # without the rows of the empty prompt behind
                expected[name][text] += [output[row, place] for place in places]
    assert list(found) == NAMES
    for name in NAMES:
        assert torch.equal(found[name], torch.stack([torch.stack(x) for x in expected[name]]))
        assert found[name].shape == (3, 3 * 5, found[name].shape[2])


@pytest.mark.parametrize("guidance, doubled", [(1.0, 1), (3.0, 2)])
def test_the_number_of_forwards(model, guidance, doubled):
    record(model, settings_of(guidance=guidance), batch=2)
    assert len(model.seen) == 2 * 3  # two batches of three steps
    # The last step has no guidance.
    sizes = [2 * doubled, 2 * doubled, 2, doubled, doubled, 1]
    assert [len(x) for x, _, _ in model.seen] == sizes
    assert [int(t[0]) for _, t, _ in model.seen] == trailing_timesteps(1000, 3) * 2
    contexts = model.encode_all(PROMPTS[:3])
    empty = model.encode_all([""])
    own = [contexts[:2]] * 3 + [contexts[2:]] * 3
    for (x, _, text), texts in zip(model.seen, own):
        beside = [empty] * (len(x) - len(texts))
        assert torch.equal(text.context, torch.cat([texts, *beside]))


def drawn_by_hand(model, prompt, noise, settings):
    """Queries of DDIM for one prompt, one sample a forward: layer name -> [steps][S, C]."""
    alphas, times = (
        make_scheduler().alphas_cumprod,
        trailing_timesteps(1000, settings.sampling_steps),
    )
    text, empty = (model.encode_all([each]) for each in (prompt, ""))
    found = {name: [] for name in NAMES}
    x = noise
    with torch.no_grad():
        for i, t in enumerate(times):
            without = model.unet(x, t, empty).sample
            with watched(model.unet, ".to_q") as seen:
                predicted = model.unet(x, t, text).sample
            for name, output in seen:
                found[name].append(output[0])
            predicted = without + settings.guidance * (predicted - without)
            later = alphas[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0)
            clean = (x - (1 - alphas[t]).sqrt() * predicted) / alphas[t].sqrt()
            x = later.sqrt() * clean + (1 - later).sqrt() * predicted
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_i_starts_from_the_noise_of_seed_plus_i(model, guidance):
    settings = settings_of(guidance=guidance, query_positions=1)
    found = record(model, settings, batch=2)
    for i, prompt in enumerate(PROMPTS[:3]):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7 + i))
        expected = drawn_by_hand(model, prompt, noise, settings)
        for name in NAMES:
            for step, whole in enumerate(expected[name]):
                # The one place taken is one of the picture's.
                errors = (whole - found[name][i, step]).norm(dim=1) / whole.norm(dim=1)
                assert float(errors.min()) < 1e-4, (name, step)


def test_the_batch_changes_which_places_are_taken_and_not_their_queries(model):
    settings = settings_of(query_positions=ALL, guidance=3.0)
    one, all_at_once = (record(model, settings, batch=batch) for batch in (1, 3))
    for name in NAMES:
        places = one[name].shape[1] // 3
        assert places == (64 if one[name].shape[2] == 8 else 16)
        # Taken in another order, so compare each step's numbers by size.
        first, second = (
            each[name].unflatten(1, (3, places)).sort(2).values for each in (one, all_at_once)
        )
        assert torch.allclose(first, second, atol=1e-4)
    few, same = (record(model, settings_of(), batch=batch) for batch in (1, 3))
    # The first text is the first in either batch.
    assert torch.allclose(few[NAMES[0]][0, :5], same[NAMES[0]][0, :5], atol=1e-4)
    assert not torch.allclose(few[NAMES[0]][1, :5], same[NAMES[0]][1, :5], atol=1e-2)


def test_the_same_seed_gives_the_same(model):
    first, again = (record(model, settings_of()) for _ in range(2))
    assert same_tensors(first, again)
    other = record(model, settings_of(seed=8))
    assert all(not torch.allclose(first[name], other[name], atol=1e-2) for name in NAMES)


def test_places_are_no_more_than_there_are(model):
    shapes = {
        name: tuple(q.shape) for name, q in record(model, settings_of(query_positions=20)).items()
    }
    assert set(shapes.values()) == {(3, 3 * 20, 8), (3, 3 * 16, 16)}


def test_a_half_precision_model_gives_float32(model):
    model.unet.bfloat16()
    assert all(q.dtype == torch.float32 for q in record(model, settings_of()).values())


def test_the_model_stays_as_it_was(model):
    before, done = weights_of(model.unet), []
    record(model, settings_of(), on_batch=lambda: done.append(len(model.seen)))
    assert done == [3, 6]  # after each batch
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


def test_cancelling(model):
    before = weights_of(model.unet)

    def cancel():
        assert len(traces(model.unet)) == len(NAMES)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, settings_of(), on_batch=cancel)
    assert len(model.seen) == 3
    assert same_tensors(before, weights_of(model.unet)) and not traces(model.unet)


def test_recorded_drops_what_it_gave(model):
    with model.borrow_denoiser() as denoiser, recorded(denoiser, TINY, 2, 0) as taken:
        for count in (1, 3):
            for _ in range(count):
                forward(model, PROMPTS[:3])
            assert {tuple(q.shape[:2]) for q in taken(2).values()} == {(2, 2 * count)}
    assert not traces(model.unet)
