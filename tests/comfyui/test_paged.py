"""Models whose weights ComfyUI pages while they are used: a mock of GPU models from 0.16 on.

There a patcher's ``clone(disable_dynamic=True)`` reads the file anew into a plain patcher, which
wears the same patches, and raises for loaders that did not say how. What the mock cannot show is
what paging itself does to gradients, so it forbids them.
"""

from types import SimpleNamespace

import pytest
import torch

from .parts import concept, settings, state


def paged(patcher, load):
    """A patcher over the same model that pages its weights.

    Args:
        load: function to a plain patcher of the same file; None: the loader did not say.
    """
    import comfy.model_patcher

    plain_class = comfy.model_patcher.ModelPatcher

    class Paged(plain_class):
        def is_dynamic(self):
            return True

        def clone(self, disable_dynamic=False):
            if not disable_dynamic:
                return super().clone()
            if load is None:
                raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init")
            plain = load().clone()
            plain.patches = {key: patches[:] for key, patches in self.patches.items()}
            plain.patches_uuid = self.patches_uuid
            plain.object_patches = self.object_patches.copy()
            return plain

        def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
            assert not force_patch_weights
            # Weights stay as they are; patches are added while a layer runs.
            return super().partially_load(device_to, extra_memory=1)

    def forbid_gradients(module, args):
        assert not torch.is_grad_enabled(), "paged weights cannot be trained on"

    made = Paged(patcher.model, patcher.load_device, patcher.offload_device)
    for module in patcher.model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_pre_hook(forbid_gradients)
    return made


@pytest.fixture
def pages(pack, demo):
    """``host``: over the demo with paged U-Net and CLIP; ``loads``: how often the file was read."""
    read, loads = pack("nodes.demo").load_demo_checkpoint, []

    def part(number):
        def load():
            loads.append(number)
            found = read()[number]
            return found.patcher if number else found

        return load

    def host(known=True):
        clip = demo[1].clone()
        clip.patcher = paged(demo[1].patcher, part(1) if known else None)
        model = paged(demo[0], part(0) if known else None)
        return pack("fmn.hosts.comfyui.model").ComfyModel(model, clip)

    return SimpleNamespace(host=host, loads=loads)


def assert_same(patch, other):
    assert patch.changes.keys() == other.changes.keys()
    for name in patch.changes:
        torch.testing.assert_close(patch.change_of(name), other.change_of(name))


@pytest.mark.parametrize("worn", [False, True])
def test_training_is_on_a_plain_copy(pack, pages, worn):
    """Which wears what the paged model wears."""
    forget, plain = pack("fmn.methods").forget, pack("nodes.demo").load_demo_checkpoint()
    models = [type(pages.host())(*plain[:2]), pages.host()]
    if worn:
        patch = forget(models[0], [concept(pack)], settings(pack, steps=10))
        models = [type(model)(model.patched(patch, 1.0), model.clip) for model in models]
        assert models[1].patcher.is_dynamic()
    before, made = state(models[1].patcher), []
    with torch.inference_mode():
        for model in models:
            made.append(forget(model, [concept(pack)], settings(pack)))
    assert pages.loads == [0]
    assert_same(*made)
    assert made[0].info["base.fingerprint"] == made[1].info["base.fingerprint"]
    after = state(models[1].patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["hirm", "quickfix"])
def test_text_encoders_are_worked_on_as_a_plain_copy(pack, pages, name):
    method = pack(f"fmn.methods.{name}")
    chosen = method.Settings(steps=2) if name == "hirm" else method.Settings(keep_list="none")
    plain = pack("nodes.demo").load_demo_checkpoint()
    models = [type(pages.host())(*plain[:2]), pages.host()]
    before = state(models[1].clip.patcher)
    with torch.inference_mode():
        forget = pack("fmn.methods").forget
        patches = [forget(model, [concept(pack)], chosen) for model in models]
    assert pages.loads == [1]
    assert_same(*patches)
    after = state(pages.host().clip.patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_hooked_on_a_text_encoder_is_what_encodes(pack, pages):
    """As measures do that wear a patch of the text encoder."""
    model, prompt = pages.host(), concept(pack).training_prompts()[0]
    plain = model.encode(prompt).context
    layer = pack("fmn.models.families").text_layers(model.family)[-1]
    handle = model.text_module(layer.name).register_forward_hook(lambda *given: 2 * given[2])
    changed = model.encode(prompt).context
    with model.borrow_text_encoder() as text_encoder, torch.no_grad():
        torch.testing.assert_close(text_encoder.encode(prompt.text)[0].context, changed)
    handle.remove()
    assert (changed - plain).abs().max() > 0.1
    torch.testing.assert_close(model.encode(prompt).context, plain)
    assert pages.loads == [1]


def test_patches_are_worn_without_reading_the_file_again(pack, pages):
    patches, families = pack("fmn.patches.patch"), pack("fmn.models.families")
    model, prompt = pages.host(), concept(pack).training_prompts()[0]
    layers = families.layers(model.family)
    changed = [layer for layer in layers if layer.is_key_or_value]
    changed += families.text_layers(model.family)[-2:]
    changes = {
        layer.name: (torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1]) / 10)
        for layer in changed
    }
    patch = patches.ForgetPatch(model.family, changes, {"concepts": [{"name": "dog"}]})
    plain = pack("nodes.demo").load_demo_checkpoint()
    apply = pack("nodes.patch").ApplyForgetPatch
    drawn = []
    for patcher, clip in (plain[:2], (model.patcher, model.clip)):
        worn = apply.execute(patcher, patch, 1.0, clip).result
        host = type(model)(*worn)
        drawn.append((host.encode(prompt).context, host.sample(prompt, [1], 64, 2, 3.5)))
    assert worn[0].is_dynamic() and worn[1].patcher.is_dynamic() and pages.loads == []
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-3)
    assert (drawn[0][1] - model.sample(prompt, [1], 64, 2, 3.5)).abs().max() > 0.1


def test_loaders_that_do_not_say_how_are_refused(pack, pages):
    refused = pytest.raises(pack("fmn.errors").ForgetError, match="stock checkpoint loader")
    with refused:
        pack("fmn.methods.resteer").run(pages.host(False), [concept(pack)], settings(pack))
    with refused, pages.host(False).borrow_text_encoder():
        pass


def test_the_demo_asks_for_a_text_encoder_that_is_not_paged(pack, monkeypatch):
    import comfy.sd

    asked = []

    class Newer(comfy.sd.CLIP):
        def __init__(self, *args, disable_dynamic=False, **options):
            asked.append(disable_dynamic)
            super().__init__(*args, **options)

    monkeypatch.setattr(pack("nodes.demo"), "CLIP", Newer)
    pack("nodes.demo").load_demo_checkpoint()
    assert asked == [True]
