"""ESD on models that are no family of ours: ComfyUI's own classes, tiny and with random weights.

The text side is a mock, ``others.Words``: random conditioning in the shape that the model's own
text encoders give. No tokenizer or text encoder of such a model runs here.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from .others import WIDTH, esd_settings
from .parts import concept, leftovers


def velocity(model, x, sigma, text):
    """The network itself, called with nothing of ours in between."""
    net, given = model.diffusion_model, {"context": text.context}
    if type(net).__name__ == "Flux":
        given |= {"y": text.vectors["pooled_output"], "guidance": torch.tensor([3.5])}
        time = sigma
    else:
        given |= {"y": text.vectors["pooled_output"]}
        time = 1000 * sigma
    given = {name: value.expand(len(x), *value.shape[1:]) for name, value in given.items()}
    return net(x, time.expand(len(x)), **given)


@pytest.mark.parametrize("name", ["Flux", "SD3"])
@pytest.mark.parametrize("erase_from", ["", "a cat"])
def test_drawing_and_loss_are_the_papers(pack, other_host, monkeypatch, name, erase_from):
    """Flow: x_1 is noise, dx/dsigma is the velocity; ESD's loss is taken on velocities."""
    esd, model = pack("fmn.methods.esd"), other_host(name)
    settings = esd_settings(pack, batch=2, erase_from=erase_from)
    schedule = pack("fmn.models.sampling").SigmaSchedule
    samples, partial_sample = [], schedule.partial_sample

    def recorded(self, predict, noise, steps, last):
        samples.append((noise, last))
        return partial_sample(self, predict, noise, steps, last)

    monkeypatch.setattr(schedule, "partial_sample", recorded)
    with torch.inference_mode(False), torch.enable_grad():
        examples = esd.prepare(model, [concept(pack, prompts=("a dog here",))], settings)
        with model.borrow_denoiser() as denoiser, adapted(denoiser, name) as (change, switch):
            draws = esd.Batches(examples, settings, denoiser, switch, 8, 16)
            for _ in range(6):
                example, x_t, t = draws()
                noise, last = samples[-1]
                switch.on = False
                with torch.no_grad():
                    x, sigma = literal_drawing(denoiser, example, noise, last)
                    torch.testing.assert_close(x_t, x, rtol=1e-4, atol=1e-4)
                    assert denoiser.sigmas[t] == sigma
                    texts = example.source, example.concept, example.empty
                    first, erased, empty = (
                        velocity(denoiser.model, x_t, sigma, text) for text in texts
                    )
                switch.on = True
                wanted = first - 1.7 * (erased - empty)

                def literal(wanted=wanted, x_t=x_t, sigma=sigma, text=example.source):
                    return F.mse_loss(velocity(denoiser.model, x_t, sigma, text), wanted)

                loss = esd.esd_loss(denoiser, switch, example, x_t, t, 1.7)
                torch.testing.assert_close(loss, literal(), rtol=1e-4, atol=1e-6)
                check_gradient(loss, literal, change)
    assert {last for _, last in samples} == {0, 1, 2, 3}


@contextmanager
def adapted(denoiser, name):
    """A change of what the text's first layer gives, which the switch turns off."""
    switch = SimpleNamespace(on=True)
    switch.off = lambda: turned_off(switch)
    generator = torch.Generator().manual_seed(1)
    change = torch.nn.Parameter(0.3 * torch.randn(WIDTH, generator=generator))
    path = "context_embedder" if name == "SD3" else "txt_in"

    def add(module, args, out):
        ramp = torch.linspace(-1, 1, out.shape[-1])
        return out + (args[0] @ change)[..., None] * ramp if switch.on else out

    hook = denoiser.module(f"lora_unet_{path}").register_forward_hook(add)
    yield change, switch
    hook.remove()


@contextmanager
def turned_off(switch):
    before, switch.on = switch.on, False
    yield
    switch.on = before


def literal_drawing(denoiser, example, noise, last):
    """x after some of four Euler steps, evenly spaced over all noise levels, and its sigma."""
    count = len(denoiser.sigmas)
    times = [count - 1, count * 3 // 4 - 1, count // 2 - 1, count // 4 - 1]
    sigmas = [denoiser.sigmas[time] for time in times]
    x = sigmas[0] * noise
    for i in range(last):
        with_text = velocity(denoiser.model, x, sigmas[i], example.source)
        without = velocity(denoiser.model, x, sigmas[i], example.empty)
        x = x + (sigmas[i + 1] - sigmas[i]) * (without + 3.0 * (with_text - without))
    return x, sigmas[last]


def check_gradient(loss, literal, change):
    """Backward is right although Flux adds in place: against a finite difference."""
    (gradient,) = torch.autograd.grad(loss, change)
    direction = gradient / gradient.norm()
    kept, values = change.data.clone(), []
    with torch.no_grad():
        for step in (0.01, -0.01):
            change.data = kept + step * direction
            values.append(float(literal()))
        change.data = kept
    torch.testing.assert_close(
        (values[0] - values[1]) / 0.02, float(gradient.norm()), rtol=0.02, atol=1e-5
    )


def output(host, text):
    """What the network gives with the patches on it, merged in by ComfyUI as it loads the model."""
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(False), host.borrow_denoiser() as denoiser, torch.no_grad():
        return velocity(denoiser.model, x, torch.tensor(0.7), text).clone()


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [("Flux", "x", 4), ("Flux", "all", 33), ("SD3", "x", 3), ("SD3", "u", 22)],
)
def test_train_save_load_apply(pack, other_host, tmp_path, name, layers, count):
    """A patch forgets, leaves the model as it was, and does the same by every way of loading it."""
    import comfy.sd
    import comfy.utils

    patches, model = pack("fmn.patches.patch"), other_host(name)
    before = {key: value.clone() for key, value in model.patcher.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.patcher.model.parameters()]
    steps = []
    settings = esd_settings(pack, steps=12, layers=layers)
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(model, [concept(pack)], settings, steps.append)
    assert len(patch.changes) == count and len(steps) == 12
    assert all(float(up.abs().max()) > 0 for up, _ in patch.changes.values())
    after = model.patcher.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(model.patcher.model) == []
    assert flags == [parameter.requires_grad for parameter in model.patcher.model.parameters()]

    path = patches.save_patch(patch, tmp_path / "patch.safetensors")
    loaded = patches.load_patch(path)
    assert loaded.family.model == name and loaded.info["base.prediction"] == "flow"
    assert loaded.info["base.fingerprint"] == model.fingerprint()
    described = pack("fmn.methods.describe").describe(loaded)
    assert f"for: {loaded.family.title}, flow prediction" in described
    again = patches.load_patch(patches.save_patch(loaded, tmp_path / "again.safetensors"))
    text = model.encode(concept(pack).training_prompts()[0])
    lora = comfy.utils.load_torch_file(str(path))
    stock, _ = comfy.sd.load_lora_for_models(model.patcher, None, lora, 1.0, 0.0)
    ways = [model.patched(each, 1.0) for each in (patch, loaded, again)] + [stock]
    first, *others = (output(type(model)(way), text) for way in ways)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.01, atol=0.001)
    torch.testing.assert_close(others[2], others[0], rtol=1e-4, atol=1e-4)  # both from one file
    assert (first - output(model, text)).norm() > 0.02 * first.norm()


def test_loss_falls(pack, other_host):
    """With one noise level and drawing, so that losses can be compared."""
    steps = []
    settings = esd_settings(pack, steps=30, sampling_steps=1, batch=8, layers="all")
    with torch.inference_mode():
        pack("fmn.methods").forget(other_host("Flux"), [concept(pack)], settings, steps.append)
    losses = steps[-1].losses
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name", ["Flux", "SD3"])
def test_checkpointing_changes_no_result(pack, other_host, name):
    """Flux adds in place to what a block gets; computed twice, it must find it as it was."""
    patches = []
    for checkpointing in (False, True):
        settings = esd_settings(pack, layers="all", checkpointing=checkpointing)
        with torch.inference_mode():
            patches.append(pack("fmn.methods").forget(other_host(name), [concept(pack)], settings))
    for key, (up, down) in patches[0].changes.items():
        torch.testing.assert_close(patches[1].changes[key], (up, down), rtol=1e-3, atol=1e-5)


def test_masked_text_of_one_stream(pack, other_host):
    """Lumina 2 reads the number of tokens, and the two prompts' differ."""
    model, methods = other_host("Lumina2"), pack("fmn.methods")
    seen, extra_conds = [], model.patcher.model.extra_conds

    def watched(**given):
        made = extra_conds(**given)
        seen.append((given["cross_attn"].shape[1], made["num_tokens"].cond))
        return made

    model.patcher.model.extra_conds = watched
    with torch.inference_mode():
        patch = methods.forget(model, [concept(pack)], esd_settings(pack, layers="all"))
    assert len(patch.changes) == len(pack("fmn.models.families").layers(model.family)) == 34
    assert all(length == tokens for length, tokens in seen)
    assert len({length for length, _ in seen}) == 2  # the prompt's and the empty one's, each alone
    for layers in ("x", "x-strict", "u"):
        with pytest.raises(pack("fmn.errors").ForgetError, match="no layers known.*choose more"):
            methods.forget(model, [concept(pack)], esd_settings(pack, layers=layers))


def test_same_predictions_as_the_host_of_known_families(pack, demo):
    """The demo model (noise prediction) as if it were unknown: denoise, and Euler against DDIM."""
    sampling, other = (
        pack("fmn.models.sampling"),
        pack("fmn.hosts.comfyui.unknown_model").UnknownModel(*demo),
    )
    prompt = concept(pack).training_prompts()[0]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for host in (pack("fmn.hosts.comfyui.model").ComfyModel(*demo), other):
        text, empty = host.encode(prompt), host.encode(prompt._replace(text=""))
        with torch.inference_mode(False), host.borrow_denoiser() as denoiser, torch.no_grad():
            text = sampling.expand(text, 2)
            given = noise, torch.tensor([900, 30]), text
            drawing = sampling.guided(denoiser, text, empty, 4.0)
            drawn = denoiser.schedule.partial_sample(drawing, noise, 6, 4)
            found.append((denoiser.predict_noise(*given), drawn))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert other.prediction == "epsilon"
    names = [
        layer.compvis for layer in pack("fmn.training.fit_adapters").in_scope(other.family, "kv")
    ]
    families = pack("fmn.models.families")
    layers = families.layers(families.DEMO)
    assert set(names) == {layer.compvis for layer in layers if layer.is_key_or_value}
    assert len(families.layers(other.family)) == len(layers)
