"""Patch files: what is written, what is read back, and what is refused."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fmn
from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.files import write_whole
from fmn.models.families import DEMO, SD1, SD2, SDXL, layers
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import ForgetPatch, load_patch, save_patch

from ..tiny import make_patch, metadata_of, rewrite

DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


def unet(layer):
    return True


def middle(layer):
    return layer.is_key_or_value and layer.name.startswith("mid_block")


def some_convolutions(layer):
    return layer.name in (
        "conv_in",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.resnets.0.conv1",
    )


@pytest.mark.parametrize(
    "family, rank, scope",
    [
        (SD1, 4, None), (SD2, 4, None), (SDXL, 2, middle), (DEMO, 4, None), (DEMO, 1, unet),
        (SD1, 3, some_convolutions),
    ],
)  # fmt: skip
def test_round_trip(tmp_path, family, rank, scope):
    patch = make_patch(family, rank=rank, **({"scope": scope} if scope else {}))
    loaded = load_patch(save_patch(patch, tmp_path / "patch.safetensors"))
    assert loaded.family is family
    assert loaded.changes.keys() == patch.changes.keys()
    assert loaded.concepts == ["dog", "van gogh"]
    assert {**loaded.info, "rounding_error": None} == {**patch.info, "rounding_error": None}
    difference = total = 0.0
    for name in patch.changes:
        exact, change = patch.change_of(name), loaded.change_of(name)
        assert exact.shape == change.shape
        # Both factors are rounded to 11 bits.
        torch.testing.assert_close(change, exact, rtol=0, atol=2e-3 * float(exact.abs().max()))
        difference += float((change - exact).square().sum())
        total += float(exact.square().sum())
    error = (difference / total) ** 0.5
    assert 0 < error < 1e-3
    assert loaded.info["rounding_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("up_size, down_size", [(1e-6, 1.0), (1e-9, 1e4), (0.0, 1.0)])
def test_small_and_lopsided_factors_survive_float16(tmp_path, up_size, down_size):
    patch = make_patch()
    patch.changes = {n: (u * up_size, d * down_size) for n, (u, d) in patch.changes.items()}
    loaded = load_patch(save_patch(patch, tmp_path / "patch.safetensors"))
    for name in patch.changes:
        exact = patch.change_of(name)
        assert (loaded.change_of(name) - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "family, modules, rank_4_bytes",
    # peers.md section 6: 0.40, 0.46 and 3.6 MB.
    [(SD1, 32, 396_288), (SD2, 32, 461_824), (SDXL, 140, 3_624_960), (DEMO, 14, 32_768)],
    ids=["sd1", "sd2", "sdxl", "demo"],
)
def test_tensors_of_a_file(family, modules, rank_4_bytes):
    tensors = make_patch(family, rank=4).lora()
    names = {key.partition(".")[0] for key in tensors}
    assert all(name.startswith("lora_unet_") for name in names) and len(names) == modules
    parts = {"lora_down.weight", "lora_up.weight"}
    assert set(tensors) == {f"{name}.{part}" for name in names for part in parts}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(tensor.numel() * 2 for tensor in tensors.values()) == rank_4_bytes


@pytest.mark.parametrize(
    "family, prediction, expected",
    [
        (SD1, "epsilon", ("stable-diffusion-v1", "sd_v1", "False", "512x512", "diffusers")),
        (SD2, "epsilon", ("stable-diffusion-v2-512", "sd_v2", "True", "512x512", "diffusers")),
        (SD2, "v", ("stable-diffusion-v2-768-v", "sd_v2_v", "True", "512x512", "diffusers")),
        (
            SDXL, "epsilon",
            ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False", "1024x1024",
             "https://github.com/Stability-AI/generative-models"),
        ),
        (DEMO, "epsilon", ("stable-diffusion-v1", "sd_v1", "False", "128x128", "diffusers")),
    ],
    ids=["sd1", "sd2", "sd2-v", "sdxl", "demo"],
)  # fmt: skip
def test_metadata(tmp_path, family, prediction, expected):
    architecture, base_version, v2, resolution, implementation = expected
    path = save_patch(make_patch(family, prediction), tmp_path / "patch.safetensors")
    metadata = metadata_of(path)
    date, rounding = metadata.pop("modelspec.date"), metadata.pop("fmn.rounding_error")
    assert DATE.fullmatch(date) and json.loads(metadata.pop("fmn.date")) == date
    assert 0 < json.loads(rounding) < 1e-3
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata.pop("modelspec.hash_sha256") == f"0x{hashlib.sha256(data).hexdigest()}"
    assert metadata == {
        "fmn.format": "1",
        "fmn.base.family": family.key,
        "fmn.base.fingerprint": json.dumps("f" * 32),
        "fmn.base.prediction": json.dumps(prediction),
        "fmn.concepts": json.dumps(
            [
                {"name": "dog", "kind": "object", "aliases": ["puppy"], "prompts": []},
                {"name": "van gogh", "kind": "style", "aliases": [], "prompts": []},
            ]
        ),
        "fmn.method": '"resteer"',
        "fmn.settings": '{"steps": 35, "lr": 0.001}',
        "fmn.loss": '{"first": 2.0, "last": 1.0, "steps": 2}',
        "fmn.truncation_error": "0",
        "fmn.version": json.dumps(fmn.__version__),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": "Forget dog, van gogh",
        "modelspec.description": f"Makes {family.title} forget: dog, van gogh",
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": prediction,
        "ss_base_model_version": base_version,
        "ss_v2": v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": "forget dog, van gogh",
    }


def test_mixed_ranks_are_dynamic_and_have_alpha(tmp_path):
    patch = make_patch(rank=4)
    name = next(iter(patch.changes))
    patch.changes[name] = patch.changes[name][0][:, :1], patch.changes[name][1][:1]
    path = save_patch(patch, tmp_path / "patch.safetensors")
    metadata = metadata_of(path)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert load_patch(path).ranks == [1, 4]
    tensors = load_file(path)  # diffusers before 0.42 would scale the layer of rank 1 by 4
    assert {
        (float(tensors[key]), len(tensors[key.replace("alpha", "lora_down.weight")]))
        for key in tensors
        if key.endswith(".alpha")
    } == {(1, 1), (4, 4)}


def test_names_are_kept_as_plain_text(tmp_path):
    names = ["<script>alert(1)</script>", "${jndi:x}", 'quo"te\\', "\u68b5\u9ad8", "a" * 5000]
    patch = make_patch(concepts=[Concept(name) for name in names])
    assert load_patch(save_patch(patch, tmp_path / "patch.safetensors")).concepts == names


def test_saving_again_keeps_what_rounding_lost(tmp_path):
    path = tmp_path / "patch.safetensors"
    first = load_patch(save_patch(make_patch(), path))
    again = load_patch(save_patch(first, path))
    assert again.info == first.info
    assert all(torch.equal(first.change_of(n), again.change_of(n)) for n in first.changes)


@pytest.fixture
def saved(tmp_path):
    return save_patch(make_patch(rank=4), tmp_path / "patch.safetensors")


@pytest.mark.parametrize("alpha", [torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(6.0)])
def test_alpha_over_rank_scales_the_change(saved, alpha):
    tensors = load_file(saved)
    alphas = {f"{key.partition('.')[0]}.alpha": alpha.clone() for key in tensors}
    rewrite(saved, lambda tensors, metadata: tensors.update(alphas))
    loaded = load_patch(saved)
    for layer in layers(DEMO):
        if layer.is_key_or_value:
            prefix = file_name(DEMO, layer)
            up, down = (tensors[f"{prefix}.lora_{part}.weight"].float() for part in ("up", "down"))
            expected = up @ down * float(alpha) / 4
            torch.testing.assert_close(loaded.change_of(layer.name), expected)


def test_later_fields_are_ignored(saved):
    expected = load_patch(saved).info
    rewrite(saved, lambda tensors, metadata: metadata.update({"fmn.unheard_of": "no JSON"}))
    assert load_patch(saved).info == expected


@pytest.mark.parametrize("family", [DEMO, SD1, SDXL], ids=lambda family: family.key)
def test_twin_names_load_alike(tmp_path, family):
    path = save_patch(make_patch(family, scope=middle), tmp_path / "patch.safetensors")
    expected = load_patch(path)
    twin = {}
    for layer in layers(family):
        written = file_name(family, layer)
        other = layer.name if family.stability_names else layer.compvis
        twin[written] = "lora_unet_" + other.replace(".", "_")

    def rename(tensors, metadata):
        for key in list(tensors):
            prefix, _, part = key.partition(".")
            tensors[f"{twin[prefix]}.{part}"] = tensors.pop(key)

    loaded = load_patch(rewrite(path, rename))
    assert loaded.changes.keys() == expected.changes.keys()
    assert all(
        torch.equal(loaded.change_of(name), expected.change_of(name)) for name in loaded.changes
    )


def test_other_base_of_the_family_is_fine_but_no_other_family():
    patch = make_patch(SD1)
    patch.check_family(SD1)
    with pytest.raises(
        ForgetError, match=r"for Stable Diffusion 1\.x, the model is Stable Diffusion XL"
    ):
        patch.check_family(SDXL)


def blocked_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "patch.safetensors"


def blocked_deeper(tmp_path):
    return blocked_folder(tmp_path).parent / "sub" / "patch.safetensors"


def folder_of_that_name(tmp_path):
    (tmp_path / "patch.safetensors").mkdir()
    return tmp_path / "patch.safetensors"


def proc(tmp_path):
    return Path("/proc/forget-me-not/patch.safetensors")


@pytest.mark.parametrize("target", [blocked_folder, blocked_deeper, folder_of_that_name, proc])
def test_unwritable(tmp_path, target):
    path = target(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ForgetError, match=r"'patch.safetensors' could not be saved in .* \(.+\)"):
        save_patch(make_patch(), path)
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_makes_folders_and_replaces_files(tmp_path):
    path = tmp_path / "new" / "folder" / "patch.safetensors"
    save_patch(make_patch(rank=1), path)
    save_patch(make_patch(rank=3), path)
    assert load_patch(path).ranks == [3]
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def write(file):
        Path(file).write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_whole(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys
from fmn.errors import ForgetError
from fmn.patches.patch import load_patch, save_patch

source, *targets = sys.argv[1:]
patch = load_patch(source)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
for target in targets:
    try:
        save_patch(patch, target)
    except ForgetError as error:
        print(error)
"""


def test_full_disk(tmp_path, saved):
    pytest.importorskip("resource", reason="Windows has no limit on the size of a file")
    folder = tmp_path / "full"
    folder.mkdir()
    old, new = folder / "old.safetensors", folder / "new.safetensors"
    old.write_bytes(b"an earlier patch")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, saved, old, new],
        cwd=Path(fmn.__file__).parent.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("'old.safetensors' could not be saved") and "free some space" in first
    assert second.startswith("'new.safetensors' could not be saved")
    assert list(folder.iterdir()) == [old]
    assert old.read_bytes() == b"an earlier patch"


def test_a_change_too_large_for_the_file_is_refused(tmp_path):
    layer = next(layer for layer in layers(DEMO) if layer.is_key_or_value)
    factors = torch.full((layer.shape[0], 1), 1e6), torch.full((1, layer.shape[1]), 1e6)
    patch = ForgetPatch(DEMO, {layer.name: factors}, {"concepts": []})
    with pytest.raises(ForgetError, match="too large for 16-bit numbers"):
        save_patch(patch, tmp_path / "patch.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_factors_whose_product_overflows_are_refused(tmp_path):
    path = save_patch(make_patch(), tmp_path / "patch.safetensors")
    rewrite(
        path, lambda tensors, _: tensors.update({k: v.float() * 1e25 for k, v in tensors.items()})
    )
    with pytest.raises(ForgetError, match="NaN or infinite"):
        load_patch(path)


def test_a_name_that_is_no_text_can_be_saved(tmp_path):
    """A command line hands over bytes that are no UTF-8 as lone surrogates."""
    path = save_patch(make_patch(concepts=[Concept("caf\udce9")]), tmp_path / "patch.safetensors")
    assert metadata_of(path)["modelspec.title"] == "Forget caf?"
    assert load_patch(path).concepts == ["caf\udce9"]
