"""ESD against the released training step written out once more, and what surrounds it."""

import copy
from dataclasses import replace

import pytest
import torch

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.methods.esd import PRESETS, Batches, Settings, equal_lengths, prepare, run
from fmn.models.adapters import Switch
from fmn.models.families import layers
from fmn.models.interface import Text
from fmn.models.sampling import DDPMSchedule
from fmn.training import fit_adapters
from fmn.training.losses import esd
from fmn.training.memory import Activations

from ..tiny import TINY, TinyModel, make_scheduler

DOG = Concept("dog", aliases=("puppy",))
MUSK = Concept("elon musk", "identity")
QUICK = Settings(steps=3, sampling_steps=3)
ALPHAS = make_scheduler().alphas_cumprod


def texts_of(model, *prompts):
    return [model.encode(Prompt(prompt, prompt)).context for prompt in prompts]


def calls_by_step(model):
    """The U-Net's inputs by training step; each ends with the one that has a gradient."""
    parts, part = [], []
    for x_t, t, text in model.seen[1:-1]:  # the first and the last look at the attention
        part.append((x_t, t.tolist(), text.context))
        if len(x_t) == 1:
            parts.append(part)
            part = []
    assert not part
    return parts


def released_run(model, settings, steps):
    """The released codes' loop on a copy of the U-Net, with full weights of cross-attention.

    Args:
        steps: what each step drew: the context of the prompt to draw, the first noise, the number
            k of DDIM steps, and t.

    Returns:
        losses, the first step's gradients and the final changes by layer, and each x_t.
    """
    frozen, edited = model.unet, copy.deepcopy(model.unet)
    empty, concept = texts_of(model, "", "a photo of dog")
    names = [layer.name for layer in layers(TINY) if ".attn2." in layer.name]
    weights = [edited.get_submodule(name).weight for name in names]
    adam = torch.optim.Adam(weights, lr=settings.lr)
    losses, drawn, gradients = [], [], None
    count = settings.sampling_steps
    for c_from, x, k, t in steps:
        drawer = frozen if settings.sample_from == "frozen" else edited
        with torch.no_grad():
            for i in range(k):
                now = 999 - i * 1000 // count
                a, a_next = ALPHAS[now], ALPHAS[999 - (i + 1) * 1000 // count]
                e_0 = drawer(x, now, empty).sample
                e = e_0 + settings.guidance * (drawer(x, now, c_from).sample - e_0)
                x = a_next.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a_next).sqrt() * e
            drawn.append(x)
            e_from = frozen(x, t, c_from).sample
            e_p, e_0 = frozen(x, t, concept).sample, frozen(x, t, empty).sample
        e_n = edited(x, t, c_from).sample
        loss = torch.nn.MSELoss()(e_n, e_from - settings.eta * (e_p - e_0))
        if settings.erase_from == "":  # the form of 2023
            paper = torch.nn.MSELoss()(e_n, e_0 - (settings.eta - 1) * (e_p - e_0))
            torch.testing.assert_close(loss, paper)
        adam.zero_grad()
        loss.backward()
        gradients = gradients or [weight.grad.clone() for weight in weights]
        adam.step()
        losses.append(loss.item())
    changes = [
        weight.detach() - frozen.get_submodule(name).weight for name, weight in zip(names, weights)
    ]
    return losses, dict(zip(names, gradients)), dict(zip(names, changes)), drawn


CASES = {
    "current": Settings(eta=2.0),
    "paper": Settings(sample_from="edited", timesteps="bin"),
    "erase from": Settings(eta=1.5, erase_from="a cowboy"),
}


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """Without the forward pass that estimates memory, which the model would see too."""
    monkeypatch.setattr(fit_adapters, "measure_activations", lambda *given: Activations(0, 0))


@pytest.mark.parametrize("case", CASES)
def test_the_released_training_step(case, monkeypatch):
    monkeypatch.setattr(fit_adapters, "MEASUREMENTS", 1)
    settings = replace(
        CASES[case], steps=4, lr=2e-3, full_weights=True, rank=16, sampling_steps=5, seed=1
    )
    model, caught, losses = TinyModel(), {}, []

    def make_adapters(*args):
        caught["adapters"] = original(*args)
        return caught["adapters"]

    def on_step(step):
        losses[:] = step.losses
        if step.index == 1:
            caught["gradients"] = {
                name: adapter.change.grad.clone() for name, adapter in caught["adapters"].items()
            }

    original = fit_adapters.make_adapters
    monkeypatch.setattr(fit_adapters, "make_adapters", make_adapters)
    run(model, [Concept("dog")], settings, on_step)

    c_from = texts_of(model, settings.erase_from or "a photo of dog")[0]
    seen = calls_by_step(model)
    model.seen = []
    steps = [(c_from, calls[0][0][:1], len(calls) - 2, calls[-1][1][0]) for calls in seen]
    assert len(steps) == 4 and len({k for _, _, k, _ in steps}) > 1
    expected, gradients, changes, drawn = released_run(model, settings, steps)

    for calls, x_t, (_, _, k, t) in zip(seen, drawn, steps):
        torch.testing.assert_close(calls[-1][0], x_t, rtol=1e-3, atol=1e-4)
        assert calls[-2][1] == [t] * len(calls[-2][0])
        if settings.timesteps == "exact":
            assert t == 999 - 200 * k
        else:
            assert 800 - 200 * k <= t <= 999 - 200 * k
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-4, atol=0)
    for name, gradient in gradients.items():
        ours, scale = caught["gradients"][name], float(gradient.abs().max())
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-4 * scale)
    for name, change in changes.items():
        # Adam divides by the gradient's size, which lifts rounding noise where gradients vanish.
        ours = caught["adapters"][name].change.detach()
        assert (ours - change).norm() <= 0.05 * change.norm()


def test_drawing_with_the_edited_model_is_another_drawing(monkeypatch):
    """So that the test above can tell the two apart."""
    monkeypatch.setattr(fit_adapters, "MEASUREMENTS", 1)
    last = {}
    for which in ("frozen", "edited"):
        model = TinyModel()
        settings = Settings(steps=4, lr=2e-3, sampling_steps=5, seed=1, sample_from=which)
        run(model, [Concept("dog")], settings)
        last[which] = calls_by_step(model)
    differences = [
        float((a[-1][0] - b[-1][0]).abs().max()) for a, b in zip(last["frozen"], last["edited"])
    ]
    assert differences[0] == 0 and max(differences) > 0.01


def test_eta_of_the_current_code_is_the_papers_plus_one():
    generator = torch.Generator().manual_seed(0)
    predicted, concept, empty = (
        torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    for eta in (0.0, 1.0, 3.5):
        paper = (predicted - (empty - eta * (concept - empty))).square().mean()
        ours = esd(predicted, concept, concept, empty, eta + 1)
        torch.testing.assert_close(ours.double(), paper, rtol=1e-5, atol=0)


def test_half_predictions_are_compared_in_float32():
    big = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    loss = esd(big, -big, -big, big, 2.0)
    # 300 - (-300 + 2 * 600) = -600, whose square float16 cannot hold.
    assert loss.dtype == torch.float32 and loss.item() == 360_000


def test_presets():
    assert list(PRESETS)[0] == "esd" and PRESETS["esd"] == Settings()
    assert PRESETS["esd-u"] == Settings(layers="u")
    paper, current = PRESETS["esd-paper"], PRESETS["esd-2025"]
    assert (paper.steps, paper.lr, paper.eta, paper.sampling_steps) == (1000, 1e-5, 2.0, 50)
    assert (paper.sample_from, paper.timesteps, paper.full_weights) == ("edited", "bin", True)
    assert (current.steps, current.lr, current.eta, current.sampling_steps) == (200, 5e-5, 2.0, 50)
    assert (current.sample_from, current.timesteps) == ("frozen", "exact")
    for settings in (paper, current):
        assert (settings.layers, settings.guidance, settings.batch) == ("x", 3.0, 1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "xattn"}, "layers is 'xattn': choose one of x, x-strict, u, all"),
        ({"sample_from": "other"}, "choose one of frozen, edited"),
        ({"timesteps": "all"}, "choose one of exact, bin"),
        ({"eta": -1.0}, "eta is -1"),
        ({"sampling_steps": 0}, "sampling_steps is 0: use 1 to 1000"),
        ({"guidance": 101.0}, "guidance is 101"),
        ({"erase_from": 3}, "erase_from is 3"),
        ({"size": 100}, "use a multiple of 64"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ForgetError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize("scope, count", [("x", 28), ("x-strict", 14), ("u", 91), ("all", 119)])
def test_scopes(scope, count):
    patch = run(TinyModel(), [DOG], replace(QUICK, steps=1, layers=scope))
    names = list(patch.changes)
    assert len(names) == count
    attention = [name for name in names if ".attn2." in name]
    assert len(attention) == {"x": 28, "x-strict": 14, "u": 0, "all": 28}[scope]
    if scope == "x-strict":
        assert all(name.endswith((".to_k", ".to_v")) for name in names)
    assert any(up.any() for up, _ in patch.changes.values())


class Quiet:
    """A U-Net of eight time steps that predicts nothing, and counts."""

    device = torch.device("cpu")
    schedule = DDPMSchedule(torch.linspace(0.99, 0.1, 8))

    def __init__(self):
        self.calls = []

    def predict_noise(self, x_t, t, text):
        self.calls.append((len(x_t), int(t[0])))
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("timesteps, found", [("exact", {7, 5, 3, 1}), ("bin", set(range(8)))])
def test_time_steps_and_the_length_of_drawings(timesteps, found):
    """k is uniform; a drawing is no longer than k pairs, and t is in the k-th bin."""
    denoiser, settings = Quiet(), Settings(sampling_steps=4, timesteps=timesteps)
    examples = prepare(TinyModel(), [DOG], settings)
    draws, times, counts = Batches(examples, settings, denoiser, Switch(), 2), set(), [0] * 4
    for _ in range(300):
        denoiser.calls.clear()
        _, x_t, t = draws()
        k = len(denoiser.calls)
        assert denoiser.calls == [(2, 7 - 2 * i) for i in range(k)]
        assert t in (7 - 2 * k, 6 - 2 * k) and x_t.shape == (1, 4, 2, 2)
        times.add(t)
        counts[k] += 1
    assert times == found and min(counts) > 40


def test_concepts_and_prompts_take_turns():
    settings = Settings(sampling_steps=1)
    model = TinyModel()
    examples = prepare(model, [DOG, MUSK], settings)
    assert [len(own) for own in examples] == [2, 1]
    draws = Batches(examples, settings, Quiet(), Switch(), 2)
    owner = {id(each): index for index, own in enumerate(examples) for each in own}
    drawn = [draws()[0] for _ in range(12)]
    turns = [owner[id(example)] for example in drawn]
    assert all(sorted(turns[i : i + 2]) == [0, 1] for i in range(0, 12, 2))
    assert len({tuple(turns[i : i + 2]) for i in range(0, 12, 2)}) == 2  # shuffled
    dogs = [id(example) for example in drawn if owner[id(example)] == 0]
    assert all(len(set(dogs[i : i + 2])) == 2 for i in range(0, 6, 2))


def test_forwards_of_a_step(monkeypatch):
    """k pairs to draw, all frozen predictions at once, and the one with a gradient."""
    monkeypatch.setattr(fit_adapters, "MEASUREMENTS", 1)
    model = TinyModel()
    empty, concept, source = texts_of(model, "", "a photo of elon musk", "a man")
    for erase_from, frozen in (("", [concept, empty]), ("a man", [source, concept, empty])):
        model.seen = []
        run(model, [MUSK], replace(QUICK, batch=2, erase_from=erase_from, steps=2, seed=2))
        *pairs, together, last = (text.context for _, _, text in model.seen[1:-1][-4:])
        expected = torch.cat([text.expand(2, -1, -1) for text in frozen])
        assert torch.equal(together, expected)
        assert torch.equal(last, frozen[0].expand(2, -1, -1))
        drawn = torch.cat([frozen[0].expand(2, -1, -1), empty.expand(2, -1, -1)])
        assert pairs and all(torch.equal(pair, drawn) for pair in pairs)


def test_no_guidance_draws_with_one_forward():
    denoiser, settings = Quiet(), Settings(sampling_steps=4, guidance=1.0, batch=3)
    draws = Batches(prepare(TinyModel(), [DOG], settings), settings, denoiser, Switch(), 2)
    for _ in range(5):
        draws()
    assert denoiser.calls and {count for count, _ in denoiser.calls} == {3}


def test_repeating_a_whole_context_changes_nothing():
    model = TinyModel()
    long, short = (Text(text) for text in texts_of(model, "very " * 80 + "dog", "a dog"))
    assert long.context.shape[1] == 154
    _, wide = equal_lengths([long, short])
    assert wide.context.shape[1] == 154
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([9])
    with model.borrow_denoiser() as denoiser:
        plain, repeated = (denoiser.predict_noise(x_t, t, text) for text in (short, wide))
    torch.testing.assert_close(repeated, plain, rtol=1e-4, atol=1e-5)


def test_prompts_of_several_sections():
    concept = Concept("dog", prompts=("very " * 80 + "dog",))
    patch = run(TinyModel(), [concept], replace(QUICK, steps=4))
    assert patch.info["loss"]["steps"] == 4
