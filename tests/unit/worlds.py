"""A suite, a judge and a lab small enough for exact tests; grey pictures, told by brightness."""

import copy

import torch

from fmn.bench.measures.trial import Trial
from fmn.bench.running.cells import Setup
from fmn.bench.running.lab import Lab
from fmn.bench.suite import parse_suite

from .tiny import TinyModel

DATA = {
    "name": "little",
    "title": "Little world",
    "concepts": {
        "identity": {"old man": "an old man"},
        "object": {"dog": "a dog", "cat": "a cat", "tree": "a tree"},
    },
    "styles": {"dark": "{} in dark", "light": "{} in light"},
    "far": ["tree"],
    "targets": [
        {
            "name": "dog",
            "kind": "object",
            "split": "tune",
            "near": ["cat"],
            "aliases": ["hound"],
            "prompts": {"short": ["a dog runs"], "paraphrases": ["a barking pet"]},
            "together": {"a dog and a tree": "tree"},
        },
        {"name": "light", "kind": "style", "near": ["dark"]},
    ],
    "sampling": {"steps": 2, "guidance": 2},
    "model": "little.safetensors",
    "judge": "grey",
}


def data(**changes):
    return copy.deepcopy(DATA) | changes


SUITE = parse_suite(data(), "little")


class GreyJudge:
    """Sorts pictures into labels by brightness."""

    name = "grey"
    labels = {
        "concept": ("old man", "dog", "cat", "tree", "nothing"),
        "style": ("dark", "light"),
    }

    def probabilities(self, images, domain):
        levels = images.mean((1, 2, 3))
        count = len(self.labels[domain])
        index = (levels * count).long().clamp(0, count - 1)
        return torch.nn.functional.one_hot(index, count).float()

    def features(self, images):
        return images.flatten(1)[:, ::997].float()


class Sees(GreyJudge):
    """Finds the target's label in every picture, or in none."""

    def __init__(self, concept="dog", style="light"):
        self.found = {"concept": concept, "style": style}

    def probabilities(self, images, domain):
        p = torch.zeros(len(images), len(self.labels[domain]))
        p[:, self.labels[domain].index(self.found[domain])] = 1
        return p


class Odd(GreyJudge):
    """Finds a dog in about half of all pictures, whatever they show."""

    def probabilities(self, images, domain):
        odd = (images.mean((1, 2, 3)) * 10000).long() % 2
        return torch.nn.functional.one_hot(odd, len(self.labels[domain])).float()


def make_trial(sampler, target="dog", suite=SUITE, **more):
    """A trial of three pictures a question, whose judge finds a dog in all of them."""
    target = suite.find(target) if isinstance(target, str) else target
    given = {"suite": suite, "target": target, "sampler": sampler, "judge": Sees(), "count": 3}
    return Trial(**given | more)


def make_setup(**changes):
    given = {"suite": data(), "model": "little", "fingerprint": "f", "judge": "grey", "count": 4}
    return Setup(**given | changes)


def make_lab(setup=None, **changes):
    given = {"model": TinyModel(), "judge": GreyJudge()}
    return Lab(setup or make_setup(), **given | changes)
