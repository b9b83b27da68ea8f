from types import SimpleNamespace

from fmn.concepts.concept import Concept
from fmn.metrics.neighbours import Neighbours, neighbours
from fmn.models.unknown_family import UnknownFamily


def test_in_words():
    near = {"cat": 0.81, "wolf": 0.5}
    assert str(Neighbours("dog", near, ("cat", "wolf"))) == (
        "Nearest to dog: cat (81 %), wolf (50 %); they are kept."
    )
    assert str(Neighbours("dog", near, ("cat",))).endswith("wolf (50 %); not kept: wolf.")


def test_other_models_have_none():
    family = object.__new__(UnknownFamily)
    assert neighbours(SimpleNamespace(family=family), [Concept("dog")], None) == []


def test_nothing_is_told_if_all_listed_words_are_forgotten(monkeypatch):
    monkeypatch.setattr("fmn.metrics.neighbours.keep_for", lambda *_: ())
    model = SimpleNamespace(family=SimpleNamespace(known=True))
    settings = SimpleNamespace(keep_needs="x", near_words=0)
    assert neighbours(model, [Concept("dog")], settings) == []
