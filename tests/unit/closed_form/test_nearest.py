import math
from types import SimpleNamespace

import pytest
import torch

from fmn.closed_form.nearest import nearest, nearest_kept
from fmn.concepts.concept import Concept
from fmn.models.interface import Text

ANGLES = {"dog": 0.0, "wolf": 0.2, "car": 3.0, "cat": -0.4, "tree": 1.6}  # their mean is about 0


def model_of(angles):
    def encoded(texts, length):
        ends = [angles.get(text, math.pi) for text in texts]
        rows = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in ends])
        return rows[:, None].expand(-1, length, -1)

    return SimpleNamespace(
        family=SimpleNamespace(known=True),
        tokenize=lambda prompt: [49406, 320, 49407],
        encode_all=encoded,
    )


def test_the_nearest_words_are_those_of_the_smallest_angle_at_the_mean():
    (found,) = nearest(model_of(ANGLES), [("dog", ["car", "cat", "tree", "wolf"])], 2)
    assert list(found) == ["wolf", "cat"]
    ends = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in ANGLES.values()])
    dog, wolf = (ends - ends.mean(0))[:2]
    assert found["wolf"] == pytest.approx(float(dog @ wolf / dog.norm() / wolf.norm()))


def test_texts_of_a_transformer_count_by_the_mean_of_their_tokens():
    """The first token is a template's: the same in all."""
    template = torch.tensor([[5.0, 5.0]])

    def encode(prompt):
        angle = ANGLES[prompt.text]
        words = torch.tensor([[math.cos(angle), math.sin(angle)]])
        return Text(torch.cat([template, words])[None])

    model = SimpleNamespace(family=SimpleNamespace(known=False), encode=encode)
    (found,) = nearest(model, [("dog", ["car", "cat", "tree", "wolf"])], 2)
    (same,) = nearest(model_of(ANGLES), [("dog", ["car", "cat", "tree", "wolf"])], 2)
    assert found == pytest.approx(same)


def test_there_are_no_words():
    assert nearest(model_of(ANGLES), [("dog", [])], 2) == [{}]


def test_a_text_that_several_ask_for_is_encoded_once():
    model, seen = model_of(ANGLES), []
    encoded = model.encode_all
    model.encode_all = lambda texts, length: seen.extend(texts) or encoded(texts, length)
    asked = [("dog", ["car", "cat", "tree"]), ("cat", ["car", "tree", "wolf"])]
    both = nearest(model, asked, 2)
    assert sorted(seen) == sorted(ANGLES)
    assert both == [nearest(model, [each], 2)[0] for each in asked]


def test_the_nearest_of_the_shipped_lists_leave_out_what_is_forgotten():
    angles = {"dog": 0.0, "hot dog": 0.01, "wolf": 0.1, "cat": 0.2, "fox": 0.3}
    concepts = [Concept("dog"), Concept("cat")]
    assert nearest_kept(model_of(angles), concepts, 2) == ["wolf", "fox"]
    assert nearest_kept(model_of(angles), concepts, 0) == []
