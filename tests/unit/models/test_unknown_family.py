"""Families made from a loaded model or a file, and blocks that write in place."""

import pytest
import torch

from fmn.errors import ForgetError
from fmn.models.interface import fingerprint
from fmn.models.module_patching import checkpointed
from fmn.models.saved_tensors import copied_before_writing
from fmn.models.transformers import BY_KEY
from fmn.models.unknown_family import MAX_ENTRIES, family_of_file, family_of_model
from fmn.patches.lora_keys import file_name, known_names
from fmn.training.fit_adapters import in_scope


def family(*paths):
    return family_of_model("Net", {path: (6, 4) for path in paths}, latent_channels=16)


@pytest.mark.parametrize(
    ("paths", "x", "strict"),
    [
        (("joint_blocks.3.context_block.attn.qkv", "joint_blocks.3.x_block.attn2.qkv"), 1, 0),
        (("double_blocks.0.txt_attn.proj", "double_blocks.0.img_attn.proj"), 1, 0),
        (
            ("double_layers.1.attn.w1q", "double_layers.1.attn.w1k", "single_layers.0.attn.w1q"),
            2,
            1,
        ),
        (("double_stream_blocks.0.block.attn1.to_v_t", "x.block.attn1.to_v"), 1, 1),
        (("blocks.0.cross_attn.kv_linear", "blocks.0.cross_attn.proj", "blocks.0.attn.proj"), 2, 1),
        (("blocks.0.attn2.kv_proj", "blocks.0.attn2.out_proj", "blocks.0.attn1.out_proj"), 2, 1),
        (("a.1.attn2.to_k", "a.1.attn2.to_q", "a.1.attn2.to_out.0", "a.1.attn1.to_k"), 3, 1),
    ],
)
def test_scopes_by_name(paths, x, strict):
    made = family(*paths)
    assert len(in_scope(made, "attention")) == x and len(in_scope(made, "unet")) == len(paths)
    assert len(in_scope(made, "not-attention")) == len(paths) - x
    if strict:
        assert len(in_scope(made, "kv")) == strict
    else:
        with pytest.raises(ForgetError, match="Net has no .* choose more layers"):
            in_scope(made, "kv")


@pytest.mark.parametrize("scope", ["attention", "kv", "not-attention"])
def test_one_stream_has_only_all(scope):
    with pytest.raises(ForgetError, match="choose more layers"):
        in_scope(family("layers.0.attention.qkv", "layers.0.w1"), scope)


def test_names():
    made = family("a.0.to_k", "b")
    assert [file_name(made, layer) for layer in made.listed] == [
        "lora_unet_a_0_to_k",
        "lora_unet_b",
    ]
    paths = {f"diffusion_model.{layer.compvis}": layer for layer in made.listed}
    assert known_names(made) == {layer.name: layer for layer in made.listed} | paths
    assert not any(layer.is_text for layer in family("text_encoder.x").listed)


@pytest.mark.parametrize(
    ("paths", "message"), [((), "no plain Linear"), (("a.b_c", "a_b.c"), "two layers called")]
)
def test_models_without_usable_names_are_refused(paths, message):
    with pytest.raises(ForgetError, match=message):
        family(*paths)


def test_fingerprint_covers_every_layer_if_no_keys_are_known():
    weights = {"a.qkv": torch.ones(6, 4), "b": torch.ones(6, 4)}
    made = family(*weights)
    before = fingerprint(made, lambda layer: weights[layer.compvis])
    for path in weights:
        changed = weights | {path: torch.zeros(6, 4)}
        assert fingerprint(made, lambda layer: changed[layer.compvis]) != before  # noqa: B023


def test_families_are_the_same_by_class():
    factors = {"lora_unet_a": {"up": [6, 2], "down": [2, 4]}}
    file, other = (family_of_file("f", name, None, factors) for name in ("Net", "Flux"))
    assert file.is_same(family("b")) and not file.is_same(other)
    assert [(layer.name, layer.shape) for layer in file.listed] == [("lora_unet_a", (6, 4))]


def test_one_class_may_hold_two_kinds_of_transformers():
    z_image, lumina, older = (
        family_of_model("Lumina2", {"a": (6, 4)}, BY_KEY.get(key))
        for key in ("z_image", "lumina2", "")
    )
    assert z_image.is_same(older) and older.is_same(lumina) and not lumina.is_same(z_image)


@pytest.mark.parametrize(
    ("up", "down"),
    [((6, 2), ()), ((), (2, 4)), ((6, 2), (2, 4, 1)), ((0, 2), (2, 4)), ((MAX_ENTRIES, 1), (1, 2))],
)
def test_claims_out_of_bounds_are_refused(up, down):
    with pytest.raises(ForgetError, match="make no weight"):
        family_of_file("f", "Net", None, {"lora_unet_a": {"up": up, "down": down}})


class InPlace(torch.nn.Module):
    """A block that writes into what it gets and into what its backward reads."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x, scale, nothing=None):
        hidden = self.linear(torch.layer_norm(x, (3,))) * scale["by"]
        x += hidden.exp()
        hidden.mul_(x)
        x += hidden
        return nothing, x


@pytest.mark.parametrize("learns", [(0, 1), (1,)])
def test_recomputed_blocks_in_place(learns):
    """The same gradients as without recomputing, of weights and of what several blocks share."""
    torch.manual_seed(0)
    blocks, scale = torch.nn.ModuleList([InPlace(), InPlace()]), torch.tensor(0.5)
    blocks.requires_grad_(False)
    for i in learns:
        blocks[i].requires_grad_(True)
    scale.requires_grad_(True)
    found = []
    for modules in ([], blocks):
        blocks.zero_grad()
        scale.grad = None
        with (
            copied_before_writing(),
            checkpointed(modules, in_place=True),
        ):
            x = torch.linspace(-1, 1, 6).view(2, 3)
            for block in blocks:
                nothing, x = block(x, scale={"by": scale})
                assert nothing is None
            x.square().sum().backward()
        wanted = [p for p in blocks.parameters() if p.requires_grad]
        found.append([x.detach(), scale.grad.clone(), *(p.grad.clone() for p in wanted)])
    torch.testing.assert_close(found[1], found[0])
    assert all(part.norm() > 0 for part in found[0])
