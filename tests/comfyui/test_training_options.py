"""Previews, saving and resuming in a real ComfyUI: the model comes back bit by bit."""

import pytest
import torch

from .parts import concept, gradient_flags, leftovers, same_bits, state
from .test_every_method import SHORT, Fault

pytestmark = pytest.mark.usefixtures("short_drawings")
TRAINED = "resteer", "esd", "ablation", "hirm", "reread-many", "reread-robust"


@pytest.mark.parametrize("ending", ["success", "error", "cancel"])
@pytest.mark.parametrize("preset", TRAINED)
def test_model_and_clip_come_back_bit_identical(pack, comfy_model, tmp_path, preset, ending):
    """Ended in the middle of a preview's drawing, in the forward itself where it is Cancel."""
    import comfy.model_management as management

    cancelled = management.InterruptProcessingException
    raised = {"success": None, "error": Fault, "cancel": cancelled}[ending]
    methods, training = pack("fmn.methods"), pack("fmn.training.run")
    drawn, save = [], training.SaveEvery(1, lambda step: tmp_path / f"{step}.safetensors")

    def on_pictures(count):
        drawn.append(count)
        if ending == "cancel" and len(drawn) == 3:  # the first picture with the adapters
            management.interrupt_current_processing(True)
        elif raised is Fault and len(drawn) == 3:
            raise Fault

    prompts = "a photo of a dog", "a house"
    previews = pack("fmn.training.preview").Previews(
        comfy_model, prompts, 2, on_pictures=on_pictures
    )

    def after_step(progress, run):
        save(progress, run)
        previews.during(run)

    options = training.TrainingOptions(keep_best=True, after_step=after_step)
    settings = methods.settings_of(preset, SHORT[preset])
    patchers = comfy_model.patcher, comfy_model.clip.patcher
    before = [(state(patcher), gradient_flags(patcher)) for patcher in patchers]
    decoder = comfy_model.vae.first_stage_model
    vae = {key: value.clone() for key, value in decoder.state_dict().items()}
    with torch.inference_mode():
        if raised:
            with pytest.raises(raised):
                methods.forget(comfy_model, [concept(pack)], settings, options=options)
        else:
            methods.forget(comfy_model, [concept(pack)], settings, options=options)
            assert len(drawn) == 2 + 2 * 2
    for patcher, (weights, flags) in zip(patchers, before):
        assert same_bits(weights, state(patcher)) and gradient_flags(patcher) == flags
        assert leftovers(patcher.model) == [] and not patcher.patches
    after = decoder.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in vae.items())
    assert {path.name for path in tmp_path.iterdir()} >= {"1.safetensors"}


@pytest.mark.parametrize("preset", TRAINED)
def test_a_resumed_run_equals_an_uninterrupted_one(pack, comfy_model, tmp_path, preset):
    methods, resume = pack("fmn.methods"), pack("fmn.training.resume")
    options = pack("fmn.training.run").TrainingOptions
    steps = "robust_steps" if preset == "reread-robust" else "steps"
    settings = methods.settings_of(preset, SHORT[preset] | {steps: 3})
    file = tmp_path / "2.fmn-train"

    def save(progress, run):
        if progress.index == 2:
            resume.save_state(run.state(), file)

    def run(options):
        with torch.inference_mode():
            return methods.forget(comfy_model, [concept(pack)], settings, options=options)

    whole = run(options(after_step=save))
    resumed = run(options(resume=resume.load_state(file)))
    for name, factors in whole.changes.items():
        assert all(map(torch.equal, factors, resumed.changes[name]))


def test_the_vae_of_another_model_is_refused(pack, comfy_model):
    with pytest.raises(pack("fmn.errors").ForgetError, match="This VAE reads 4 channels"):
        comfy_model.decode(torch.zeros(1, 16, 16, 16))
