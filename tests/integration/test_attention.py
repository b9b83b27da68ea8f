import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from fmn.models.attention import attention_share, cross_attention, watch_attention

HEADS, WIDTH, TEXT = 2, 4, 6  # a head is WIDTH wide


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_module(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(
            HEADS * WIDTH, cross_attention_dim=TEXT, heads=HEADS, dim_head=WIDTH, bias=False
        )


def explicit_probabilities(module, x, context):
    """[B, H, P, T] by loops over heads."""
    q, k = module.to_q(x), module.to_k(context)
    heads = [slice(i * WIDTH, (i + 1) * WIDTH) for i in range(HEADS)]
    scores = [q[..., head] @ k[..., head].mT / WIDTH**0.5 for head in heads]
    return torch.stack(scores, dim=1).softmax(-1)


def test_output_equals_torch():
    q, k, v = random(3, 10, 8), random(3, 7, 8, seed=1), random(3, 7, 8, seed=2)
    output, _ = cross_attention(q, k, v, heads=2)
    split = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected)


def test_probabilities():
    q, k, v = random(3, 10, 8), random(3, 7, 8, seed=1), random(3, 7, 8, seed=2)
    _, probabilities = cross_attention(q, k, v, heads=2)
    assert probabilities.shape == (3, 2, 10, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 2, 10))
    # Head 1 of sample 2, by hand.
    expected = (q[2, :, 4:] @ k[2, :, 4:].T / 2).softmax(-1)
    torch.testing.assert_close(probabilities[2, 1], expected)


def test_softmax_survives_scores_beyond_float16():
    q = torch.full((1, 1, 64), 150.0, dtype=torch.float16)  # scores up to 180,000
    k = torch.cat([q, q * 0.5], dim=1)
    output, probabilities = cross_attention(q, k, k, heads=1)
    assert probabilities.dtype == torch.float32 and output.dtype == torch.float16
    assert probabilities.flatten().tolist() == [1, 0]


@pytest.fixture
def batch():
    """Two samples that flag different tokens, and different numbers of them."""
    flags = torch.zeros(2, 7, dtype=torch.bool)
    flags[0, [1, 4, 5]] = True
    flags[1, 2] = True
    return random(2, 9, HEADS * WIDTH), random(2, 7, TEXT, seed=1), flags


def watch_one(module, x, context, flags):
    with watch_attention([module], "encoder_hidden_states") as watch:
        (watched,) = watch(flags, lambda: module(x, encoder_hidden_states=context))
    return watched


def test_watcher_takes_each_samples_own_columns(batch):
    # The released code numbers columns as in the first sample, and pairs masks with other heads.
    x, context, flags = batch
    module = make_module()
    p = explicit_probabilities(module, x, context)
    expected = torch.stack([p[0, :, :, 1], p[0, :, :, 4], p[0, :, :, 5], p[1, :, :, 2]])
    watched = watch_one(module, x, context, flags)
    assert watched.shape == (4, HEADS, 9)
    torch.testing.assert_close(watched, expected)


def test_a_batch_is_its_samples(batch):
    module = make_module()
    alone = [watch_one(module, *(rows[i : i + 1] for rows in batch)) for i in (0, 1)]
    torch.testing.assert_close(watch_one(module, *batch), torch.cat(alone))


def test_watching_does_not_change_the_output(batch):
    x, context, flags = batch
    module = make_module()
    expected, outputs = module(x, encoder_hidden_states=context), []
    with watch_attention([module, make_module()], "encoder_hidden_states") as watch:
        watch(flags, lambda: outputs.append(module(x, encoder_hidden_states=context)))
    torch.testing.assert_close(outputs[0], expected)


def test_gradient_is_that_of_the_probabilities(batch):
    x, context, flags = batch
    module = make_module()
    weights = module.to_q.weight, module.to_k.weight
    ours = torch.autograd.grad(watch_one(module, x, context, flags).square().sum(), weights)
    p = explicit_probabilities(module, x, context) * flags[:, None, None]
    for gradient, expected in zip(ours, torch.autograd.grad(p.square().sum(), weights)):
        torch.testing.assert_close(gradient, expected)


def test_layers_come_in_forward_order_and_each_call_starts_anew(batch):
    x, context, flags = batch
    first, second = make_module(1), make_module(2)

    def forward():
        first(second(x, encoder_hidden_states=context), encoder_hidden_states=context)

    with watch_attention([first, second], "encoder_hidden_states") as watch:
        watched, again = watch(flags, forward), watch(flags, forward)
        one = watch(flags, lambda: first(x, encoder_hidden_states=context))
    assert [len(watched), len(again), len(one)] == [2, 2, 1]
    expected = explicit_probabilities(second, x, context).transpose(1, 3).transpose(2, 3)[flags]
    torch.testing.assert_close(watched[0], expected)
    assert torch.equal(watched[1], again[1])


def test_a_forward_ends_at_the_last_layer(batch):
    x, context, flags = batch
    first, second, passed = make_module(1), make_module(2), []

    def forward():
        passed.append(first(x, encoder_hidden_states=context))
        passed.append(second(x, encoder_hidden_states=context))

    with watch_attention([first, second], "encoder_hidden_states") as watch:
        assert len(watch(flags, forward)) == 2 and len(passed) == 1
        forward()  # unwatched
    assert len(passed) == 3


def test_nothing_is_collected_after_the_call(batch):
    # Checkpointing runs blocks again during backward; that must not add layers.
    x, context, flags = batch
    module = make_module()
    with watch_attention([module], "encoder_hidden_states") as watch:
        watched = watch(flags, lambda: module(x, encoder_hidden_states=context))
        module(x, encoder_hidden_states=context)
        assert len(watched) == 1


def test_the_context_argument_is_the_hosts(batch):
    x, context, flags = batch
    module = make_module()
    with watch_attention([module], "context") as watch:
        (watched,) = watch(flags, lambda: module(x, context=context, value=None))
    torch.testing.assert_close(watched, watch_one(module, x, context, flags))


@pytest.mark.parametrize("failing", [False, True])
def test_forwards_are_put_back(batch, failing):
    plain, patched = make_module(1), make_module(2)

    def own(x, **arguments):
        return "own forward"

    patched.forward = own
    try:
        with watch_attention([plain, patched], "encoder_hidden_states"):
            assert "forward" in vars(plain) and patched.forward is not own
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "forward" not in vars(plain)
    assert patched.forward is own and patched(None) == "own forward"


def test_forwards_are_put_back_when_replacing_fails():
    module = make_module()
    with pytest.raises(AttributeError), watch_attention([module, None], "context"):
        pass
    assert "forward" not in vars(module)


def test_watcher_works_on_after_an_error(batch):
    x, context, flags = batch
    module = make_module()

    def fails():
        module(x, encoder_hidden_states=context)
        raise ValueError

    with watch_attention([module, make_module()], "encoder_hidden_states") as watch:
        with pytest.raises(ValueError):
            watch(flags, fails)
        assert len(watch(flags, lambda: module(x, encoder_hidden_states=context))) == 1


def test_attention_share():
    # Two tokens with 0.1 and 0.3 in a layer of 1 head and 2 pixels, nothing in one of 2 and 3.
    layer = torch.tensor([[[0.1, 0.1]], [[0.3, 0.3]]])
    assert attention_share([layer]) == pytest.approx(0.4)
    assert attention_share([layer, torch.zeros(2, 2, 3)]) == pytest.approx(0.2)


def test_attention_share_of_all_tokens_is_one(batch):
    x, context, flags = batch
    watched = watch_one(make_module(), x[:1], context[:1], torch.ones_like(flags[:1]))
    assert attention_share([watched]) == pytest.approx(1)
