"""Patches of transformers: each family's style of file, and all styles read."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.models.transformers import BY_KEY, TRANSFORMERS
from fmn.models.unknown_family import family_of_model
from fmn.patches.file_kind import kind_of, split_lora_key
from fmn.patches.import_patch import import_patch
from fmn.patches.merge import merge_patches
from fmn.patches.patch import ForgetPatch, load_patch, save_patch

from ..tiny import make_patch, metadata_of, rewrite

STARTS = {"kohya": "lora_unet_", "path": "diffusion_model.", "peft": "transformer."}
EXAMPLES = {
    "flux": "transformer.single_transformer_blocks.11.proj_out",
    "flux2": "lora_unet_single_blocks_11_linear2",
    "z_image": "lora_unet_layers_11_attention_out",
    "sd3": "transformer.time_text_embed.text_embedder.linear_1",
    "anima": "diffusion_model.blocks.0.cross_attn.output_proj",
    "hidream": "diffusion_model.single_stream_blocks.11.block.attn1.to_out",
}


def patch_of(entry, style="", more=(), ranks=(2, 2)):
    """A patch of the readers in blocks 0 and 11, and of more paths."""
    paths = dict.fromkeys(
        reader.comfy.format(block) for reader in (*entry.readers, *entry.text) for block in (0, 11)
    )
    entry = replace(entry, file=style or entry.file)
    family = family_of_model("Model", dict.fromkeys([*paths, *more], (6, 4)), entry=entry)
    generator = torch.Generator().manual_seed(0)
    changes = {
        layer.name: (
            torch.randn(6, ranks[i % 2], generator=generator),
            torch.randn(ranks[i % 2], 4, generator=generator),
        )
        for i, layer in enumerate(family.listed)
    }
    return ForgetPatch(family, changes, make_patch().info | {"base.prediction": "flow"})


def same(first, second):
    assert first.changes.keys() == second.changes.keys()
    for name in first.changes:
        torch.testing.assert_close(
            first.change_of(name), second.change_of(name), rtol=0.01, atol=0.01
        )


@pytest.mark.parametrize("style", STARTS)
@pytest.mark.parametrize("entry", TRANSFORMERS, ids=lambda entry: entry.key)
def test_each_family_in_each_style(tmp_path, entry, style):
    patch = patch_of(entry, style)
    path = save_patch(patch, tmp_path / "patch.safetensors")
    assert all(key.startswith(STARTS[style]) for key in load_file(path))
    loaded = load_patch(path)
    same(loaded, patch)
    assert loaded.family.entry is entry and not loaded.info.get("changed")
    assert metadata_of(path)["modelspec.architecture"] == f"{entry.architecture}/lora"
    again = load_file(save_patch(loaded, tmp_path / "again.safetensors"))  # in the entry's style
    assert all(key.startswith(STARTS[entry.file]) for key in again)
    assert kind_of(again) == "a LoRA" and all(map(split_lora_key, again))
    imported = import_patch(path, [Concept("dog")]).patch  # its metadata name the model
    assert imported.family.entry is entry and imported.info["base.prediction"] == "flow"
    same(imported, patch)


@pytest.mark.parametrize("key", EXAMPLES)
def test_names_in_the_file(tmp_path, key):
    tensors = load_file(save_patch(patch_of(BY_KEY[key]), tmp_path / "patch.safetensors"))
    parts = ("down", "up") if BY_KEY[key].file == "kohya" else ("A", "B")
    assert {f"{EXAMPLES[key]}.lora_{part}.weight" for part in parts} <= tensors.keys()
    assert not any(name.endswith("alpha") for name in tensors)


def test_alpha_only_in_the_style_that_has_it():
    alphas = {
        style: sum(
            key.endswith(".alpha") for key in patch_of(BY_KEY["flux"], style, (), (1, 3)).lora()
        )
        for style in STARTS
    }
    assert alphas == {"kohya": 6, "path": 0, "peft": 0}


def test_layers_without_a_name_at_diffusers_turn_the_file_to_kohyas_style(tmp_path):
    patch = patch_of(BY_KEY["flux"], more=["double_blocks.0.txt_attn.qkv"])
    path = save_patch(patch, tmp_path / "patch.safetensors")
    assert all(key.startswith("lora_unet_") for key in load_file(path))
    same(load_patch(path), patch)


def test_an_older_file_and_a_new_one_are_merged(tmp_path):
    new = patch_of(BY_KEY["flux"])
    old = save_patch(patch_of(BY_KEY["flux"], "kohya"), tmp_path / "old.safetensors")
    rewrite(old, lambda _, metadata: metadata.pop("fmn.base.transformer"))
    for sources in ([(new, 1.0), (old, 1.0)], [(old, 1.0), (new, 1.0)]):
        merged = merge_patches(sources, budget=10**5).patch
        path = save_patch(merged, tmp_path / "merged.safetensors")
        assert all(key.startswith("transformer.") for key in load_file(path))
        for name in new.changes:
            torch.testing.assert_close(
                load_patch(path).change_of(name), 2 * new.change_of(name), rtol=0.02, atol=0.02
            )


PEFT = "transformer.transformer_blocks.0.attn.to_out.0"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"fmn.base.transformer": None}, "no name of a LoRA's layer"),
        ({}, {"fmn.base.transformer": "flux9"}, "no name of a LoRA's layer"),
        ({"transformer.more.lora_A.weight": torch.ones(1, 4)}, {}, "no name of a LoRA's layer"),
        ({"lora_unet_a.b.lora_A.weight": torch.ones(1, 4)}, {}, "no name of a LoRA's layer"),
        ({f"{PEFT}.lora_down.weight": torch.ones(2, 4)}, {}, "twice"),
        ({"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2, 4),
          "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(6, 2)},
         {}, "twice"),
        ({f"{PEFT}.lora_A.weight": None}, {}, "make no weight"),
        ({f"{PEFT}.lora_B.weight": torch.ones(1 << 16, 2),
          f"{PEFT}.lora_A.weight": torch.ones(2, 1 << 15)}, {}, "make no weight"),
        ({f"{PEFT}.lora_A.weight": torch.ones(3, 4)}, {}, "does not fit"),
        ({f"{PEFT}.dora_scale": torch.ones(6)}, {}, "no name of|does not have"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, tensors, metadata, message):
    path = save_patch(patch_of(BY_KEY["flux"]), tmp_path / "patch.safetensors")

    def change(*parts):
        for part, new in zip(parts, (tensors, metadata)):
            part.update({key: value for key, value in new.items() if value is not None})
            for key in new:
                if new[key] is None:
                    del part[key]

    rewrite(path, change)
    with pytest.raises(ForgetError, match=message):
        load_patch(path)
