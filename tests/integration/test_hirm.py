"""HiRM against its equations with full matrices, on the demo model's text encoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import hirm
from fmn.methods.hirm import PRESETS, Settings
from fmn.models.families import DEMO, SD1, SD2, SDXL, layers_by_name, text_layers
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import load_patch, save_patch
from tests.unit.tiny import same_tensors, weights_of

FIRST = [layer.name for layer in text_layers(DEMO) if ".layers.0." in layer.name]
LAST = "text_encoder.text_model.encoder.layers.2.self_attn.out_proj"
QUICK = {"steps": 4, "preserve": 0.0}


@pytest.fixture(scope="module")
def model():
    return DiffusersModel.load("demo")


def output(model, text):
    """What the last block's attention puts out, [1, 77, 128]."""
    ids = model.pipeline.tokenizer(text, padding="max_length", max_length=77).input_ids
    found = []
    hook = model.text_module(LAST).register_forward_hook(lambda m, args, out: found.append(out))
    model.pipeline.text_encoder(torch.tensor([ids]))
    hook.remove()
    return found[0]


def paper(prompts, target_of, steps, lr):
    """Train the weights of the first block themselves; returns their changes and the losses."""
    model = DiffusersModel.load("demo")
    model.pipeline.text_encoder.requires_grad_(False)
    weights = {name: model.text_module(name).weight for name in FIRST}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        targets = {prompt: target_of(model, prompt) for prompt in prompts}
    for weight in weights.values():
        weight.requires_grad_()
    adamw = torch.optim.AdamW(weights.values(), lr, (0.9, 0.98), weight_decay=0.0, eps=1e-6)
    losses = []
    for step in range(steps):
        prompt = prompts[step % len(prompts)]
        loss = F.mse_loss(output(model, prompt), targets[prompt])
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    return {name: weights[name].detach() - before[name] for name in FIRST}, losses


def noise(model, prompt):
    drawn = torch.rand(1, 77, 128, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm() * 500


def anchored(anchor):
    return lambda model, prompt: output(model, anchor)


CASES = {
    "noise": (Concept("dog"), "hirm-r", ["dog"], noise),
    "anchor": (Concept("dog", anchor="cat"), "hirm-s", ["dog"], anchored("cat")),
    "no anchor": (Concept("dog"), "hirm-s", ["dog"], anchored("")),
    "alias": (
        Concept("dog", aliases=("puppy",), anchor="cat"), "hirm-s", ["dog", "puppy"],
        anchored("cat"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("concept, preset, prompts, target", CASES.values(), ids=CASES)
def test_full_weights_are_the_papers(model, concept, preset, prompts, target):
    """The published weight decay of 1e-8 acts on our change and not on W: below rounding."""
    told = []
    patch = hirm.run(model, [concept], replace(PRESETS[preset], steps=6), told.append)
    changes, losses = paper(prompts, target, 6, 5e-5)
    assert sorted(patch.changes) == sorted(FIRST)
    assert told[-1].losses == pytest.approx(losses, rel=1e-3)
    assert patch.info["loss"]["first"] == told[0].losses[0] and len(told) == 6
    for name, change in changes.items():
        # Adam divides by the gradient's size, which lifts rounding noise where gradients vanish.
        assert (patch.change_of(name) - change).norm() < 0.02 * change.norm()
    assert patch.info["truncation_error"] < 1e-3  # rank 768: nothing is cut


@pytest.mark.parametrize(
    "kind, anchor, preset, steps",
    [
        ("style", "", "hirm-r", 40), ("style", "painting", "hirm-s", 30),
        ("object", "", "hirm-r", 25), ("object", "cat", "hirm-s", 15),
        ("unsafe", "", "hirm-r", 50), ("unsafe", "person", "hirm-s", 25),
        ("identity", "", "hirm-r", 25),
    ],
)  # fmt: skip
def test_published_steps(model, kind, anchor, preset, steps):
    settings = PRESETS[preset]
    assert settings.steps == 0 and settings.lr == 5e-5 and settings.full_weights
    order = hirm._order([Concept("gore", kind, anchor=anchor)], settings)
    assert len(order) == steps


def test_auto_goes_by_the_anchor(model):
    one, other = Concept("dog"), Concept("dog", anchor="cat")
    auto = replace(Settings(), **QUICK)
    for concept, target in ((one, "noise"), (other, "anchor")):
        found = hirm.run(model, [concept], auto)
        expected = hirm.run(model, [concept], replace(auto, target=target))
        assert all(torch.equal(found.change_of(n), expected.change_of(n)) for n in FIRST)
    assert Settings().target == "auto"


def test_concepts_and_names_take_turns():
    concepts = [Concept("a", aliases=("b",)), Concept("c", "style", anchor="d")]
    assert hirm._order(concepts, Settings(steps=3)) == [
        (0, "a"), (1, "c"), (0, "b"), (1, "c"), (0, "a"), (1, "c"),
    ]  # fmt: skip
    different = hirm._order(concepts, Settings(steps=0))
    assert [index for index, _ in different].count(0) == 25
    assert [index for index, _ in different].count(1) == 30


def test_the_loss_of_what_is_kept(model):
    """After the first step the loss is a share of the start away for what was kept."""
    told, keep = [], ["a wolf"]
    settings = Settings(
        steps=2, preserve=2.0, keep_list="none", lr=1e-2, full_weights=True, rank=128
    )
    concept = Concept("dog", anchor="cat")
    hirm.run(model, [concept], settings, told.append, keep=keep)
    one = hirm.run(model, [concept], replace(settings, steps=1), keep=keep)
    worn = DiffusersModel.load("demo").add_patches([(one, 1.0)])
    with torch.no_grad():
        target, before = output(model, "cat"), output(model, "a wolf")
        first = F.mse_loss(output(model, "dog"), target)
        moved = F.mse_loss(output(worn, "a wolf"), before) / before.square().mean()
        expected = F.mse_loss(output(worn, "dog"), target) + 2.0 * first * moved
    assert told[-1].losses[0] == pytest.approx(float(first), rel=1e-4)
    assert moved > 1e-3
    assert told[-1].losses[1] == pytest.approx(float(expected), rel=1e-2)


def test_the_default_reaches_its_target_and_keeps_neighbours(model):
    neighbours = "a robot, 3d render", "a photo of a wolf"
    kept, dog = model.encode_all(neighbours), model.encode_all(["a photo of a dog"])
    moved = {}
    for preserve in (0.0, Settings().preserve):
        patch = hirm.run(model, [Concept("dog")], replace(Settings(), preserve=preserve))
        worn = DiffusersModel.load("demo").add_patches([(patch, 1.0)])
        moved[preserve] = float((worn.encode_all(neighbours) - kept).norm() / kept.norm())
        assert (worn.encode_all(["a photo of a dog"]) - dog).norm() > 0.7 * dog.norm()
    assert moved[Settings().preserve] < 0.3 < 0.5 < moved[0.0]


def test_the_file_is_a_plain_lora(model, tmp_path):
    patch = hirm.run(model, [Concept("dog", anchor="cat")], Settings(**QUICK))
    assert patch.ranks == [8] and patch.changes_text and not patch.changes_unet
    tensors = load_file(save_patch(patch, tmp_path / "dog.safetensors"))
    assert len(tensors) == 2 * 6
    for name in FIRST:
        prefix = file_name(DEMO, layers_by_name(DEMO)[name])
        assert prefix == "lora_te_" + name.removeprefix("text_encoder.").replace(".", "_")
        up, down = (tensors[f"{prefix}.lora_{part}.weight"].float() for part in ("up", "down"))
        expected = patch.change_of(name)
        assert expected.norm() > 0
        assert (up @ down - expected).norm() < 1e-3 * expected.norm()
    loaded = load_patch(tmp_path / "dog.safetensors")
    assert loaded.info["method"] == "hirm" and loaded.info["loss"]["steps"] == 4


def test_the_same_seed_gives_the_same_patch(model):
    settings = Settings(steps=3)
    first, again = (hirm.run(model, [Concept("dog")], settings) for _ in range(2))
    other = hirm.run(model, [Concept("dog")], replace(settings, seed=1))
    for name in FIRST:
        assert torch.equal(first.change_of(name), again.change_of(name))
        assert not torch.equal(first.change_of(name), other.change_of(name))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_unchanged(model, fails):
    encoder = model.pipeline.text_encoder
    before, unet = weights_of(encoder), weights_of(model.unet)

    def on_step(step):
        if fails and step.index == 2:
            raise RuntimeError("cancelled")

    try:
        hirm.run(model, [Concept("dog")], Settings(steps=3), on_step)
    except RuntimeError as error:
        assert fails and str(error) == "cancelled"
    assert same_tensors(before, weights_of(encoder)) and same_tensors(unet, weights_of(model.unet))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_a_blow_up_keeps_the_last_good_patch(model):
    with pytest.raises(NonFiniteLoss, match="not finite at step 3 of 4") as caught:
        with_nan_at(model, 3, Settings(**QUICK))
    assert sorted(caught.value.patch.changes) == sorted(FIRST)


def with_nan_at(model, step, settings):
    """Train on an encoder that gives NaN from that step on.

    Two forwards come before the first step: the target's, and the concept's own.
    """
    count = [0]

    def poison(module, args, output):
        count[0] += 1
        return output * torch.nan if count[0] >= step + 2 else output

    hook = model.text_module(LAST).register_forward_hook(poison)
    try:
        hirm.run(model, [Concept("dog")], settings)
    finally:
        hook.remove()


def test_only_layers_the_unet_sees_count():
    names = {"demo": 2, "sd1": 11, "sd2": 22, "sdxl": 10}
    for family in (DEMO, SD1, SD2, SDXL):
        name = f"text_encoder.text_model.encoder.layers.{names[family.key]}.self_attn.out_proj"
        assert hirm.last_projection(family) == name and name in layers_by_name(family)


@pytest.mark.parametrize("bad", [{"target": "cat"}, {"scale": 0.0}, {"rank": 769}, {"steps": -1}])
def test_bad_settings(bad):
    with pytest.raises(ForgetError, match=f"^{next(iter(bad))} is"):
        Settings(**bad)


def test_what_is_forgotten_cannot_be_kept(model):
    with pytest.raises(ForgetError, match="dog"):
        hirm.run(model, [Concept("dog")], Settings(steps=1), keep=["dog"])
