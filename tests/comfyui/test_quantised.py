"""Quantised U-Nets as ComfyUI's stock loaders make them: they are solved for and wear patches, and
are not trained."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from .others import esd_settings
from .parts import concept, settings
from .reduced import known, text_options, write_checkpoint

FP8 = torch.float8_e4m3fn
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def checkpoint(pack, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "sd1.safetensors", "sd1")


def clip_of(checkpoint, **options):
    import comfy.sd

    with torch.inference_mode():
        found = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_vae=False, te_model_options=text_options("sd1") | options
        )
    return found[1]


@pytest.fixture(scope="module")
def clip(checkpoint):
    return clip_of(checkpoint)


def is_linear(key, tensor):
    return key.endswith(".weight") and tensor.dim() == 2


def scaled(weights, scale_key, dtype=FP8):
    """Matrices in 8 bits over their own scale, as ``scaled_fp8`` checkpoints and ComfyUI's mixed
    precision have them."""
    made, whole = {}, dtype is torch.int8
    for key, tensor in weights.items():
        if is_linear(key, tensor):
            scale = tensor.float().abs().max() / (127 if whole else torch.finfo(dtype).max)
            values = tensor.float() / scale
            made[key] = (values.round() if whole else values).to(dtype)
            made[key.removesuffix("weight") + scale_key] = scale
        else:
            made[key] = tensor
    return made


def written_as(kind, weights, folder):
    """A denoiser's weights as a file for Load Diffusion Model, in a kind of 8 bits or "plain"."""
    metadata = None
    if kind == "scaled":
        weights = scaled(weights, "scale_weight") | {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    elif kind in ("mixed", "int8"):
        names = [k.removesuffix(".weight") for k, v in weights.items() if is_linear(k, v)]
        form = "float8_e4m3fn" if kind == "mixed" else "int8_tensorwise"
        layers = {name: {"format": form} for name in names}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        weights = scaled(weights, "weight_scale", FP8 if kind == "mixed" else torch.int8)
    path = folder / f"{kind}.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


def saved_as(kind, checkpoint, folder):
    """The U-Net of a checkpoint as a file for Load Diffusion Model."""
    weights = load_file(checkpoint)
    weights = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    return written_as(kind, weights, folder)


def loaded(path, weight_dtype=None):
    """As Load Diffusion Model loads it."""
    import comfy.sd

    options = {} if weight_dtype is None else {"dtype": weight_dtype}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options=options)


KINDS = ("fp8", "scaled", "mixed", "int8")
SOLVED = {
    "uce": {"keep_list": "none"},
    "reread": {
        "prompts": 4, "keep_prompts": 8, "near_words": 0, "sampling_steps": 1, "size": 64,
    },
    "casteer": {"pairs": 2, "sampling_steps": 2, "batch": 1, "size": 64},
    "oce": {"keep_list": "none", "general": 0.0, "preserve": 0.0, "form": "reflection"},
    "rece": {"rounds": 1, "keep_list": "none"},
    "trce": {"prompts": 4, "keep_list": "none"},
    "speed": {"copies": 2},
    "double_projections": {"keep_list": "common"},
    # On the text encoder; only the last reads the U-Net's weights.
    "quickfix": {"keep_list": "none"},
    "hirm": {"steps": 1, "keep_list": "none"},
    "reread_text": {"steps": 2, "batch": 2, "prompts": 2, "keep_prompts": 4, "keep_list": "none"},
}  # fmt: skip


def quantised_as(kind, checkpoint, folder):
    """The MODEL, and the same weights in 32 bits as the loader takes them."""
    from comfy.quant_ops import QUANT_ALGOS

    if kind == "int8" and "int8_tensorwise" not in QUANT_ALGOS:
        pytest.skip("This ComfyUI has no int8.")
    path = saved_as("plain" if kind == "fp8" else kind, checkpoint, folder)
    meant = {}
    for key, tensor in (weights := load_file(path)).items():
        if kind == "fp8":
            meant[key] = tensor.to(FP8).float()
        elif not key.endswith(("scale", "scale_weight", "scaled_fp8")):
            name = key.removesuffix("weight")
            scales = [name + end for end in ("scale_weight", "weight_scale")]
            scale = next((weights[each] for each in scales if each in weights), 1.0)
            meant[key] = tensor.float() * scale
    save_file(meant, folder / "meant.safetensors")
    return loaded(path, FP8 if kind == "fp8" else None), loaded(folder / "meant.safetensors")


def content(model):
    """Every weight's bytes."""
    values = {key: getattr(value, "_qdata", value) for key, value in model.state_dict().items()}
    return {
        key: value.detach().clone().contiguous().reshape(-1).view(torch.uint8)
        for key, value in values.items()
    }


def check_unchanged(model, before):
    after = content(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in model.modules())


def output(patcher, context):
    """What ComfyUI computes in sampling."""
    import comfy.model_management

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        sigma = patcher.model.model_sampling.sigmas[500:501].to(x)
        return x - patcher.model.apply_model(x, sigma, c_crossattn=context)


@pytest.fixture
def plain(pack, monkeypatch, checkpoint, clip, tmp_path):
    """The host of the unquantised model, and a strong patch for it."""
    with known(pack, monkeypatch, "sd1") as family:
        model = loaded(saved_as("plain", checkpoint, tmp_path))
        host = pack("fmn.hosts.comfyui.model").ComfyModel(model, clip)
        generator = torch.Generator().manual_seed(0)
        changes = {
            layer.name: (
                5 * torch.randn(layer.shape[0], 1, generator=generator),
                torch.randn(1, layer.shape[1], generator=generator) / layer.shape[1],
            )
            for layer in pack("fmn.models.families").layers(family)
            if layer.is_key_or_value
        }
        yield host, pack("fmn.patches.patch").ForgetPatch(family, changes, {"concepts": []})


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_models_wear_patches_and_are_not_trained(pack, plain, checkpoint, tmp_path, kind):
    host, patch = plain
    text = host.encode(concept(pack).training_prompts()[0]).context
    quantised = type(host)(quantised_as(kind, checkpoint, tmp_path)[0], host.clip)
    before, base = output(quantised.patcher, text), output(host.patcher, text)
    assert 0 < (before - base).norm() < 0.2 * base.norm()  # it is the same model, in 8 bits

    drawn = settings(pack, references="samples")  # refused before anything is drawn
    robust = pack("fmn.methods.reread").Settings(**SOLVED["reread"], robust_steps=1)
    for run, chosen in (("resteer", drawn), ("reread", robust), ("esd", esd_settings(pack))):
        with pytest.raises(pack("fmn.errors").ForgetError, match="quantised .*apply the patch h"):
            pack(f"fmn.methods.{run}").run(quantised, [concept(pack)], chosen)

    assert len(quantised.fingerprint()) == 32
    wanted = output(host.patched(patch, 1.0), text) - base
    found = output(quantised.patched(patch, 1.0), text) - before
    assert wanted.norm() > 0.1 * base.norm()
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.9
    assert torch.equal(output(quantised.patcher, text), before)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_solve_on_what_quantised_weights_stand_for(pack, plain, checkpoint, tmp_path, kind):
    """The same patch as on the same numbers in 32 bits, from the model as it is loaded."""
    host, _ = plain
    patchers = quantised_as(kind, checkpoint, tmp_path)
    eight, meant = (type(host)(patcher, host.clip) for patcher in patchers)
    before = content(eight.patcher.model)
    # How weights are read does not depend on the method, but on whether it reads or runs them.
    methods = SOLVED if kind == "fp8" else ("uce", "reread", "casteer", "reread_text")
    for method in methods:
        chosen = pack(f"fmn.methods.{method}").Settings(**SOLVED[method])
        patches = []
        for model in (eight, meant):
            with torch.inference_mode():
                patches.append(pack("fmn.methods").forget(model, [concept(pack)], chosen))
        found, wanted = patches
        assert found.changes.keys() == wanted.changes.keys()
        for name in wanted.changes:
            change = wanted.change_of(name)
            error = (found.change_of(name) - change).norm() / change.norm()
            # Layers in int8 round their inputs, too.
            assert error < (0.05 if kind == "int8" else 0.02), (method, name)
        check_unchanged(eight.patcher.model, before)


def test_cancel_and_error_leave_a_quantised_model_as_it_was(pack, plain, checkpoint, tmp_path):
    import comfy.model_management as management

    host, _ = plain
    eight = type(host)(quantised_as("scaled", checkpoint, tmp_path)[0], host.clip)
    before = content(eight.patcher.model)
    chosen = pack("fmn.methods.reread").Settings(**SOLVED["reread"])
    for error in (management.InterruptProcessingException, RuntimeError):

        def stop(step, error=error):
            raise error

        with torch.inference_mode(), pytest.raises(error):
            pack("fmn.methods").forget(eight, [concept(pack)], chosen, stop)
        check_unchanged(eight.patcher.model, before)


def test_a_batch_and_the_answer_after_it_on_a_quantised_model(
    pack, plain, checkpoint, tmp_path, monkeypatch
):
    host, _ = plain
    # Fewer words than the lists have: encoding them takes long.
    monkeypatch.setattr(pack("fmn.closed_form.nearest"), "candidates", lambda *_: ("wolf", "fox"))
    merging = pack("fmn.jobs.joint_merge")
    short = partial(merging.Settings, **SOLVED["reread"], images_per_concept=1)
    monkeypatch.setattr(merging, "Settings", short)
    eight = type(host)(quantised_as("fp8", checkpoint, tmp_path)[0], host.clip)
    chosen = pack("fmn.methods.uce").Settings(keep_list="none")
    animals = [concept(pack, name) for name in ("dog", "cat")]
    with torch.inference_mode():
        made = pack("fmn.jobs.batch").forget_each(eight, animals, chosen, tmp_path / "batch")
    assert len(made.files) == 2 and not made.failed
    patch = pack("fmn.patches.patch").load_patch(made.files[0])
    with torch.inference_mode():
        (outcome,) = pack("fmn.metrics.outcome").outcomes(eight, patch, animals[:1])
        merged = merging.joint_merge(eight, [(file, 1.0) for file in made.files])
    assert outcome.left is not None and merged.patch.concepts == ["dog", "cat"]


@pytest.mark.parametrize("name", ["ConceptInversionProbe", "MScore", "MScore, untouched"])
def test_nodes_that_learn_words_refuse_before_they_draw(
    pack, plain, checkpoint, tmp_path, monkeypatch, name
):
    host, _ = plain
    eight, _ = quantised_as("fp8", checkpoint, tmp_path)
    sampler = pack("fmn.models.image_sampler").ImageSampler
    monkeypatch.setattr(sampler, "draw", lambda *_, **__: pytest.fail("it draws"))
    given = {"clip": host.clip, "vae": None, "tokens": 1, "steps": 1, "lr": 0.01, "batch": 1}
    if name == "ConceptInversionProbe":
        execute = pack("nodes.attack").ConceptInversionProbe.execute
        given |= {"model": eight, "images": torch.zeros(1, 64, 64, 3), "words": "dog"}
        given |= {"save_as": "", "start": "", "templates": "", "training_seed": 0}
    else:
        execute = pack("nodes.measure").MScore.execute
        untouched = "untouched" in name
        given |= {"model": host.patcher if untouched else eight, "concepts": [concept(pack)]}
        given |= {"untouched": eight if untouched else None, "templates": "", "inversions": 1}
        given |= {"measuring_seed": 0}
    refused = pytest.raises(pack("fmn.errors").ForgetError, match="quantised .*cannot be trained")
    with torch.inference_mode(), refused:
        execute(pictures=1, **given)


def test_a_text_encoder_in_8_bits(pack, plain, checkpoint):
    """As --fp8_e4m3fn-text-enc loads it: it encodes prompts, but is not worked on itself."""
    host, _ = plain
    clip = clip_of(checkpoint, dtype=FP8)
    assert clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.dtype is FP8
    quantised = type(host)(host.patcher, clip)
    steps = [[], []]
    for model, seen in zip((host, quantised), steps):
        chosen = settings(pack, steps=1, size=64)
        pack("fmn.methods.resteer").run(model, [concept(pack)], chosen, seen.append)
    (one,), (two,) = (seen[-1].losses for seen in steps)
    assert one != two == pytest.approx(one, rel=0.2)
    refused = pytest.raises(pack("fmn.errors").ForgetError, match="CLIP's weights are quantised")
    with refused, quantised.borrow_text_encoder():
        pass


def test_weights_of_another_packs_kind(pack, demo):
    """A mock of GGUF's loader: bytes in a tensor class of its own, which claims the real shape."""

    class PackedTensor(torch.Tensor):
        @property
        def shape(self):
            return torch.Size((192, 128))

    attention = demo[0].model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    with torch.inference_mode():
        packed = torch.zeros(100, dtype=torch.uint8).as_subclass(PackedTensor)
        attention.to_k.weight = torch.nn.Parameter(packed, requires_grad=False)
    host = pack("fmn.hosts.comfyui.model").ComfyModel(*demo)
    with pytest.raises(pack("fmn.errors").ForgetError, match="quantised .*is uint8"):
        pack("fmn.methods.resteer").run(host, [concept(pack)], settings(pack, references="samples"))


@pytest.mark.parametrize("kind", ["scale_weight", "weight_scale"])
def test_files_with_scales_are_refused_outside_comfyui(pack, plain, checkpoint, tmp_path, kind):
    _, patch = plain
    path = tmp_path / "scaled.safetensors"
    weights = {k: v for k, v in load_file(checkpoint).items() if k.startswith(PREFIX)}
    save_file(scaled(weights, kind), path)
    merge = pack("fmn.patches.checkpoint").merge_into_checkpoint
    refused = pytest.raises(pack("fmn.errors").ForgetError, match="quantised weights.*float16")
    with refused:
        merge(path, [(patch, 1.0)], tmp_path / "merged.safetensors")
    with refused:
        pack("fmn.hosts.diffusers.model").DiffusersModel.load(path)
    assert not (tmp_path / "merged.safetensors").exists()


def test_plain_8_bit_files_outside_comfyui(pack, plain, checkpoint, tmp_path):
    """diffusers trains on what they hold, in float32; no patch is merged into them."""
    host, patch = plain
    path = tmp_path / "eight.safetensors"
    cast = {
        key: tensor.to(FP8) if key.startswith(PREFIX) and tensor.dim() == 2 else tensor
        for key, tensor in load_file(checkpoint).items()
    }
    save_file(cast, path)
    with pytest.raises(pack("fmn.errors").ForgetError, match="is float8_e4m3fn.*lost to rounding"):
        pack("fmn.patches.checkpoint").merge_into_checkpoint(
            path, [(patch, 1.0)], tmp_path / "merged"
        )
    model = pack("fmn.hosts.diffusers.model").DiffusersModel.load(path)
    for name in patch.changes:
        key = f"{PREFIX}{host.key(name).removeprefix('diffusion_model.')}"
        assert torch.equal(model.unet.get_submodule(name).weight, cast[key].float())
