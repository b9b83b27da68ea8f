"""Patches that change text encoders: files, hosts, and what borrowing an encoder offers."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fmn.concepts.concept import Prompt
from fmn.errors import ForgetError
from fmn.hosts.diffusers.load import make_tokenizer
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import hirm
from fmn.methods.describe import describe
from fmn.models.families import DEMO, SD1, SD2, SDXL, CLIPConfig, text_layers
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling
from fmn.patches.patch import ForgetPatch, load_patch, save_patch
from tests.unit.tiny import make_patch, metadata_of, rewrite, same_tensors, weights_of

PROMPT = Prompt("a photo of a dog", "dog")
FAMILIES = [DEMO, SD1, SD2, SDXL]


def text_changes(family, part=".layers.0.", size=0.05):
    generator = torch.Generator().manual_seed(7)
    return {
        layer.name: (
            size * torch.randn(layer.shape[0], 2, generator=generator),
            torch.randn(2, layer.shape[1], generator=generator),
        )
        for layer in text_layers(family)
        if part in layer.name
    }


def text_patch(family=DEMO, **options):
    return ForgetPatch(family, text_changes(family, **options), make_patch().info)


@pytest.fixture
def model():
    return DiffusersModel.load("demo")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_file_with_text_layers(tmp_path, family):
    first = make_patch(family, rank=1, scope=lambda layer: layer.name == "conv_in")
    both = ForgetPatch(family, first.changes | text_changes(family), first.info)
    path = save_patch(both, tmp_path / "both.safetensors")
    loaded = load_patch(path)
    assert loaded.changes_text and loaded.changes_unet
    assert [layer.name for layer in loaded.layers] == ["conv_in", *text_changes(family)]
    for name in both.changes:
        exact = both.change_of(name)
        assert (loaded.change_of(name) - exact).norm() < 1e-3 * exact.norm()
    prefixes = {key.partition("_text_model_")[0] for key in load_file(path) if "lora_te" in key}
    assert prefixes == ({"lora_te1", "lora_te2"} if family is SDXL else {"lora_te"})
    assert metadata_of(path)["ss_network_dim"] == "Dynamic"
    assert "dog (object)" in describe(loaded)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight"])
def test_text_layers_of_another_shape_are_refused(tmp_path, family, part):
    path = save_patch(text_patch(family), tmp_path / "text.safetensors")

    def wider(tensors, metadata):
        key = next(key for key in tensors if key.endswith(f"0_mlp_fc2.{part}"))
        tensors[key] = torch.cat([tensors[key], tensors[key]], 1 if "down" in part else 0)

    width = family.texts[0].width
    with pytest.raises(ForgetError, match=rf"mlp.fc2' of shape \[{width}, {4 * width}\]"):
        load_patch(rewrite(path, wider))


@pytest.mark.parametrize("family, other", [(SD1, SD2), (SD2, SD1), (SDXL, SD1), (SD1, SDXL)])
def test_text_layers_of_another_family_are_refused(tmp_path, family, other):
    path = save_patch(text_patch(family), tmp_path / "text.safetensors")
    with pytest.raises(ForgetError, match="does not have|does not fit"):
        load_patch(
            rewrite(path, lambda t, metadata: metadata.update({"fmn.base.family": other.key}))
        )


def test_a_sampler_applies_a_text_patch(model):
    patch, unet = text_patch(), make_patch(DEMO)
    plain = model.encode(PROMPT).context
    merged = DiffusersModel.load("demo").add_patches([(patch, 0.5)]).encode(PROMPT).context
    with open_sampler(model, Sampling(steps=2)) as sampler:
        assert torch.equal(sampler.text(PROMPT.text).context, plain)
        with sampler.applying([(patch, 0.5), (unet, 1.0)]):
            worn = sampler.text(PROMPT.text).context
            with sampler.unpatched():
                assert torch.equal(sampler.text(PROMPT.text).context, plain)
                bare = sampler.draw([PROMPT.text], [1])
            assert torch.equal(sampler.text(PROMPT.text).context, worn)
            drawn = sampler.draw([PROMPT.text], [1])
        assert torch.equal(sampler.text(PROMPT.text).context, plain)
        assert torch.equal(sampler.draw([PROMPT.text], [1]), bare)
    assert (worn - plain).abs().max() > 0.1 and not torch.equal(drawn, bare)
    torch.testing.assert_close(worn, merged, rtol=0, atol=1e-4)


def test_a_unet_patch_leaves_the_text(model):
    with open_sampler(model, Sampling(steps=1)) as sampler:
        before = sampler.text(PROMPT.text)
        with sampler.applying([(make_patch(DEMO), 1.0)]):
            assert sampler.text(PROMPT.text) is before  # kept, not encoded again


def test_a_variant_of_another_width_is_refused(model):
    part = ".layers.0.mlp.fc1"
    patch = text_patch(part=part)
    module = model.text_module(f"text_encoder.text_model.encoder{part}")
    module.weight = torch.nn.Parameter(torch.zeros(512, 130))
    message = r"changes 'clip_l.*fc1' of shape \[512, 128\], the model has \[512, 130\]"
    with pytest.raises(ForgetError, match=message):
        model.add_patches([(patch, 1.0)])
    with (
        pytest.raises(ForgetError, match=message),
        open_sampler(model) as sampler,
        sampler.applying([(patch, 1.0)]),
    ):
        pass
    assert not module._forward_hooks


def test_diffusers_own_loader_does_the_same(model, tmp_path):
    """``load_lora_weights`` on our file: the same prompt embeddings as our merge."""
    path = save_patch(text_patch(), tmp_path / "text.safetensors")
    plain = model.encode(PROMPT).context
    merged = (
        DiffusersModel.load("demo").add_patches([(load_patch(path), 1.0)]).encode(PROMPT).context
    )
    logging.set_verbosity_error()  # no U-Net layers, which it finds odd
    model.pipeline.load_lora_weights(load_file(path))
    loaded = model.encode(PROMPT).context
    assert (merged - plain).abs().max() > 0.1
    torch.testing.assert_close(loaded, merged, rtol=0, atol=1e-4)
    model.pipeline.unload_lora_weights()
    assert torch.equal(model.encode(PROMPT).context, plain)


def test_a_borrowed_encoder_can_be_watched_with_gradients(model):
    name = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    with torch.inference_mode(), model.borrow_text_encoder() as text:
        module, seen = text.module(name), []
        hook = module.register_forward_hook(
            lambda module, args, output: seen.append((args[0], output))
        )
        vectors = text.vectors("dog").requires_grad_()
        text.encode("a <*>", vectors)
        ((inputs, output),) = seen
        hook.remove()
        torch.testing.assert_close(output, inputs @ module.weight.mT + module.bias)
        output.square().sum().backward()
        assert vectors.grad.norm() > 0 and module.weight.grad is None
        assert text.device == torch.device("cpu") and not module.weight.requires_grad


TINY_XL = replace(
    SDXL, context_dim=40, vector_dim=64,
    texts=(CLIPConfig("clip_l", 3, 16), CLIPConfig("clip_g", 4, 24)),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_xl():
    """A host with SDXL's two text encoders, small, and no U-Net."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoders = [
            make(
                CLIPTextConfig(
                    hidden_size=encoder.width, num_hidden_layers=encoder.blocks,
                    num_attention_heads=2, intermediate_size=4 * encoder.width, projection_dim=24,
                )
            )
            for encoder, make in zip(TINY_XL.texts, (CLIPTextModel, CLIPTextModelWithProjection))
        ]  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer("!"),
        add_watermarker=False,
    )  # fmt: skip
    return TinyXL(pipeline)


class TinyXL(DiffusersModel):
    prediction = "epsilon"
    device = torch.device("cpu")

    def __init__(self, pipeline):
        self.pipeline, self.family, self.unet = pipeline, TINY_XL, SimpleNamespace(dtype=None)

    def fingerprint(self):
        return "f" * 32


@contextmanager
def of_two_encoders():
    with pytest.raises(ForgetError, match="Stable Diffusion XL has two text encoders"):
        yield


def test_two_encoders_can_be_borrowed_but_learn_no_words(tiny_xl):
    with of_two_encoders(), tiny_xl.borrow_text_encoder():
        pass
    expected = tiny_xl.encode(PROMPT)
    short, whole = (tiny_xl.encode_all([PROMPT.text, ""], length) for length in (20, 77))
    assert whole.shape == (2, 77, 40)
    torch.testing.assert_close(short, whole[:, :20])
    with tiny_xl.borrow_text_encoder(words=False) as text:
        encoded, pooled = text.encode(PROMPT.text)
        with of_two_encoders():
            text.vectors("dog")
        with of_two_encoders():
            text.encode("a <*>", torch.zeros(1, 16))
        ids = text.ids_of([PROMPT.text, "a cat"])
        assert ids.shape == (2, 2, 77)
        both = text.encode_ids(ids[..., :20])
        with pytest.raises(ForgetError, match="placeholder"):
            text.encode("a <*>")
        with pytest.raises(ForgetError, match="tokens"):
            text.encode("dog " * 90)
        for number in ("", "_2"):
            name = f"text_encoder{number}.text_model.encoder.layers.0.mlp.fc1"
            assert text.module(name).weight.shape == ((64, 16) if not number else (96, 24))
    assert encoded.context.shape == (1, 77, 40) and pooled.shape == (1, 24)
    assert torch.equal(encoded.context, expected.context)
    assert torch.equal(encoded.vectors["pooled"], expected.vectors["pooled"])
    assert torch.equal(pooled, expected.vectors["pooled"])
    torch.testing.assert_close(both.context[:1], expected.context[:, :20], rtol=0, atol=1e-5)
    torch.testing.assert_close(both.vectors["pooled"][:1], pooled, rtol=0, atol=1e-5)


def test_only_the_first_of_two_encoders_is_trained(tiny_xl):
    """Up to the last block whose output the U-Net reads, here the second of three."""
    concept = SimpleNamespace(
        anchor="", kind="object", subjects=("dog",), describe=lambda: {"name": "dog"}
    )
    encoders = tiny_xl.pipeline.text_encoder, tiny_xl.pipeline.text_encoder_2
    before = [weights_of(encoder) for encoder in encoders]
    settings = hirm.Settings(steps=3, preserve=0.0, scale=50.0)
    patch = hirm.run(tiny_xl, [concept], settings)
    assert all(same_tensors(*pair) for pair in zip(before, map(weights_of, encoders)))
    assert list(patch.changes) == [
        layer.name for layer in text_layers(TINY_XL)[:6] if layer.name.startswith("text_encoder.")
    ]
    assert all(patch.change_of(name).norm() > 0 for name in patch.changes)
    assert hirm.last_projection(TINY_XL).startswith("text_encoder.text_model.encoder.layers.1.")
    assert patch.info["loss"]["last"] < patch.info["loss"]["first"]


def test_what_trained_comes_back_as_it_was(tiny_xl):
    encoders = tiny_xl.pipeline.text_encoder, tiny_xl.pipeline.text_encoder_2
    encoders[1].train()
    with pytest.raises(RuntimeError, match="a fault"), tiny_xl.borrow_text_encoder(words=False):
        assert not any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        assert not encoders[1].training
        raise RuntimeError("a fault")
    assert encoders[1].training and all(p.requires_grad for p in encoders[0].parameters())
    encoders[1].eval()
