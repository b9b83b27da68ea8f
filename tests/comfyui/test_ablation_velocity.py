"""Concept Ablation on flow models: ComfyUI's own classes, tiny, and the demo transformer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .parts import concept, leftovers
from .test_other_models import adapted, check_gradient, velocity


def settings_of(pack, **more):
    given = {"steps": 3, "samples": 1, "sample_steps": 2, "seed": 1, "size": 64, "batch": 2}
    return pack("fmn.methods.ablation").Settings(**given | {"layers": "attention"} | more)


@pytest.mark.parametrize("name", ["Flux", "SD3"])
@pytest.mark.parametrize("target", ["model", "noise"])
def test_loss_is_the_papers_on_velocities(pack, other_host, name, target):
    """x_t = (1 - sigma) z + sigma noise; towards the anchor's velocity, or towards noise - z."""
    ablation, model = pack("fmn.methods.ablation"), other_host(name)
    settings = settings_of(pack, target=target, prior=0.5)
    with torch.inference_mode(False), torch.enable_grad():
        pairs = ablation.prepare(model, concept(pack, anchor="a big cat"), settings)
        with model.borrow_denoiser() as denoiser, adapted(denoiser, name) as (change, switch):
            generator = torch.Generator().manual_seed(0)
            batches = ablation.Batches([pairs], 2, generator, denoiser)()
            assert [len(batch.t) for batch in batches] == [1, 1]  # a prompt a forward
            for batch in batches:
                sigma, (pair, *_) = denoiser.sigmas[batch.t], pairs
                noise = batch.noise + pair.latents
                x_t = (1 - sigma) * pair.latents + sigma * noise
                torch.testing.assert_close(batch.x_t, x_t, rtol=1e-4, atol=1e-5)
                assert 0.5 < float(noise.std()) < 1.5
                switch.on = False
                with torch.no_grad():
                    wanted = velocity(denoiser.model, x_t, sigma, pair.anchor)
                switch.on = True
                wanted = batch.noise if target == "noise" else wanted

                def literal(wanted=wanted, x_t=x_t, sigma=sigma, batch=batch):
                    found = velocity(denoiser.model, x_t, sigma, batch.target)
                    prior = velocity(denoiser.model, x_t, sigma, batch.anchor)
                    return F.mse_loss(found, wanted) + 0.5 * F.mse_loss(prior, batch.noise)

                loss = ablation.ablation_loss(denoiser, switch, batch, settings)
                torch.testing.assert_close(loss, literal(), rtol=1e-4, atol=1e-6)
                check_gradient(loss, literal, change)


@pytest.mark.parametrize("more", [{"references": "zeros"}, {"prior": 0.5, "teacher": "current"}])
@pytest.mark.parametrize("name", ["Flux", "SD3"])
def test_a_model_comes_back(pack, other_host, name, more):
    model, steps = other_host(name), []
    before = {key: value.clone() for key, value in model.patcher.model.state_dict().items()}
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(
            model, [concept(pack, anchor="cat")], settings_of(pack, **more), steps.append, ["a cow"]
        )
    after = model.patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(model.patcher.model) == [] and len(steps) == 3
    assert patch.info["base.prediction"] == "flow"
    assert all(up.any() for up, _ in patch.changes.values())


def test_both_hosts_train_the_same_patch(pack):
    """The demo transformer, in ComfyUI and in diffusers."""
    with torch.inference_mode():
        host_of = pack("fmn.hosts.comfyui.unknown_model").host_of
        ours = host_of(*pack("nodes.demo").load_demo_transformer())
    theirs = pack("fmn.hosts.diffusers.transformer").DiffusersTransformer.load_demo()
    losses = []
    for model in (ours, theirs):
        steps = []
        with torch.inference_mode():
            patch = pack("fmn.methods").forget(
                model, [concept(pack, anchor="cat")], settings_of(pack), steps.append
            )
        assert len(patch.changes) == 4
        losses.append(steps[-1].losses)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-3)
    np.testing.assert_allclose(*losses, rtol=5e-2)  # Adam's first steps enlarge rounding


def test_pictures_and_one_matrix_are_refused(pack, other_host):
    model, wrong = other_host("Flux"), pack("fmn.errors").ForgetError
    shown = concept(pack, anchor="cat", images=torch.zeros(1, 8, 8, 3))
    for changes, words in (
        ({"references": "pictures"}, "cannot be read for Flux.1.*'samples'"),
        ({"layers": "kv"}, "Flux.1 has no layers known.*choose more"),
        ({"protect": True, "layers": "kv"}, "Flux.1 is none of them: turn protect off"),
    ):
        with pytest.raises(wrong, match=words):
            pack("fmn.methods").forget(model, [shown], settings_of(pack, **changes))
