"""What other programs need of a file: zero layers, alpha, names in tags; what they leave out."""

import pytest
import torch
from safetensors.torch import load_file

from fmn.models.families import DEMO, SD1, SD2, SDXL, layers, layers_by_name
from fmn.patches.lora_keys import tag_name
from fmn.patches.padding import lost_elsewhere, zero_layers
from fmn.patches.patch import ForgetPatch, load_patch, save_patch

from ..tiny import make_patch, metadata_of, rewrite

H = "text_encoder.text_model.encoder.layers.0"
G = H.replace("encoder", "encoder_2", 1)
ATTN1 = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
ATTN2 = ATTN1.replace("attn1", "attn2")


def patch_of(family, names, rank=1):
    changes = {}
    for name in names:
        out, *rest = layers_by_name(family)[name].shape
        kernel = (1,) * (len(rest) - 1)
        changes[name] = torch.ones(out, rank, *kernel), torch.ones(rank, *rest)
    return ForgetPatch(family, changes, {"concepts": []})


def first_reader(family):
    return next(layer.name for layer in layers(family) if layer.is_key_or_value)


@pytest.mark.parametrize(
    "family, names, expected",
    [
        # Diff-QuickFix for 2.x: A1111 wants query, key and value too.
        (SD2, [f"{H}.self_attn.out_proj"], [f"{H}.self_attn.{x}_proj" for x in "qkv"]),
        (SD2, [f"{H}.self_attn.{x}_proj" for x in ("q", "k", "v", "out")], []),
        (
            SDXL, [f"{G}.self_attn.q_proj", ATTN2],
            [f"{G}.self_attn.{x}_proj" for x in ("k", "v", "out")],
        ),
        # CLIP-L keeps them apart.
        (SD1, [f"{H}.self_attn.out_proj"], []),
        # InvokeAI: ESD-u for 1.x and 2.x, and text layers alone for XL.
        (SD1, [ATTN1, "mid_block.resnets.0.time_emb_proj"], [first_reader(SD1)]),
        (SD2, [ATTN1], [first_reader(SD2)]),
        (SDXL, [f"{H}.mlp.fc1"], [first_reader(SDXL)]),
        (SDXL, [ATTN2], []),
        (SD1, [f"{H}.mlp.fc1"], [first_reader(SD1)]),
        (DEMO, ["mid_block.attentions.0.transformer_blocks.0.attn1.to_k"], []),  # no base of theirs
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 3])
def test_zero_layers_are_written_and_not_read_back(tmp_path, family, names, expected, rank):
    patch = patch_of(family, names, rank)
    assert [layer.name for layer in zero_layers(family, set(names))] == expected
    path = save_patch(patch, tmp_path / "patch.safetensors")
    tensors = load_file(path)
    assert len(tensors) == 2 * (len(names) + len(expected))  # and no alpha
    assert sum(not tensor.any() for tensor in tensors.values()) == 2 * len(expected)
    loaded = load_patch(path)
    assert loaded.changes.keys() == patch.changes.keys()
    for name in names:
        change = loaded.change_of(name)
        torch.testing.assert_close(change, torch.full_like(change, rank), rtol=2e-3, atol=0)


def test_the_reader_comes_before_what_invokeai_takes_for_sdxl():
    """Its loader stops at the first key that tells a width; keys are sorted by name."""
    every = [layer.name for layer in layers(SD1) if ".attn2." not in layer.name]
    keys = sorted(patch_of(SD1, every).lora())
    readers = [i for i, key in enumerate(keys) if "_attn2_to_k." in key]
    others = [i for i, key in enumerate(keys) if "time_emb_proj" in key]
    assert readers and others and readers[0] < others[0]


def test_a_zero_change_of_ours_is_kept(tmp_path):
    """Trained for no step: up is zero and down is not."""
    patch = patch_of(SD1, [first_reader(SD1), ATTN1])
    patch.changes = {name: (up * 0, down) for name, (up, down) in patch.changes.items()}
    loaded = load_patch(save_patch(patch, tmp_path / "patch.safetensors"))
    assert loaded.changes.keys() == patch.changes.keys()


def test_a_part_of_a_patch_has_no_padding():
    patch = patch_of(SD2, [ATTN1])
    assert len(patch.lora(layers=patch.layers)) == 2 < len(patch.lora())


@pytest.mark.parametrize(
    "name, tag",
    [
        ("Star Wars: A New Hope", "Star Wars A New Hope"),
        ("a > b", "a b"),
        ("<lora:x:1>", "lora x 1"),
        ("hatsune miku \\(vocaloid\\)", "hatsune miku vocaloid"),
        ("{a|b}\n[c]", "a b c"),
        ("van gogh, dog", "van gogh, dog"),
        ("\u68b5\u9ad8 caf\u00e9", "\u68b5\u9ad8 caf\u00e9"),
        ("a" * 500, "a" * 100),
    ],
)
def test_a_name_fits_into_a_tag(name, tag):
    assert tag_name(name) == tag


@pytest.mark.parametrize(
    "names, ranks, words",
    [
        (["conv_in", ATTN1], [1, 1], ["conv_in"]),
        (["conv_out", "time_embedding.linear_1"], [2, 2], ["conv_out, time_embedding.linear_1"]),
        ([ATTN1, ATTN2], [1, 1], []),
        ([ATTN1, ATTN2], [1, 2], ["rank 1 too weakly"]),
        ([ATTN1, ATTN2], [2, 4], []),
        (["conv_in", ATTN2], [1, 4], ["conv_in", "rank 1 too weakly"]),
    ],
)
def test_what_other_programs_leave_out(names, ranks, words):
    changes = {name: patch_of(SD1, [name], rank).changes[name] for name, rank in zip(names, ranks)}
    notes = lost_elsewhere(SD1, changes)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes))


def test_with_and_without_alpha_is_the_same(tmp_path):
    path = save_patch(make_patch(rank=4), tmp_path / "patch.safetensors")
    plain = load_patch(path)

    def add_alpha(tensors, metadata):
        tensors |= {f"{key.partition('.')[0]}.alpha": torch.tensor(4.0).half() for key in tensors}

    old = load_patch(rewrite(path, add_alpha))
    for name, factors in plain.changes.items():
        assert all(map(torch.equal, factors, old.changes[name]))
    assert "ss_network_alpha" in metadata_of(path)
