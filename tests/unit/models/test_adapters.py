import copy

import pytest
import torch
from torch import nn

from fmn.linalg import full_change, truncate_matrix
from fmn.models.adapters import FullAdapter, LowRankAdapter, attached


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 8, 8)),
    "downsampler": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "no padding": (lambda: nn.Conv2d(6, 5, 3), (2, 6, 8, 8)),
    "1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 8, 8)),
}


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "-"))
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), random(*shape, seed=1)


def with_adapter(layer, adapter, x):
    with attached({"layer": adapter}, {"layer": layer}.__getitem__):
        return layer(x)


def with_weight(layer, change, x):
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight += change
    return other(x)


def test_starts_at_zero_change(layer_and_input):
    layer, x = layer_and_input
    for adapter in (LowRankAdapter(layer, 2, rng(), "cpu"), FullAdapter(layer, "cpu")):
        assert torch.equal(with_adapter(layer, adapter, x), layer(x))


def test_low_rank_is_w_plus_up_down(layer_and_input):
    layer, x = layer_and_input
    adapter = LowRankAdapter(layer, 2, rng(), "cpu")
    adapter.up.data = random(*adapter.up.shape, seed=2)
    # The product as a sum over ranks of outer products, whatever the layer's dimensions.
    change = sum(
        torch.tensordot(adapter.up.detach().flatten(1)[:, r], adapter.down.detach()[r], dims=0)
        for r in range(2)
    )
    expected = with_weight(layer, change, x)
    torch.testing.assert_close(with_adapter(layer, adapter, x), expected)
    torch.testing.assert_close(full_change(adapter.up.detach(), adapter.down.detach()), change)
    assert adapter.factors(4)[2] == 0.0


def test_full_is_w_plus_change(layer_and_input):
    layer, x = layer_and_input
    adapter = FullAdapter(layer, "cpu")
    adapter.change.data = random(*layer.weight.shape, seed=2)
    expected = with_weight(layer, adapter.change.detach(), x)
    torch.testing.assert_close(with_adapter(layer, adapter, x), expected)


def test_full_has_the_gradient_of_w(layer_and_input):
    layer, x = layer_and_input
    adapter = FullAdapter(layer, "cpu")
    with_adapter(layer, adapter, x).square().sum().backward()
    ours, layer.weight.grad = adapter.change.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(ours, layer.weight.grad)


def test_low_rank_starts_with_a_gradient(layer_and_input):
    # With down random and up zero, only up moves at first: d/d(up) = d/dW @ down^T.
    layer, x = layer_and_input
    adapter = LowRankAdapter(layer, 2, rng(), "cpu")
    with_adapter(layer, adapter, x).square().sum().backward()
    expected = layer.weight.grad.flatten(1) @ adapter.down.detach().flatten(1).mT
    torch.testing.assert_close(adapter.up.grad.flatten(1), expected)
    assert adapter.down.grad.abs().max() == 0


def test_factors_fit_the_layer():
    conv = LowRankAdapter(nn.Conv2d(6, 5, 3), 2, rng(), "cpu")
    assert (conv.up.shape, conv.down.shape) == ((5, 2, 1, 1), (2, 6, 3, 3))
    # A layer of 4 inputs has no change of a higher rank.
    linear = LowRankAdapter(nn.Linear(4, 8), 16, rng(), "cpu")
    assert (linear.up.shape, linear.down.shape) == ((8, 4), (4, 4))


def test_down_keeps_the_size_of_activations():
    for layer in (nn.Linear(768, 320), nn.Conv2d(64, 32, 3)):
        down = LowRankAdapter(layer, 4, rng(), "cpu").down.detach()
        assert float(down.flatten(1).norm(dim=1).mean()) == pytest.approx(1, rel=0.05)


def test_start_depends_on_the_generator_alone():
    layer = nn.Linear(6, 5)
    first, second, other = (LowRankAdapter(layer, 2, rng(seed), "cpu").down for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_parameters_are_float32_whatever_the_layer_is():
    layer, x = nn.Linear(6, 5).bfloat16(), random(2, 6).bfloat16()
    for adapter in (LowRankAdapter(layer, 2, rng(), "cpu"), FullAdapter(layer, "cpu")):
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        assert with_adapter(layer, adapter, x).dtype == torch.bfloat16


def test_only_the_named_layers_change():
    layers = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    adapters = {name: FullAdapter(layer, "cpu") for name, layer in layers.items()}
    adapters["one"].change.data.fill_(1)
    x = random(2, 3)
    with attached(adapters, layers.get_submodule):
        changed = layers["one"](x), layers["two"](x)
    torch.testing.assert_close(changed[0], layers["one"](x) + x.sum(1, keepdim=True))
    assert torch.equal(changed[1], layers["two"](x))


@pytest.mark.parametrize("failing", [False, True])
def test_hooks_are_gone_afterwards(failing):
    layer, x = nn.Linear(3, 3), random(2, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)  # not ours: stays
    before, adapter = layer(x), FullAdapter(layer, "cpu")
    adapter.change.data.fill_(1)
    try:
        with attached({"layer": adapter}, lambda name: layer):
            assert not torch.equal(layer(x), before)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(layer(x), before)
    assert len(layer._forward_hooks) == 1


def test_hooks_are_gone_when_a_layer_is_missing():
    layer = nn.Linear(3, 3)
    adapters = {"layer": FullAdapter(layer, "cpu"), "missing": FullAdapter(layer, "cpu")}
    with pytest.raises(KeyError), attached(adapters, {"layer": layer}.__getitem__):
        pass
    assert not layer._forward_hooks


def of_spectrum(values, rows, columns, seed=0):
    """A matrix with these singular values."""
    left = torch.linalg.qr(random(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(random(columns, len(values), seed=seed + 1)).Q
    return left * torch.tensor(values) @ right.mT


def best_error(matrix, rank):
    """Eckart-Young: the norm of the singular values that are cut off."""
    s = torch.linalg.svdvals(matrix.double())
    return float(s[rank:].norm() / s.norm())


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("decay", [0.5, 0.8, 0.95])
def test_truncate_cuts_off_the_tail_and_no_more(decay, rank):
    matrix = of_spectrum([decay**i for i in range(48)], 64, 48)
    up, down, error = truncate_matrix(matrix, rank)
    assert (up.shape, down.shape) == ((64, rank), (rank, 48))
    best = best_error(matrix, rank)
    assert best * (1 - 1e-4) <= error <= best * 1.001 + 1e-6
    assert float((matrix - up @ down).norm() / matrix.norm()) == pytest.approx(error, rel=1e-3)


def test_truncate_of_a_flat_spectrum():
    # The worst case for subspace iteration: noise.
    matrix = random(320, 768)
    error = truncate_matrix(matrix, 4)[2]
    best = best_error(matrix, 4)
    assert best * (1 - 1e-6) <= error <= best * 1.002


def test_truncate_is_torchs_svd():
    matrix = of_spectrum([8.0, 4.0, 2.0, 1.0, 0.5], 20, 30)
    up, down, _ = truncate_matrix(matrix, 3)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(up @ down, u[:, :3] * s[:3] @ vh[:3], atol=1e-5, rtol=1e-4)
    # The singular values are shared evenly.
    torch.testing.assert_close(up.norm(dim=0), s[:3].sqrt(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(down.norm(dim=1), s[:3].sqrt(), atol=1e-4, rtol=1e-4)


def test_truncate_is_exact_for_low_rank():
    matrix = random(40, 3) @ random(3, 50, seed=1)
    up, down, error = truncate_matrix(matrix, 4)
    torch.testing.assert_close(up @ down, matrix, atol=1e-4, rtol=1e-4)
    assert error < 1e-5


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (3, 3), (1, 1)])
def test_truncate_to_more_than_there_is(shape):
    matrix = random(*shape)
    up, down, error = truncate_matrix(matrix, 16)
    assert up.shape[1] == down.shape[0] == min(shape)
    torch.testing.assert_close(up @ down, matrix, atol=1e-5, rtol=1e-4)
    assert error < 1e-5


def test_truncate_convolution():
    change = of_spectrum([2.0**-i for i in range(12)], 12, 8 * 9).unflatten(1, (8, 3, 3))
    up, down, error = truncate_matrix(change, 5)
    assert (up.shape, down.shape) == ((12, 5, 1, 1), (5, 8, 3, 3))
    assert error == pytest.approx(best_error(change.flatten(1), 5), rel=1e-3)
    difference = full_change(up, down) - change
    assert float(difference.norm() / change.norm()) == pytest.approx(error, rel=1e-3)


def test_truncate_zero():
    up, down, error = truncate_matrix(torch.zeros(12, 20), 4)
    assert error == 0.0
    assert torch.equal(up @ down, torch.zeros(12, 20))


def test_truncate_is_the_same_every_time():
    matrix = random(30, 20)
    torch.manual_seed(0)
    first = truncate_matrix(matrix, 4)
    torch.manual_seed(1)
    second = truncate_matrix(matrix, 4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_global_generator_is_left_alone():
    layer, matrix = nn.Conv2d(3, 4, 3), random(30, 20)
    state = torch.get_rng_state()
    LowRankAdapter(layer, 2, rng(), "cpu")
    FullAdapter(layer, "cpu")
    truncate_matrix(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_merge_is_float32():
    up, down = random(5, 2).half(), random(2, 6, 3, 3, seed=1).half()
    merged = full_change(up[:, :, None, None], down)
    expected = torch.einsum("or,rikl->oikl", up.float(), down.float())
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, expected)
