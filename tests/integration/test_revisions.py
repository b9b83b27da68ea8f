"""A method whose patches change has to raise its ``REVISION``: stored results are kept by it."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.hosts.diffusers.transformer import DiffusersTransformer
from fmn.methods import METHODS, forget, method, revision, settings_of

RECORD = Path(__file__).with_name("revisions.json")
# What makes a run short; Re-read is hardened too, so that its training counts.
SHORT = {
    "keep_list": "common", "prompts": 3, "keep_prompts": 4, "steps": 2, "batch": 2,
    "size": 64, "sampling_steps": 1, "robust_steps": 1, "robust_pictures": 1,
    "transformer_prompts": 3,
}  # fmt: skip
TOLERANCE = 5e-3  # of the norm: what another processor or version of torch may round differently


@pytest.fixture(scope="module")
def demo():
    return DiffusersModel.load("demo")


def measured(patch):
    """The norm of all changes, and their sum with signs drawn by chance."""
    generator = torch.Generator().manual_seed(0)
    squares = signed = 0.0
    for name in sorted(patch.changes):
        change = patch.change_of(name).double()
        signs = torch.randint(0, 2, change.shape, generator=generator) * 2 - 1
        squares += float(change.square().sum())
        signed += float((change * signs).sum())
    return squares**0.5, signed


@pytest.fixture(scope="module")
def transformer():
    return DiffusersTransformer.load_demo()


@pytest.mark.parametrize(
    ("name", "network"),
    [*((name, "demo") for name in METHODS), ("reread", "transformer"), ("uce", "transformer")],
)
def test_a_change_of_results_raises_the_revision(request, name, network):
    model, preset = request.getfixturevalue(network), METHODS[name][0]
    name = name if network == "demo" else f"{name}, {network}"
    known = {each.name for each in fields(method(preset).Settings)}
    short = {each: SHORT[each] for each in SHORT.keys() & known}
    if network == "transformer":  # its robust steps are for U-Nets
        short |= dict.fromkeys(short.keys() & {"robust_steps"}, 0)
    settings = settings_of(preset, short)
    patch = forget(model, [Concept("dog", anchor="cat")], settings)
    norm, signed = measured(patch)
    entry = {
        "revision": revision(preset),
        "layers": len(patch.changes),
        "norm": float(f"{norm:.6g}"),
        "signed": float(f"{signed:.6g}"),
    }
    recorded = json.loads(RECORD.read_text("utf-8"))[name]
    advice = (
        f"{name} makes other patches than revision {recorded['revision']} did. If that is wanted, "
        f"raise REVISION in its module and record {json.dumps(entry)} in {RECORD.name}."
    )
    assert entry["layers"] == recorded["layers"], advice
    assert abs(norm - recorded["norm"]) <= TOLERANCE * recorded["norm"], advice
    assert abs(signed - recorded["signed"]) <= TOLERANCE * recorded["norm"], advice
    assert entry["revision"] == recorded["revision"], f"record {json.dumps(entry)} anew"
