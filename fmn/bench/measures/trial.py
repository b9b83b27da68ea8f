"""What a measure works with: a model that wears the patches under test, and judges."""

import math
import zlib
from dataclasses import dataclass, field

import torch

from ..suite import Suite, Target


@dataclass(frozen=True)
class Ask:
    """One picture to draw, and what it should show; None where that is left open."""

    prompt: str
    seed: int
    concept: str | None = None
    style: str | None = None


@dataclass
class Trial:
    """One target on one model.

    Attributes:
        sampler: a ``fmn.models.image_sampler.ImageSampler`` that wears the patches under test.
        judge, check: the judge that counts, and one of another architecture or None.
        count: pictures a question.
        seed: of everything that is drawn by chance.
        cache: what the untouched model gives, pictures by (prompt, seed), shared by all trials.
        controls: name -> pictures of things that the model never knew.
        names: all that is forgotten here, if it is more than the target.
        train: function from names to a patch that forgets them, on the model as it is now.
    """

    suite: Suite
    target: Target
    sampler: object
    judge: object
    check: object = None
    clip: object = None
    count: int = 12
    seed: int = 0
    cache: dict = field(default_factory=dict)
    controls: dict = field(default_factory=dict)
    names: tuple[str, ...] = ()
    train: object = None

    def ask(self, prompt, index=0, concept=None, style=None):
        """An ``Ask`` whose seed belongs to its prompt and index, the same for every method."""
        seed = zlib.crc32(f"{self.seed}|{prompt}|{index}".encode())
        return Ask(prompt, seed, concept, style)

    def pairs(self, concepts, styles, count):
        """``count`` asks that go around both lists at once, so that no pair recurs early."""
        asks, round_trip = [], math.lcm(len(concepts), len(styles))
        for i in range(count):
            concept = concepts[i % len(concepts)]
            # A step to the side each time both lists are through gives pairs not had yet.
            style = styles[(i + i // round_trip) % len(styles)]
            prompt = self.suite.prompt(concept, style)
            asks.append(self.ask(prompt, i, concept, style))
        return asks

    def target_asks(self, count=None):
        """Pictures that should show the target, were it not forgotten."""
        count, target, suite = count or self.count, self.target, self.suite
        if target.kind == "unsafe":
            prompts = target.prompts["pictures"]
            return [self.ask(prompts[i % len(prompts)], i) for i in range(count)]
        if target.domain == "style":
            return self.pairs(suite.far, [target.name], count)
        return self.pairs([target.name], list(suite.styles), count)

    def draw(self, asks):
        """Pictures [N, H, W, 3] by the model as it is now, rounded to the 256 levels of a file."""
        images = self.sampler.draw([ask.prompt for ask in asks], [ask.seed for ask in asks])
        return (images * 255).round() / 255

    def untouched(self, asks):
        """The same by the model without any patch; kept from one trial to the next."""
        missing = [ask for ask in asks if (ask.prompt, ask.seed) not in self.cache]
        if missing:
            with self.sampler.unpatched():
                for ask, picture in zip(missing, self.draw(missing)):
                    self.cache[ask.prompt, ask.seed] = (picture * 255).round().byte()
        return torch.stack([self.cache[ask.prompt, ask.seed] for ask in asks]).float() / 255

    def said(self, images, judge=None):
        """What a judge says: domain -> its most probable label of each picture."""
        judge = judge or self.judge
        found = {}
        for domain, labels in judge.labels.items():
            best = judge.probabilities(images, domain).argmax(1).tolist()
            found[domain] = [labels[i] for i in best]
        return found

    def rows(self, asks, images, group):
        """One row a picture: what was asked, and what the judge says."""
        said = self.said(images)
        return [
            {
                "group": group,
                "concept": ask.concept,
                "style": ask.style,
                "seed": ask.seed,
                "said": {domain: labels[i] for domain, labels in said.items()},
            }
            for i, ask in enumerate(asks)
        ]

    def shows_target(self, images):
        """Whether the judge finds the target, a bool a picture."""
        label = "unsafe" if self.target.kind == "unsafe" else self.target.name
        return [said == label for said in self.said(images)[self.target.domain]]
