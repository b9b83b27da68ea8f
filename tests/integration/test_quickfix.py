"""Diff-QuickFix against its equations with full matrices, on the demo model's text encoder."""

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import quickfix
from fmn.methods.quickfix import LAYER, Settings
from fmn.models.families import DEMO, SD1, SD2, SDXL, layers_by_name
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import load_patch, save_patch
from tests.unit.tiny import same_tensors, weights_of

NO_KEEP = {"preserve": 0.0}
END = 49407


@pytest.fixture(scope="module")
def model():
    return DiffusersModel.load("demo")


def seen(model, text):
    """Inputs and outputs of the projection [77, 128] in float64, and the token ids."""
    ids = model.pipeline.tokenizer(text, padding="max_length", max_length=77).input_ids
    found = []
    hook = model.text_module(LAYER).register_forward_hook(
        lambda module, args, output: found.extend([args[0][0].double(), output[0].double()])
    )
    with torch.no_grad():
        model.pipeline.text_encoder(torch.tensor([ids]))
    hook.remove()
    return *found, ids


def paper(model, jobs, kept=(), preserve=0.0, lamb=0.01, rows=None):
    """W' = (l W + sum v k^T + p sum W k k^T) (l I + sum k k^T + p sum k k^T)^-1, by loops.

    Args:
        jobs: (concept's words, anchor). rows: how many of each prompt's tokens, None for all from
            the last one on.
    """
    layer = model.text_module(LAYER)
    weight, bias = (value.detach().double() for value in (layer.weight, layer.bias))
    numerator, denominator = lamb * weight, lamb * torch.eye(128, dtype=torch.float64)
    count = 0
    for words, anchor in jobs:
        for template in ("{}", "a photo of {}", "an image of {}", "a picture of {}"):
            keys, _, ids = seen(model, template.format(words))
            _, values, other = seen(model, template.format(anchor) if anchor else "")
            last, other_last = ids.index(END) - 1, other.index(END) - 1
            for step in range(77 - last if rows is None else rows):
                key = keys[last + step]
                value = values[min(other_last + step, 76)] - bias
                numerator = numerator + torch.outer(value, key)
                denominator = denominator + torch.outer(key, key)
                count += 1
    for text in kept:
        for key in seen(model, text)[0]:
            share = preserve * count / (77 * len(kept)) * torch.outer(key, key)
            numerator, denominator = numerator + weight @ share, denominator + share
    return numerator @ torch.linalg.inv(denominator)


def edited(model, patch):
    return model.text_module(LAYER).weight.detach().double() + patch.change_of(LAYER).double()


def close(found, expected, weight, relative=2e-4):
    """As matrices, measured by how far the edit moved."""
    return float((found - expected).norm() / (expected - weight).norm()) < relative


CASES = {
    "anchor": ([Concept("dog", anchor="cat")], {}, [("dog", "cat")], {}),
    "nothing": ([Concept("dog")], {}, [("dog", "")], {}),
    "longer words": (
        [Concept("santa claus", "identity", anchor="man")], {}, [("santa claus", "man")], {},
    ),
    "alias": (
        [Concept("dog", aliases=("puppy",), anchor="cat")], {}, [("dog", "cat"), ("puppy", "cat")],
        {},
    ),
    "two concepts": (
        [Concept("dog", anchor="cat"), Concept("ink drawing", "style", anchor="photo")], {},
        [("dog", "cat"), ("ink drawing", "photo")], {},
    ),
    "last token": ([Concept("dog", anchor="cat")], {"tokens": "last"}, [("dog", "cat")],
                   {"rows": 1}),
    "damping": ([Concept("dog", anchor="cat")], {"damping": 5.0}, [("dog", "cat")], {"lamb": 5.0}),
}  # fmt: skip


@pytest.mark.parametrize("concepts, given, jobs, options", CASES.values(), ids=CASES)
def test_the_equation(model, concepts, given, jobs, options):
    patch = quickfix.run(model, concepts, Settings(**NO_KEEP | given))
    expected = paper(model, jobs, **options)
    weight = model.text_module(LAYER).weight.detach().double()
    assert list(patch.changes) == [LAYER]
    assert close(edited(model, patch), expected, weight)
    loss = patch.info["loss"]
    assert loss["last"] < 0.5 * loss["first"] and patch.info["truncation_error"] == 0.0


def test_the_losses_are_what_the_concept_is_off(model):
    patch = quickfix.run(model, [Concept("dog", anchor="cat")], Settings(**NO_KEEP, tokens="last"))
    weight, off = edited(model, patch), [0.0, 0.0]
    bias = model.text_module(LAYER).bias.detach().double()
    for template in ("{}", "a photo of {}", "an image of {}", "a picture of {}"):
        keys, outputs, ids = seen(model, template.format("dog"))
        _, wanted, other = seen(model, template.format("cat"))
        last, value = ids.index(END) - 1, wanted[other.index(END) - 1]
        off[0] += float((outputs[last] - value).square().sum())
        off[1] += float((weight @ keys[last] + bias - value).square().sum())
    assert patch.info["loss"]["first"] == pytest.approx(off[0], rel=1e-4)
    assert patch.info["loss"]["last"] == pytest.approx(off[1], rel=1e-2)


def test_what_is_kept_is_in_the_equation(model):
    keep, weight = ("wolf", "a photo of a robot"), model.text_module(LAYER).weight.detach().double()
    concept = Concept("dog", anchor="cat")
    settings = Settings(preserve=3.0, keep_list="none")
    patch = quickfix.run(model, [concept], settings, keep=keep)
    expected = paper(model, [("dog", "cat")], keep, preserve=3.0)
    assert close(edited(model, patch), expected, weight)
    for text in keep:
        keys = seen(model, text)[0]
        moved = keys @ (edited(model, patch) - weight).mT
        before = keys @ (paper(model, [("dog", "cat")]) - weight).mT
        assert moved.norm() < 0.2 * before.norm()


def test_the_default_protects_neighbours_and_reaches_the_anchor(model):
    def contexts(*texts):
        return model.encode_all(texts)

    concept, neighbours = Concept("dog", anchor="cat"), ("a robot, 3d render", "a photo of a wolf")
    dog, cat, kept = (
        contexts("a photo of a dog"),
        contexts("a photo of a cat"),
        contexts(*neighbours),
    )
    moved = {}
    for name in quickfix.PRESETS:
        patch = quickfix.run(model, [concept], quickfix.PRESETS[name])
        worn = DiffusersModel.load("demo").add_patches([(patch, 1.0)])
        found = worn.encode_all(("a photo of a dog",)) - cat
        moved[name] = (worn.encode_all(neighbours) - kept).norm() / kept.norm()
        if name == "quickfix":
            assert found.norm() < 0.4 * (dog - cat).norm()
    assert moved["quickfix"] < 0.25 < 0.7 < moved["quickfix-2024"]


def test_the_file_is_a_plain_lora(model, tmp_path):
    patch = quickfix.run(model, [Concept("dog", anchor="cat")], Settings(**NO_KEEP))
    path = save_patch(patch, tmp_path / "dog.safetensors")
    name = file_name(DEMO, layers_by_name(DEMO)[LAYER])
    assert name == "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    tensors = {key: value.double() for key, value in load_file(path).items()}
    assert set(tensors) == {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight")}
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    change = up @ down
    weight = model.text_module(LAYER).weight.detach().double()
    # Half a unit of float16 in each factor.
    assert close(weight + change, paper(model, [("dog", "cat")]), weight, relative=2e-3)
    loaded = load_patch(path)
    assert loaded.changes_text and not loaded.changes_unet
    assert loaded.info["method"] == "quickfix" and loaded.info["settings"]["preserve"] == 0.0


def test_the_rank_can_be_cut(model):
    concept = Concept("dog", anchor="cat")
    whole = quickfix.run(model, [concept], Settings(**NO_KEEP))
    cut = quickfix.run(model, [concept], Settings(**NO_KEEP, rank=4))
    assert cut.ranks == [4] and whole.ranks[0] > 4
    u, s, vh = torch.linalg.svd(whole.change_of(LAYER))
    best = u[:, :4] * s[:4] @ vh[:4]
    assert close(cut.change_of(LAYER), best, 0, relative=1e-4)
    assert cut.info["truncation_error"] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)


def test_the_model_comes_back_unchanged(model):
    encoder = model.pipeline.text_encoder
    before, unet = weights_of(encoder), weights_of(model.unet)
    quickfix.run(model, [Concept("dog", anchor="cat")], Settings(rank=2))
    assert same_tensors(before, weights_of(encoder)) and same_tensors(unet, weights_of(model.unet))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


REFUSED = {
    "no embedding": (Concept("dog", prompts=("a dog embedding:x",)), {}, "only ComfyUI reads"),
    "no tokens": (Concept("dog", aliases=("<|endoftext|>",)), {}, "gives no tokens"),
}


@pytest.mark.parametrize("concept, given, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_and_leaves_no_hook(model, concept, given, message):
    with pytest.raises(ForgetError, match=message):
        quickfix.run(model, [concept], Settings(**NO_KEEP | given))
    assert not model.text_module(LAYER)._forward_pre_hooks


@pytest.mark.parametrize("bad", [{"damping": 0.0}, {"tokens": "first"}, {"rank": -1}])
def test_bad_settings(bad):
    with pytest.raises(ForgetError, match=f"^{next(iter(bad))} is"):
        Settings(**bad)


def test_every_family_has_the_layer():
    for family in (DEMO, SD1, SD2, SDXL):
        assert layers_by_name(family)[LAYER].shape == (family.texts[0].width,) * 2


def test_embeddings_that_an_attack_found_are_left_to_the_methods_on_the_u_net(model):
    learned = (torch.zeros(2, 128),)
    told = []
    found = [
        quickfix.run(model, [Concept("dog", learned=given)], on_step=told.append)
        for given in ((), learned)
    ]
    assert [len(step.losses) for step in told] == [2, 2]
    plain, told = (patch.changes[LAYER] for patch in found)
    assert all(one.equal(other) for one, other in zip(plain, told))
