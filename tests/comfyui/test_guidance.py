"""Guidance in ComfyUI: with objects in hand, and through a real server."""

import numpy as np
import pytest
import torch

from .parts import state
from .server import PromptError
from .workflows import demo_loader, drawing, node, training

PROMPT, CONCEPT = "a photo of a dog, twemoji", "twemoji"
STEPS, CFG = 4, 3.5
EARLY = {"warmup": 1, "scale": 300.0, "threshold": 0.02, "momentum_scale": 0.4,
         "momentum_beta": 0.6}  # fmt: skip


@pytest.fixture
def nodes(pack):
    return pack("nodes.guidance")


def conditioning(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def first_noise(count=1):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def sample(model, positive, negative, noise=None, cfg=CFG, sampler="euler", **more):
    import comfy.sample

    noise = first_noise() if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, "normal", positive, negative,
            torch.zeros_like(noise), seed=3, **more,
        ).clone()  # fmt: skip


@pytest.fixture
def texts(demo):
    with torch.inference_mode():
        return {text: conditioning(demo[1], text) for text in (PROMPT, CONCEPT, "", "a cat")}


def safe(nodes, demo, text=CONCEPT, **numbers):
    with torch.inference_mode():
        return nodes.SafeLatentDiffusion.execute(
            demo[0], demo[1], text, "custom", **EARLY | numbers
        ).args[0]


def recorded(model, texts, rows):
    """A clone that notes each prediction, with each text's own, predicted one at a time."""
    import comfy.sampler_helpers
    import comfy.samplers

    clone = model.clone()
    concept_cond = comfy.sampler_helpers.convert_cond(texts[CONCEPT])

    def note(args):
        x, sigma, inner = args["input"], args["sigma"], args["model"]
        conds = comfy.samplers.encode_model_conds(
            inner.extra_conds, concept_cond[:], x, x.device, "positive"
        )
        noises = []
        for cond in (args["cond"], conds, args["uncond"]):
            (clean,) = comfy.samplers.calc_cond_batch(inner, [cond], x, sigma, {})
            noises.append((x - clean) / float(sigma[0]))
        guided = (x - args["denoised"]) / float(sigma[0])
        rows.append((float(sigma[0]), *noises, guided))
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(note)
    return clone


def assert_safe(rows, cfg):
    """Rows of ``recorded`` follow the equations; eps is what the model predicts, or a velocity."""
    nu, steered = torch.zeros(2, 4, 16, 16), 0.0
    for t, (_, eps_p, eps_S, eps_0, guided) in enumerate(rows):
        phi = torch.clamp((eps_p - eps_S).abs() * EARLY["scale"], max=1)
        mu = torch.where(eps_p - eps_S < EARLY["threshold"], phi, torch.zeros(()))
        gamma = mu * (eps_S - eps_0) + EARLY["momentum_scale"] * nu
        nu = EARLY["momentum_beta"] * nu + (1 - EARLY["momentum_beta"]) * gamma
        used = gamma if t >= EARLY["warmup"] else torch.zeros_like(gamma)
        expected = eps_0 + cfg * ((eps_p - eps_0) - used)
        steered = max(steered, float(used.abs().max()))
        # A difference of float32 rounding near the threshold may flip single elements.
        close = torch.isclose(guided, expected, rtol=1e-3, atol=1e-3)
        assert close.float().mean() > 0.995
        assert (guided - expected).abs().mean() < 1e-3
    assert steered > 0.1


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_safe_prediction_follows_the_equations(nodes, demo, texts, prediction, cfg):
    """The guided noise of every step, from three predictions made one by one."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = safe(nodes, demo)
    if prediction != "eps":
        (model,) = ModelSamplingDiscrete().patch(model, prediction, False)
    rows = []
    sample(recorded(model, texts, rows), texts[PROMPT], texts[""], first_noise(2), cfg)
    assert len(rows) == STEPS
    assert_safe(rows, cfg)


def test_every_run_starts_afresh_and_the_model_stays(nodes, demo, texts):
    model = demo[0]
    before, plain = state(model), sample(model, texts[PROMPT], texts[""])
    guided = safe(nodes, demo)
    first = sample(guided, texts[PROMPT], texts[""])
    assert (first - plain).abs().mean() > 0.02
    assert torch.equal(sample(guided, texts[PROMPT], texts[""]), first)
    assert torch.equal(sample(model, texts[PROMPT], texts[""]), plain)
    after = state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.wrappers and "disable_cfg1_optimization" not in model.model_options


def test_scale_zero_and_a_warmup_over_all_steps_are_the_plain_picture(nodes, demo, texts):
    plain = sample(demo[0], texts[PROMPT], texts[""])
    assert torch.equal(sample(safe(nodes, demo, scale=0.0), texts[PROMPT], texts[""]), plain)
    idle = safe(nodes, demo, warmup=STEPS, momentum_scale=0.0)
    assert torch.equal(sample(idle, texts[PROMPT], texts[""]), plain)
    # Three rows a batch instead of two: float rounding.
    waiting = sample(safe(nodes, demo, warmup=STEPS), texts[PROMPT], texts[""])
    assert (waiting - plain).abs().max() < 1e-3


def test_warmup_counts_the_steps_of_a_partial_run(nodes, demo, texts):
    """Image to image with half the noise: the run's own first step is the one not steered."""
    guided = safe(nodes, demo, warmup=1)
    rows = []
    model = recorded(guided, texts, rows)
    sample(model, texts[PROMPT], texts[""], denoise=0.5)
    assert len(rows) == STEPS
    plain = [
        torch.allclose(guided, eps_0 + CFG * (eps_p - eps_0), atol=1e-3)
        for _, eps_p, _, eps_0, guided in rows
    ]
    assert plain == [True, False, False, False]


def test_regions_combined_prompts_and_control(nodes, demo, texts):
    """The concept's prediction has the prompt's regions and ControlNet, and no repeats."""
    import comfy.controlnet
    import node_helpers

    seen = []

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x, t, cond, batched, options):
            seen.append(options["cond_or_uncond"])
            return {"input": [], "middle": [torch.ones(len(x), 192, 1, 1)], "output": []}

    def region(text, **more):
        return node_helpers.conditioning_set_values(texts[text], more)

    guided = safe(nodes, demo, warmup=0)
    left = region(PROMPT, area=(16, 8, 0, 0), set_area_to_bounds=False)
    mask = torch.zeros(1, 128, 128)
    mask[:, 64:] = 1
    right = region("a cat", mask=mask, mask_strength=1.0, set_area_to_bounds=False)
    assert sample(guided, [*left, *right], texts[""]).isfinite().all()

    control = Control()
    both = region(PROMPT, control=control) + region("a cat", control=control)
    assert sample(guided, both, texts[""]).isfinite().all()
    rows = [row for call in seen for row in call]
    # Two prompts and one concept a step.
    assert rows.count(0) == 2 * STEPS and rows.count(2) == STEPS


def refused(pack, words):
    return pytest.raises(pack("fmn.errors").ForgetError, match=words)


def test_what_guidance_refuses(pack, nodes, demo, texts):
    from comfy_extras.nodes_custom_sampler import Guider_Basic
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guided = safe(nodes, demo)
    with refused(pack, "name all concepts in one node"):
        safe(nodes, (guided, demo[1]))
    with torch.inference_mode(), refused(pack, "nothing to leave out"):
        nodes.EraseByNegativePrompt.execute(demo[0], demo[1], " ", "replace")
    with refused(pack, "CLIP input is empty"):
        safe(nodes, (demo[0], None))

    import comfy.samplers

    def run(guider):
        noise, sigmas = first_noise(), torch.tensor([2.0, 1.0, 0.0])
        with torch.inference_mode():
            guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"),
                          sigmas)  # fmt: skip

    basic = Guider_Basic(guided)
    basic.set_conds(texts[PROMPT])
    with refused(pack, "cannot work with Guider_Basic"):
        run(basic)
    perpendicular = Guider_PerpNeg(guided)
    perpendicular.set_conds(texts[PROMPT], texts["a cat"], texts[""])
    perpendicular.set_cfg(CFG, 1.0)
    with refused(pack, "cannot work with Guider_PerpNeg"):
        run(perpendicular)


def negative(nodes, demo, mode, **more):
    with torch.inference_mode():
        return nodes.EraseByNegativePrompt.execute(demo[0], demo[1], CONCEPT, mode, **more).args[0]


def test_the_negative_prompt_is_replaced_or_joined(pack, nodes, demo, texts):
    plain = sample(demo[0], texts[PROMPT], texts["a cat"])
    replaced = sample(negative(nodes, demo, "replace"), texts[PROMPT], texts["a cat"])
    assert torch.equal(replaced, sample(demo[0], texts[PROMPT], texts[CONCEPT]))
    ((own, options),), ((ours, _),) = texts["a cat"], texts[CONCEPT]
    joined = sample(negative(nodes, demo, "join"), texts[PROMPT], texts["a cat"])
    by_hand = sample(demo[0], texts[PROMPT], [[torch.cat([own, ours], 1), options]])
    assert torch.equal(joined, by_hand) and not torch.equal(joined, plain)
    assert torch.equal(sample(demo[0], texts[PROMPT], texts["a cat"]), plain)
    with refused(pack, "the negative prompt is left out: set cfg above 1"):
        sample(negative(nodes, demo, "replace"), texts[PROMPT], texts["a cat"], cfg=1.0)


def guiding(**more):
    inputs = {"text": CONCEPT, "preset": "custom"} | EARLY | more
    return {"safe": node("FMN_SafeLatentDiffusion", model=["demo", 0], clip=["demo", 1], **inputs)}


def test_any_sampler_draws_another_picture(server):
    """KSampler with samplers of several kinds, SamplerCustom and a guider, in one workflow."""
    prompt = demo_loader() | guiding()
    names = "euler", "dpmpp_2m", "dpmpp_sde", "uni_pc", "heun"
    for name in names:
        for label, model in (("plain", "demo"), ("safe", "safe")):
            prompt |= drawing([model, 0], text=PROMPT, name=f"{label}_{name}")
            prompt[f"{label}_{name}_sampler"]["inputs"]["sampler_name"] = name
    custom = {"cfg": 3.5, "positive": ["safe_euler_pos", 0], "negative": ["safe_euler_neg", 0]}
    prompt |= {
        "sigmas": node(
            "BasicScheduler", model=["safe", 0], scheduler="normal", steps=4, denoise=1.0
        ),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=1),
        "guider": node("CFGGuider", model=["safe", 0], **custom),
        "custom": node(
            "SamplerCustom", model=["safe", 0], add_noise=True, noise_seed=1,
            sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["safe_euler_latent", 0],
            **custom,
        ),
        "advanced": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
            sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["safe_euler_latent", 0],
        ),
    }  # fmt: skip
    for name in ("custom", "advanced"):
        prompt[f"{name}_decode"] = node("VAEDecode", samples=[name, 0], vae=["demo", 2])
        prompt[f"{name}_image"] = node("PreviewImage", images=[f"{name}_decode", 0])
    outputs = server.run(prompt)
    for name in names:
        plain, changed = (server.image(outputs[f"{label}_{name}"]) for label in ("plain", "safe"))
        assert np.abs(plain - changed).mean() > 0.01, name
    expected = server.image(outputs["safe_euler"])
    for name in ("custom_image", "advanced_image"):
        assert np.array_equal(server.image(outputs[name]), expected), name


def test_concepts_and_gated_patches_through_the_server(server):
    prompt = demo_loader() | training(steps=10) | guiding(concepts=["concept", 0], preset="max")
    prompt |= {
        "negative": node(
            "FMN_EraseByNegativePrompt", model=["demo", 0], clip=["demo", 1], text="",
            mode="replace", concepts=["concept", 0],
        ),
        "gated": node(
            "FMN_ApplyGatedPatch", model=["demo", 0], clip=["demo", 1], patch=["train", 0],
            strength=1.0, low=0.85, high=0.95,
        ),
    }  # fmt: skip
    for model in ("demo", "safe", "negative", "gated"):
        prompt |= drawing([model, 0], name=f"{model}_dog")
        prompt |= drawing([model, 0], text="a castle, pixel art", name=f"{model}_castle")
    outputs = server.run(prompt)
    picture = {name: server.image(outputs[name]) for name in outputs if "_" in name}
    for model in ("safe", "negative", "gated"):
        assert np.abs(picture[f"{model}_dog"] - picture["demo_dog"]).mean() > 0.005, model
    assert np.array_equal(picture["gated_castle"], picture["demo_castle"])


def test_refusals_through_the_server(server):
    with pytest.raises(PromptError, match="nothing to leave out: connect concepts, or type a text"):
        server.run(demo_loader() | guiding(text=" ") | drawing(["safe", 0]))
    prompt = demo_loader() | guiding()
    prompt["guider"] = node("BasicGuider", model=["safe", 0], conditioning=["image_pos", 0])
    prompt |= drawing(["safe", 0]) | {
        "sigmas": node(
            "BasicScheduler", model=["safe", 0], scheduler="normal", steps=4, denoise=1.0
        ),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=1),
        "image_sampler": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
            sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["image_latent", 0],
        ),
    }  # fmt: skip
    with pytest.raises(PromptError, match="use KSampler, SamplerCustom or CFGGuider"):
        server.run(prompt)
