"""Joint merging on a model: what its layers read, and what it refuses."""

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.concepts.prompt_templates import sentences
from fmn.errors import ForgetError
from fmn.jobs.joint_merge import joint_merge
from fmn.methods import forget, settings_of
from fmn.methods.reread import method
from fmn.models.families import DEMO
from fmn.sequences import evenly

from ..tiny import TINY, Cancelled, TinyModel, make_patch, same_tensors, traces, weights_of

CONCEPTS = [Concept("dog", aliases=("hound",)), Concept("van gogh", "style")]
UCE = settings_of("uce", {"keep_list": "none"})
REREAD = settings_of(
    "reread",
    {
        "prompts": 3,
        "keep_prompts": 8,
        "images_per_concept": 2,
        "sampling_steps": 2,
        "query_positions": 3,
    },
)


def alone(settings, model=None):
    model = model or TinyModel()
    return [forget(model, [concept], settings) for concept in CONCEPTS]


def test_keys_and_values_against_full_matrices():
    """Contexts of all prompts but BOS, kept ones with it; the normal equations written out."""
    model, patches = TinyModel(), alone(UCE)
    strengths = (1.0, 0.5)
    merged = joint_merge(model, list(zip(patches, strengths)), preserve=2.0, keep=("a blue house",))
    texts = [
        evenly([*concept.subjects, *(text for text, _ in sentences(concept, 40))], 40)
        for concept in CONCEPTS
    ]
    rows = [model.encode_all(own)[:, 1:].flatten(0, 1).double() for own in texts]
    settings = method.Settings(preserve=2.0)
    kept = model.encode_all(method.kept_texts(model, CONCEPTS, ("a blue house",), settings))
    kept = kept.flatten(0, 1).double()
    grams = [own.mT @ own / len(own) for own in rows]
    system = sum(grams) + 2.0 * kept.mT @ kept / len(kept)
    pull = 0.01 * system.trace() / len(system) * torch.eye(len(system)).double()
    for name in patches[0].changes:
        expected = sum(
            strength * patch.change_of(name).double() @ (gram + pull)
            for patch, strength, gram in zip(patches, strengths, grams)
        ) @ torch.linalg.inv(system + pull)
        assert torch.allclose(merged.patch.change_of(name).double(), expected, atol=1e-5)
    told = merged.patch.info
    assert told["settings"] == {"how": "joint", "budget": 0, "preserve": 2.0, "damping": 0.01}
    assert told["loss"]["last"] < told["loss"]["first"] and merged.error == 0


@pytest.mark.parametrize("settings", [UCE, REREAD], ids=["uce", "reread"])
def test_the_model_comes_back_and_the_loss_falls(settings):
    model = TinyModel()
    patches, before, steps = alone(settings), weights_of(model.unet), []
    merged = joint_merge(model, [(patch, 1.0) for patch in patches], on_step=steps.append)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []
    assert merged.patch.info["loss"]["last"] < merged.patch.info["loss"]["first"]
    assert set(merged.patch.changes) == set(patches[0].changes)
    assert [step.index for step in steps] == list(range(1, steps[-1].total + 1))


def test_what_one_patch_does_on_its_own_prompts_stays():
    """One patch, nothing kept: the solution acts on its prompts as the patch does."""
    model = TinyModel()
    patch = alone(UCE)[0]
    merged = joint_merge(model, [(patch, 1.0)], preserve=0.0).patch
    rows = model.encode_all(["a photo of dog", "a painting of dog at the beach"])[:, 1:]
    for name in patch.changes:
        expected = rows @ patch.change_of(name).mT
        found = rows @ merged.change_of(name).mT
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_uce_and_reread_together():
    """Patches of different layers: each acts where it did."""
    patches = [alone(UCE)[0], alone(REREAD)[1]]
    merged = joint_merge(TinyModel(), [(patch, 1.0) for patch in patches])
    assert set(merged.patch.changes) == {*patches[0].changes, *patches[1].changes}


def test_cancel_leaves_nothing_behind():
    def on_step(step):
        raise Cancelled

    model = TinyModel()
    before = weights_of(model.unet)
    with pytest.raises(Cancelled):
        joint_merge(model, [(patch, 1.0) for patch in alone(REREAD)], on_step=on_step)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []


def test_what_is_refused():
    model, patch = TinyModel(), alone(UCE)[0]
    whole = make_patch(TINY, scope=lambda layer: True, concepts=CONCEPTS[:1])
    with pytest.raises(ForgetError, match="for dog.*joint merging supports only keys"):
        joint_merge(model, [(patch, 1.0), (whole, 1.0)])
    with pytest.raises(ForgetError, match="demo model, the model is Tiny"):
        joint_merge(model, [(make_patch(DEMO), 1.0)])
    silent = make_patch(TINY)
    silent.info = {"concepts": []}
    with pytest.raises(ForgetError, match="does not say what it forgets"):
        joint_merge(model, [(silent, 1.0)])
    strange = make_patch(TINY)
    strange.info["concepts"] = [{"name": "dog", "kind": "object", "aliases": "x"}]
    with pytest.raises(ForgetError, match="aliases is a text"):
        joint_merge(model, [(strange, 1.0)])
    strange.info["concepts"] = [{"name": "d" * 2000, "kind": "object", "more": 3}]
    with pytest.raises(ForgetError, match="name has 2000 letters"):
        joint_merge(model, [(strange, 1.0)])
    with pytest.raises(ForgetError, match="preserve is -1"):
        joint_merge(model, [(patch, 1.0)], preserve=-1.0)
