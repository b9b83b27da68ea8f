"""MODEL and CLIP as other nodes left them: merged, with LoRAs, other sampling, a skipped layer."""

import importlib

import pytest
import torch

from .parts import concept, settings, state

TIMES = 5, 500, 999


@pytest.fixture(scope="module")
def stock(pack):
    """Function from module and class of ComfyUI to a node of its own."""
    return lambda module, name: getattr(importlib.import_module(module), name)()


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


def predictions(host, text, times=TIMES):
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with host.borrow_denoiser() as denoiser, torch.no_grad():
        return torch.cat([denoiser.predict_noise(x_t, torch.tensor([t]), text) for t in times])


def trained(pack, host, **more):
    steps = []
    patch = pack("fmn.methods.resteer").run(
        host, [concept(pack)], settings(pack, **more), steps.append
    )
    return patch, steps[-1].losses


def test_a_merge_is_trained_on_and_applied_to_as_one_model(pack, stock, demo):
    """Model Merge Simple's output, against a model that has the mixed weights."""
    load, ComfyModel = (
        pack("nodes.demo").load_demo_checkpoint,
        pack("fmn.hosts.comfyui.model").ComfyModel,
    )
    second, literal = load()[0], load()[0]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        pairs = zip(
            second.model.diffusion_model.parameters(), literal.model.diffusion_model.parameters()
        )
        for other, mixed in pairs:
            other *= 1 + 0.3 * torch.randn(other.shape, generator=generator)
            mixed.lerp_(other, 0.25)
    first = demo[0]
    before = state(first), state(second)
    node = stock("comfy_extras.nodes_model_merging", "ModelMergeSimple")
    merged = ComfyModel(node.merge(first, second, 0.75)[0], demo[1])
    literal, plain = ComfyModel(literal, demo[1]), ComfyModel(first, demo[1])

    patch, losses = trained(pack, merged, steps=5, lr=0.02)
    wanted, same = trained(pack, literal, steps=5, lr=0.02)
    assert losses == pytest.approx(same, rel=1e-3)
    assert trained(pack, plain, steps=1)[1][0] != pytest.approx(losses[0], rel=1e-2)
    # The file tells the base that the merge began with.
    assert patch.info["base.fingerprint"] == plain.fingerprint() != wanted.info["base.fingerprint"]

    text = merged.encode(concept(pack).training_prompts()[0])
    worn = [ComfyModel(host.patched(patch, 0.8), demo[1]) for host in (merged, literal)]
    found, wanted = (predictions(host, text) for host in worn)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found - predictions(merged, text)).abs().max() > 0.05
    predictions(plain, text)  # ComfyUI takes the merge off again
    after = state(first), state(second)
    for was, now in zip(before, after):
        assert all(torch.equal(was[key], now[key]) for key in was)


def test_a_model_with_a_lora_is_trained_and_keeps_it(pack, comfy_model):
    """Training on a MODEL that carries a LoRA sees the LoRA; the base's fingerprint stays."""
    patch, before = trained(pack, comfy_model, steps=10)
    patched = type(comfy_model)(comfy_model.patched(patch, 1.0), comfy_model.clip)
    again, losses = trained(pack, patched)
    assert losses[0] < 0.95 * before[0]
    assert again.info["base.fingerprint"] == patch.info["base.fingerprint"]


@pytest.mark.parametrize("zsnr", [False, True])
def test_v_prediction_by_a_node(pack, stock, demo, comfy_model, pipeline_model, zsnr):
    """ModelSamplingDiscrete on a MODEL of Stable Diffusion 1.x, against diffusers' scheduler."""
    from diffusers import EulerDiscreteScheduler

    node = stock("comfy_extras.nodes_model_advanced", "ModelSamplingDiscrete")
    text = comfy_model.encode(concept(pack).training_prompts()[0])
    plain = predictions(comfy_model, text)
    model = type(comfy_model)(node.patch(demo[0], "v_prediction", zsnr)[0], demo[1])
    assert model.prediction == "v"

    pipeline = pack("fmn.hosts.diffusers.load").load_pipeline("demo")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=zsnr
    )
    other = type(pipeline_model)(pipeline)
    found = predictions(model, text)
    torch.testing.assert_close(found, predictions(other, text), rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 0.5
    patch, losses = trained(pack, model)
    assert losses == pytest.approx(trained(pack, other)[1], rel=1e-3)
    assert patch.info["base.prediction"] == "v"
    torch.testing.assert_close(predictions(comfy_model, text), plain)


@pytest.mark.parametrize("sampling, count", [("lcm", 50), ("x0", 1000)])
def test_other_samplings_by_a_node(pack, stock, demo, sampling, count):
    """Distilled models have fewer noise levels; training draws its times among those."""
    node = stock("comfy_extras.nodes_model_advanced", "ModelSamplingDiscrete")
    patcher = node.patch(demo[0], sampling, False)[0]
    model = pack("fmn.hosts.comfyui.model").ComfyModel(patcher, demo[1])
    with model.borrow_denoiser() as denoiser:
        assert len(denoiser.alphas_cumprod) == count
    patch, losses = trained(pack, model, steps=10)
    assert len(losses) == 10
    assert all(up.isfinite().all() for up, _ in patch.changes.values())
    assert max(float(up.abs().max()) for up, _ in patch.changes.values()) > 0.001


@pytest.mark.parametrize("sampling", ["v_prediction", "edm_playground_v2.5"])
def test_noise_levels_of_edm_by_a_node(pack, stock, demo, sampling):
    """What an EDM network is given: x / sqrt(sigma^2 + sigma_data^2), written out once more."""
    node = stock("comfy_extras.nodes_model_advanced", "ModelSamplingContinuousEDM")
    patcher = node.patch(demo[0], sampling, 120.0, 0.002)[0]
    model = pack("fmn.hosts.comfyui.model").ComfyModel(patcher, demo[1])
    text = model.encode(concept(pack).training_prompts()[0])
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        level = denoiser.model.model_sampling
        for t in TIMES:
            sigma, data = float(level.sigmas[t]), level.sigma_data
            x = x_t * (1 + sigma**2) ** 0.5
            given, width = x / (sigma**2 + data**2) ** 0.5, (sigma**2 + data**2) ** 0.5
            time = torch.tensor([0.25 * torch.tensor(sigma).log()])
            out = denoiser.model.diffusion_model(given, time, context=text.context)
            sign = -1 if sampling == "v_prediction" else 1
            clean = x * data**2 / width**2 + sign * out * sigma * data / width
            wanted = (x - clean) / sigma
            torch.testing.assert_close(
                denoiser.predict_noise(x_t, torch.tensor([t]), text), wanted, rtol=1e-3, atol=1e-3
            )
    assert all(loss == loss for loss in trained(pack, model)[1])


def test_a_clip_that_skips_a_layer(pack, stock, demo, comfy_model):
    """CLIP Set Last Layer: whatever reads text reads it as the prompts will be encoded."""
    clip = stock("nodes", "CLIPSetLastLayer").set_last_layer(demo[1], -2)[0]
    model, prompt = type(comfy_model)(demo[0], clip), concept(pack).training_prompts()[0]
    with torch.inference_mode():
        wanted = clip.encode_from_tokens(clip.tokenize(prompt.text)).clone()
    assert (wanted - comfy_model.encode(prompt).context).abs().max() > 0.1
    found = [model.encode(prompt).context, model.encode_all([prompt.text])]
    with model.borrow_text_encoder() as text, torch.no_grad():
        found += [text.encode(prompt.text)[0].context]
        found += [text.encode_ids(text.ids_of([prompt.text])).context]
    for context in found:
        torch.testing.assert_close(context, wanted, rtol=1e-4, atol=1e-4)
    assert trained(pack, model)[1] != pytest.approx(trained(pack, comfy_model)[1], rel=1e-3)
