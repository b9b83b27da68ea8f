"""Patches for the tests of the shelf, in a folder of their own below models/forget_patches."""

import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn.concepts.concept import Concept
from fmn.images import thumbnail_uri
from fmn.models.families import DEMO, SDXL, layers
from fmn.patches.patch import ForgetPatch, save_patch

FOLDER = "shelf tests"
DEMO_BASE = "31a36f84a352c2c121951bd00dad75e7"  # tests/unit/patches/test_base_file.py
ATTACK = '"><img src="x" onerror="window.fmnAttacked = true"><script>fmnAttacked = 1</script>'


def folder_of(base):
    return base / "models" / "forget_patches" / FOLDER


def write(folder, name, concept, kind="object", family=DEMO, thumbnail=None, **info):
    layer = next(layer for layer in layers(family) if layer.is_key_or_value)
    changes = {layer.name: (torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1]))}
    record = {
        "concepts": [Concept(concept, kind).describe()], "base.fingerprint": "f" * 32,
        "loss": {"first": 2.0, "last": 1.0, "steps": 5},
    }  # fmt: skip
    return save_patch(ForgetPatch(family, changes, record | info), folder / name, thumbnail)


def before_and_after():
    """A red picture and a blue one."""
    pictures = torch.zeros(2, 128, 128, 3)
    pictures[0, ..., 0] = pictures[1, ..., 2] = 1
    return pictures


def fill(base):
    """Four usual patches, one that is none, and one that attacks in every text it has."""
    folder = folder_of(base)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scores = {"UA": 0.97, "IRA": 0.914, "M-Score": 0.4123}
    measured = {
        "suite": "Demo model", "targets": ["dog"], "judge": "demo", "base": DEMO_BASE,
        "count": 12, "date": "2026-05-04T00:00:00+00:00",
    }  # fmt: skip
    write(folder, "dog.safetensors", "dog", method="reread", date="2026-05-04T00:00:00+00:00",
          thumbnail=thumbnail_uri(before_and_after()), scores=scores, measured=measured,
          **{"base.fingerprint": DEMO_BASE})  # fmt: skip
    write(folder, "cat.safetensors", "cat", method="uce", date="2026-05-03T00:00:00+00:00")
    write(folder, "gogh.safetensors", "van gogh", "style", method="esd",
          date="2026-05-02T00:00:00+00:00")  # fmt: skip
    write(folder, "santa.safetensors", "santa claus", "identity", SDXL, method="reread",
          date="2026-05-01T00:00:00+00:00")  # fmt: skip
    (folder / "junk.safetensors").write_bytes(b"not a patch" * 9)
    return folder


def write_attack(folder):
    """Markup wherever a file has a say: metadata, file name, notes, thumbnail and a path."""
    path = write(folder, "attack' onerror=fmnAttacked=1 x='.safetensors", ATTACK, method=ATTACK)
    said = {
        "fmn.concepts": f'[{{"name": {quoted(ATTACK)}, "kind": {quoted(ATTACK)}}}]',
        "fmn.base.family": "other",
        "fmn.base.model": ATTACK,
        "fmn.base.fingerprint": quoted(ATTACK),
        "fmn.scores": f"{{{quoted(ATTACK)}: 1}}",
        "ss_network_dim": ATTACK,
        "ss_output_name": "../../../../etc/passwd",
        "modelspec.thumbnail": f"javascript:fmnAttacked=1//{ATTACK}",
    }
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | said
    save_file(load_file(path), path, metadata=metadata)
    notes = path.with_name(path.name.replace(".safetensors", ".fmn.json"))
    notes.write_text(f'{{"notes": {quoted("</textarea>" + ATTACK)}}}')
    return path


def quoted(text):
    return '"' + text.replace('"', '\\"') + '"'
