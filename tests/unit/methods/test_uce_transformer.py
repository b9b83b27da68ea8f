"""UCE on a transformer: its regression written out, on a text embedder with random weights."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fmn.concepts.concept import Concept
from fmn.concepts.keep_list import keep_for
from fmn.concepts.prompt_templates import kept_sentences, sentences
from fmn.errors import ForgetError
from fmn.methods import forget, uce
from fmn.models.interface import Text, fingerprint
from fmn.models.sampling import SigmaSchedule
from fmn.models.transformers import BY_KEY
from fmn.models.unknown_family import family_of_model

WIDTH, POOLED, OUT = 10, 6, 8
TEXT, VECTOR = "lora_unet_txt_in", "lora_unet_vector_in_in_layer"
CONCEPTS = [Concept("dog", aliases=("hound",), anchor="cat"), Concept("red car")]
KEEP = ("blue house", "a man on a horse")


class TextSide:
    """Flux's pooled layer and text embedder, which must run no further than these."""

    prediction, device = "flow", torch.device("cpu")
    schedule = SigmaSchedule(*torch.tensor([[0.5, 1.0], [1.0, 1.0], [0.5, 0.0]]))

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.modules = {VECTOR: nn.Linear(POOLED, OUT), TEXT: nn.Linear(WIDTH, OUT)}
        shapes = {
            "vector_in.in_layer": (OUT, POOLED), "txt_in": (OUT, WIDTH),
            "double_blocks.0.img_attn.proj": (OUT, OUT),
        }  # fmt: skip
        self.family = family_of_model("Flux", shapes, BY_KEY["flux"], latent_channels=4)
        self.calls = 0

    def fingerprint(self):
        return fingerprint(self.family, lambda layer: torch.zeros(layer.shape))

    def encode(self, prompt):
        """A random row for each word and one behind them, which depends on all of them."""
        rows = [self._row(word) for word in prompt.text.split()]
        end = torch.stack(rows).mean(0) if rows else torch.zeros(WIDTH)
        context = torch.stack([*rows, self._row("end") + end])
        return Text(context[None], {"pooled_output": context.mean(0)[None, :POOLED]}, alone=True)

    def _row(self, word):
        generator = torch.Generator().manual_seed(sum(map(ord, word)))
        return torch.randn(WIDTH, generator=generator)

    @contextmanager
    def watch(self, batch, side):
        yield self

    def module(self, name):
        return self.modules[name]

    def predict_each(self, x_t, t, texts):
        assert x_t.shape[:2] == (1, 4) and t == 1 and len(texts) == 1
        self.calls += 1
        self.modules[VECTOR](texts[0].vectors["pooled_output"])
        self.modules[TEXT](texts[0].context)
        raise AssertionError("the forward went on behind the text's layers")


def rows_of(model, layer, text):
    given = model.encode(uce.Prompt(text, ""))
    return (given.context[0] if layer == TEXT else given.vectors["pooled_output"]).double()


def informative(rows, empty, count):
    distance = (rows[:, None] - empty).square().sum(-1).amin(1)
    return rows[distance.sort(descending=True).indices[:count]]


def literal(model, layer, settings, kept, tokens=32, concepts=CONCEPTS):
    """W' - W of equation 7 with means, its damping a share of the mean eigenvalue."""
    weight, empty = model.modules[layer].weight.double(), rows_of(model, layer, "")
    system, right = torch.zeros(2, len(weight.T), len(weight.T)).double()
    for concept in concepts:
        cs, stars = [], []
        for text, other in sentences(concept, uce.SENTENCES):
            others = rows_of(model, layer, other)
            for c in informative(rows_of(model, layer, text), empty, tokens):
                cs.append(c)
                stars.append(others[(others - c).square().sum(1).argmin()])
        for c, star in zip(cs, stars):
            system += settings.erase * torch.outer(c, c) / len(cs)
            right += settings.erase * torch.outer(star - c, c) / len(cs)
    rows = torch.cat([informative(rows_of(model, layer, text), empty, tokens) for text in kept])
    system += uce.KEPT_WEIGHT * settings.preserve * rows.T @ rows / len(rows)
    system += settings.damping * system.trace() / len(system) * torch.eye(len(system))
    return weight @ right @ system.inverse()


@pytest.mark.parametrize("tokens", [32, 2])
@pytest.mark.parametrize(
    "settings", [uce.Settings(keep_list="none"), uce.Settings(2.0, 0.3, 0.1, keep_list="none")]
)
def test_equation_7_on_recorded_rows(monkeypatch, settings, tokens):
    monkeypatch.setattr(uce, "TOKENS", tokens)
    model, steps = TextSide(), []
    patch = forget(model, CONCEPTS, settings, steps.append, KEEP)
    for layer in (TEXT, VECTOR):
        expected = literal(model, layer, settings, ["", *KEEP], tokens)
        torch.testing.assert_close(patch.change_of(layer).double(), expected, rtol=1e-4, atol=1e-5)
        assert not model.modules[layer]._forward_hooks
    # The empty prompt, 30 pairs, and what is kept; each ends behind the text's layers.
    assert model.calls == 1 + 60 + 3 == steps[-1].index == steps[-1].total
    assert patch.info["loss"]["first"] == 1 and 0 < patch.info["loss"]["last"] < 1


def test_sentences_of_the_shipped_list_are_kept():
    model, settings = TextSide(), uce.Settings()
    patch = forget(model, CONCEPTS, settings, keep=KEEP)
    words = keep_for(CONCEPTS, (), "auto")
    kept = kept_sentences(words, keep_for(CONCEPTS, (), "styles"), min(len(words), 128))
    expected = literal(model, TEXT, settings, [*kept, *KEEP])
    torch.testing.assert_close(patch.change_of(TEXT).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_rank_and_no_weights():
    patch = forget(TextSide(), CONCEPTS, uce.Settings(rank=1, preserve=0.0))
    assert patch.ranks == [2]
    patch = forget(TextSide(), CONCEPTS, uce.Settings(erase=0.0))
    assert all(patch.change_of(layer).abs().max() < 1e-5 for layer in (TEXT, VECTOR))


@pytest.mark.parametrize(
    ("changes", "concept", "words"),
    [
        ({"tokens": "all", "expand": True}, CONCEPTS[0], "tokens, expand for U-Nets only.*Flux.1"),
        ({"attributes": "woman 0.3"}, CONCEPTS[0], "attributes for U-Nets only.*Re-read"),
        ({}, Concept("dog", learned=(torch.ones(1, 2),)), "learned embeddings for U-Nets only"),
        (
            {},
            Concept("dog", prompts=("a dog",), anchor="god", kind="custom"),
            "dog' is encoded as.*god",
        ),
    ],
)
def test_what_only_unets_have_and_concepts_without_effect(changes, concept, words):
    with pytest.raises(ForgetError, match=words):
        forget(TextSide(), [concept], uce.Settings(**changes))


def test_a_model_without_finite_numbers_is_refused():
    model = TextSide()
    with torch.no_grad():
        model.modules[TEXT].weight[0, 0] = torch.inf
    with pytest.raises(ForgetError, match="txt_in' gave numbers that are not finite"):
        forget(model, CONCEPTS, uce.Settings())
