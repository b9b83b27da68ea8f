"""What the demo's judges learn from, and how a demo model is checked with them."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from demo import judge_check, judge_pictures, judges, pictures
from fmn.errors import ForgetError
from fmn.metrics.demo_judge import NOTHING, SIDE, Network

CONCEPTS, STYLES = ("ant", "bee", "cow", "dog"), tuple(pictures.STYLES)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def flat_data():
    """One flat colour for each pair of four concepts and nine styles."""
    rows = [{"concept": concept, "style": style} for concept in CONCEPTS for style in STYLES]
    colours = np.random.default_rng(0).integers(0, 256, (len(rows), 1, 1, 3), dtype=np.uint8)
    return judges.Data(np.broadcast_to(colours, (len(rows), 128, 128, 3)), rows), rows


def drawings(count=8):
    """White paper with a dark square in the middle."""
    paper = torch.ones(count, 3, 128, 128)
    paper[:, :, 40:88, 40:88] = 0.1
    return paper


def test_data_names_what_it_holds():
    data, rows = flat_data()
    assert data.labels == {"concept": (*CONCEPTS, NOTHING), "style": STYLES}
    for i in (0, 13, 35):
        assert CONCEPTS[data.concepts[i]] == rows[i]["concept"]
        assert STYLES[data.styles[i]] == rows[i]["style"]
    assert data.take(torch.tensor([3, 3])).shape == (2, 3, 128, 128)


def test_pairs_of_one_drawing_are_left_out_together():
    named = [concept.concept for concept in pictures.concepts()]
    held = {(c, s) for c in named for s in STYLES if judges.left_out(c, s)}
    assert 0.05 < len(held) / len(named) / len(STYLES) < 0.15
    for concept in named:
        groups = defaultdict(set)
        for style in STYLES:
            groups[pictures.STYLES[style][0]].add((concept, style) in held)
        assert all(len(found) == 1 for found in groups.values())
    assert any(not pictures.held_out(*pair) for pair in held)


@pytest.mark.parametrize("change", [judge_pictures.changed, judge_pictures.estranged])
def test_changes_are_pictures_and_by_chance_alone(change):
    given = drawings()
    first, second = change(chance(), given), change(chance(), given)
    assert torch.equal(first, second)
    assert not torch.equal(first, change(chance(1), given))
    assert first.min() >= 0 and first.max() <= 1 and first.isfinite().all()
    assert torch.equal(given, drawings())


def test_changed_pictures_keep_their_square():
    found = judge_pictures.changed(chance(), drawings(32))
    assert found.shape == (32, 3, SIDE, SIDE)
    middle = found[:, :, SIDE // 2 - 3 : SIDE // 2 + 3, SIDE // 2 - 3 : SIDE // 2 + 3].mean(
        (1, 2, 3)
    )
    corner = found[:, :, :4, :4].mean((1, 2, 3))
    assert (middle < corner - 0.3).all()


def test_unmoved_is_untouched():
    given = torch.rand(2, 3, 32, 32, generator=chance())
    found = judge_pictures.moved(chance(), given, zoom=(1, 1), shift=0, turn=0, warp=0, mirror=0)
    torch.testing.assert_close(found, given, rtol=1e-4, atol=1e-5)


def test_blur_keeps_the_mean_of_flat_parts_and_spreads_a_point():
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(judge_pictures.blurred(flat, 2.0), flat)
    point = torch.zeros(1, 3, 33, 33)
    point[:, :, 16, 16] = 1
    spread = judge_pictures.blurred(point, 2.0)[0, 0]
    places = torch.arange(33) - 16.0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(0) * places**2).sum()) == pytest.approx(4, rel=0.05)


def test_shuffling_keeps_every_pixel():
    given = torch.rand(3, 3, SIDE, SIDE, generator=chance())
    found = judge_pictures.shuffled(chance(), given)
    assert torch.equal(found.flatten(2).sort().values, given.flatten(2).sort().values)
    assert not torch.equal(found, given)


@pytest.mark.parametrize("count", [7, 8, 30])
def test_nothing_has_the_number_asked_for(count):
    given = torch.rand(5, 3, SIDE, SIDE, generator=chance())
    found = judge_pictures.of_nothing(chance(), given, count)
    assert found.shape == (count, 3, SIDE, SIDE)
    assert found.min() >= 0 and found.max() <= 1


def test_batch_says_the_right_things():
    data, _ = flat_data()
    bank = judges.Bank(data, 3)
    size = judges.BATCH - judges.NOTHINGS
    assert bank.images.shape == (3 * judges.BATCH, 3, SIDE, SIDE)
    assert bank.images.dtype == torch.uint8
    for start in range(0, len(bank.images), judges.BATCH):
        shown, nothing = slice(start, start + size), slice(start + size, start + judges.BATCH)
        assert (bank.concepts[shown] < 4).all() and (bank.concepts[nothing] == 4).all()
        assert set(bank.styles[shown].sum(1).tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(bank.styles[nothing], torch.full((judges.NOTHINGS, 9), 1 / 9))
        assert not bank.held[nothing].any()
    told = bank.styles.max(1).values == 1
    for concept, style, held in zip(
        bank.concepts[told], bank.styles[told].argmax(1), bank.held[told]
    ):
        assert bool(held) == judges.left_out(CONCEPTS[concept], STYLES[style])


def test_training_learns_and_its_rate_ends_at_nothing():
    data, _ = flat_data()
    bank = judges.Bank(data, 1)
    torch.manual_seed(0)
    network = Network("demo:2", data.labels)
    rows = torch.arange(16)
    judges.train_network(network, bank, rows, 8, "test")
    said = judges.answers(network, bank.images[rows].float() / 255)
    assert (said["concept"] == bank.concepts[rows]).float().mean() > 0.6
    assert not network.training
    assert judges.rate_at(0.05) == 1 and judges.rate_at(1) == 0 and judges.rate_at(0.025) == 0.5


def row(concept, style, first, second):
    names = "concept", "style"
    said = {"demo": dict(zip(names, first)), "demo:2": dict(zip(names, second))}
    return {"concept": concept, "style": style, "seed": 0, "said": said}


def test_summary_counts():
    rows = [
        row("dog", "twemoji", ("dog", "twemoji"), ("dog", "twemoji")),
        row("dog", "3d render", ("cat", "3d render"), ("dog", "3d render")),
        row("cat", "3d render", ("cat", "twemoji"), ("nothing", "twemoji")),
        row("alien", "3d render", ("alien", "3d render"), ("alien", "twemoji")),
    ]
    found = judge_check.summary(rows)
    first, second = found["judges"].values()
    assert first["all"] == {"pictures": 4, "concept": 0.75, "style": 0.75, "both": 0.5}
    assert second["all"] == {"pictures": 4, "concept": 0.75, "style": 0.5, "both": 0.5}
    assert first["held out"] == {"pictures": 1, "concept": 1, "style": 1, "both": 1}
    assert first["by style"]["3d render"]["concept"] == pytest.approx(0.6667)
    assert first["by concept"]["dog"] == {"pictures": 2, "concept": 0.5, "style": 1, "both": 0.5}
    assert found["agreement"] == {"concept": 0.5, "style": 0.75} and found["pictures"] == 4
    text = judge_check.as_text(found)
    assert "judges agree: concept 50.0%, style 75.0%" in text
    assert "dog" in text and "alien  " not in text, "only concepts that were misjudged are listed"


def test_pairs_are_those_of_the_sets():
    every = judge_check.wanted_pairs(STYLES)
    assert len(every) == len(set(every)) == 1064, "as many as demo/pictures.py draws"
    assert ("mrs claus", "ink drawing") not in every and ("mrs claus", "twemoji") in every
    assert {style for _, style in judge_check.wanted_pairs(["twemoji"])} == {"twemoji"}


def test_some_pairs_are_the_same_ones_each_time():
    some = judge_check.wanted_pairs(STYLES, 90)
    assert some == judge_check.wanted_pairs(STYLES, 90) and len(set(some)) == 90
    assert {style for _, style in some} == set(STYLES)
    assert set(some) < set(judge_check.wanted_pairs(STYLES))


@pytest.mark.parametrize("count", [0, -1, 1065])
def test_bad_number_of_pairs(count):
    with pytest.raises(ForgetError, match="There are 1064 pairs"):
        judge_check.wanted_pairs(STYLES, count)
