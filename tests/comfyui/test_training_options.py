"""Previews, saving and resuming in a real ComfyUI: the model comes back bit by bit."""

import json
from types import SimpleNamespace

import pytest
import torch

from .parts import concept, gradient_flags, leftovers, same_bits, state
from .test_every_method import SHORT, Fault

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


def test_a_curve_stays_small_and_keeps_both_ends(pack):
    live = pack("nodes.live_training")
    curve = live.Curve()
    for index in range(1, 5001):
        curve.add(index, index / 3)
        assert len(curve.points) <= live.POINTS and curve.points[-1][0] == index
    indices = [index for index, _ in curve.points]
    assert indices[0] <= 64 and len(indices) > live.POINTS // 3
    gaps = {b - a for a, b in zip(indices, indices[1:-1])}
    assert len(gaps) == 1
    curve.add(5001, float("nan"))
    assert curve.points[-1] == [5000, 1666.67]


def test_only_the_last_states_are_kept(pack, monkeypatch):
    live, sent = pack("nodes.live_training"), []
    instance = SimpleNamespace(
        client_id="me", send_sync=lambda event, data, client: sent.append((event, data, client))
    )
    monkeypatch.setattr(live, "PromptServer", SimpleNamespace(instance=instance))
    for number in range(live.KEPT + 5):
        context = SimpleNamespace(node_id=str(number), prompt_id="p")
        monkeypatch.setattr(live, "get_executing_context", lambda context=context: context)
        with live.Live("x" * 10_000, None) as shown:
            shown.note("y" * 10_000)
    assert len(live._states) == live.KEPT and ("me", None, "0") not in live._states
    assert [data["status"] for _, data, _ in sent[:2]] == ["running", "done"]
    assert all(len(json.dumps(data)) < 2000 for _, data, _ in sent)

    instance.client_id, before = None, len(sent)  # queued by a program that gave no name
    with live.Live("dog", None):
        pass
    assert len(sent) == before and len(live._states) == live.KEPT
