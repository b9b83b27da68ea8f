"""What training says at its end, on the demo model."""

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import forget, settings_of
from fmn.metrics.neighbours import Neighbours, neighbours
from fmn.metrics.outcome import outcomes
from fmn.models.families import DEMO, text_layers
from fmn.patches.patch import ForgetPatch
from tests.unit.tiny import make_patch


@pytest.fixture(scope="module")
def demo():
    return DiffusersModel.load("demo")


def near(concept, *words):
    return [Neighbours(concept, dict.fromkeys(words, 0.5), ())]


def test_a_known_concept_is_mostly_gone(demo):
    dog = [Concept("dog")]
    patch = forget(demo, dog, settings_of("reread-quick", {}))
    (found,) = outcomes(demo, patch, dog, near("dog", "car", "tree"))
    assert found.left < 0.2 and "may not know" not in str(found)
    assert set(found.kept) == {"car", "tree"} and max(found.kept.values()) < 0.9, found


def test_words_that_the_model_never_saw_are_named(demo):
    """Most of them: docs/training.md counts."""
    unknown = [Concept("unicorn"), Concept("lighthouse"), Concept("krobbit")]
    found = outcomes(demo, make_patch(size=0.0), unknown)
    assert all(f"may not know '{each.name}'" in str(one) for each, one in zip(unknown, found))
    assert [one.left for one in found] == pytest.approx([1.0] * 3, abs=1e-3)


def test_a_patch_of_the_text_encoder_counts_too(demo):
    generator, changes = torch.Generator().manual_seed(0), {}
    for layer in text_layers(DEMO):
        out, width = layer.shape
        up, down = (torch.randn(shape, generator=generator) for shape in ((out, 2), (2, width)))
        changes[layer.name] = up * 0.1, down
    patch = ForgetPatch(DEMO, changes, make_patch().info)
    (found,) = outcomes(demo, patch, [Concept("dog")], near("dog", "cat"))
    assert abs(found.left - 1) > 0.05 and found.kept["cat"] > 0.05


def test_the_nearest_words_are_told_before(demo):
    """And which of them the method keeps: the user's always, others only with ``near_words``."""
    dog = [Concept("dog")]
    (found,) = neighbours(demo, dog, settings_of("reread", {"near_words": 0}), ("my pet",))
    (kept,) = neighbours(demo, dog, settings_of("reread", {"near_words": 3}))
    (ignored,) = neighbours(demo, dog, settings_of("casteer", {}))
    assert len(found.near) == 3 and list(found.near.values()) == sorted(found.near.values())[::-1]
    assert kept.kept == tuple(kept.near) and str(kept).endswith("they are kept.")
    assert ignored.kept == () and ", ".join(ignored.near) in str(ignored)
    (none,) = neighbours(demo, dog, settings_of("reread", {"preserve": 0.0}))
    (two,) = neighbours(demo, dog, settings_of("reread", {"near_words": 2, "keep_list": "none"}))
    assert none.kept == () and two.kept == tuple(two.near)[:2]
    assert "dog" not in " ".join(kept.near)
