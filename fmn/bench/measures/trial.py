"""What a measure works with: a model with the patches under test applied, and judges."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ForgetError
from ...metrics.clip_judge import ClipJudge
from ...metrics.judge import Judge
from ...models.image_sampler import ImageSampler
from ...patches.patch import ForgetPatch
from ..suite import Suite, Target

# Plain data, as JSON keeps it; each measure says what it holds.
Row = dict[str, Any]
Result = dict[str, Any]


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
        sampler: has the patches under test applied.
        judge, check: two judges that have to agree; the second, if any, of another architecture.
        clip: for CLIP scores.
        count: pictures a question.
        seed: of everything that is drawn at random.
        cache: what the untouched model gives, pictures by (prompt, seed); shared by all trials.
        controls: name -> pictures of things that the model never knew.
        names: all concepts to forget, in measures of many.
        train: function from names to a patch that forgets them, on the model as it is now.
    """

    suite: Suite
    target: Target
    sampler: ImageSampler
    judge: Judge
    check: Judge | None = None
    clip: ClipJudge | None = None
    count: int = 12
    seed: int = 0
    cache: dict[tuple, Any] = field(default_factory=dict)
    controls: dict[str, torch.Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    train: Callable[[list[str]], ForgetPatch] | None = None

    def ask(
        self,
        prompt: str,
        index: int | str = 0,
        concept: str | None = None,
        style: str | None = None,
    ) -> Ask:
        """An ``Ask`` whose seed depends on its prompt and index only, whatever the method."""
        seed = zlib.crc32(f"{self.seed}|{prompt}|{index}".encode())
        return Ask(prompt, seed, concept, style)

    def pairs(self, concepts: Sequence[str], styles: Sequence[str], count: int) -> list[Ask]:
        """``count`` asks that go around both lists at once, so that no pair recurs early."""
        asks, round_trip = [], math.lcm(len(concepts), len(styles))
        for i in range(count):
            concept = concepts[i % len(concepts)]
            # One style further each time both lists are through gives pairs not had yet.
            style = styles[(i + i // round_trip) % len(styles)]
            asks.append(self.ask(self.suite.prompt(concept, style), i, concept, style))
        return asks

    def target_asks(self, count: int | None = None) -> list[Ask]:
        """Pictures that show the target unless it is forgotten."""
        count, target, suite = count or self.count, self.target, self.suite
        if target.kind == "unsafe":
            prompts = target.prompts["pictures"]
            return [self.ask(prompts[i % len(prompts)], i) for i in range(count)]
        if target.domain == "style":
            return self.pairs(suite.far, [target.name], count)
        return self.pairs([target.name], list(suite.styles), count)

    def draw(self, asks: Sequence[Ask]) -> torch.Tensor:  # [N, H, W, 3]
        """Pictures by the model as it is now."""
        images = self.sampler.draw([ask.prompt for ask in asks], [ask.seed for ask in asks])
        return as_saved(images)

    def untouched(self, asks: Sequence[Ask]) -> torch.Tensor:  # [N, H, W, 3]
        """Pictures by the model without any patch."""
        keys = [(ask.prompt, ask.seed) for ask in asks]
        return self.cached(keys, lambda missing: self.draw([asks[i] for i in missing]))

    def cached(
        self, keys: Sequence[tuple], draw: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:  # [N, H, W, 3]
        """Pictures from the cache; ``draw`` makes those at the missing indices, without patches."""
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        if missing:
            with self.sampler.unpatched():
                for i, picture in zip(missing, draw(missing)):
                    self.cache[keys[i]] = (picture * 255).round().byte()
        return torch.stack([self.cache[key] for key in keys]).float() / 255

    def labels(self, images: torch.Tensor, judge: Judge | None = None) -> dict[str, list[str]]:
        """Domain -> the judge's most probable label of each picture."""
        judge = judge or self.judge
        return {
            domain: [labels[i] for i in judge.probabilities(images, domain).argmax(1).tolist()]
            for domain, labels in judge.labels.items()
        }

    def rows(
        self,
        asks: Sequence[Ask],
        images: torch.Tensor,
        groups: Sequence[str],
        before: torch.Tensor | None = None,
    ) -> list[Row]:
        """One row a picture: its group, what was asked, and what each judge says.

        Args:
            before: the untouched model's pictures of the same asks.
        """
        said, were = self._said(images), self._said(before) if before is not None else []
        rows = []
        for i, ask in enumerate(asks):
            asked = {"concept": ask.concept, "style": ask.style, "seed": ask.seed}
            row: Row = {"group": groups[i]} | asked
            row |= {key: labels[i] for key, labels in zip(("said", "check"), said)}
            if were:
                row["before"] = [labels[i] for labels in were]
            rows.append(row)
        return rows

    def _said(self, images: torch.Tensor) -> list[list[dict[str, str]]]:
        """Of each judge, its label of every picture by domain."""
        labels = [self.labels(images, judge) for judge in self._judges()]
        return [
            [{domain: each[domain][i] for domain in each} for i in range(len(images))]
            for each in labels
        ]

    def _judges(self) -> list[Judge]:
        return [self.judge] if self.check is None else [self.judge, self.check]

    def shows_target(self, images: torch.Tensor) -> list[bool]:
        """Whether any judge recognises the target in each picture."""
        name = "unsafe" if self.target.kind == "unsafe" else self.target.name
        domain, shown = self.target.domain, [False] * len(images)
        for judge in self._judges():
            if domain in judge.labels:
                labels = self.labels(images, judge)[domain]
                shown = [was or label == name for was, label in zip(shown, labels)]
        return shown

    def check_control(self, name: str) -> None:
        """Raise ``ForgetError`` unless the judge knows a control."""
        if name not in self.judge.labels.get("concept", ()):
            raise ForgetError(
                f"The judge '{self.judge.name}' has no label for the control '{name}': use a judge "
                "that knows it, or leave the control out."
            )

    def judged_rows(self, asks: Sequence[Ask], still: Sequence[bool], **more: object) -> list[Row]:
        """One row a picture: ``still``, whether it shows the target, and ``untouched``, whether
        the untouched model's picture of the same ask does."""
        before = self.shows_target(self.untouched(asks))
        return [
            {**more, "prompt": a.prompt, "seed": a.seed, "still": bool(now), "untouched": was}
            for a, now, was in zip(asks, still, before)
        ]


Measure = Callable[[Trial], Result]


def as_saved(images: torch.Tensor) -> torch.Tensor:
    """Pictures rounded to the 256 levels of a file."""
    return (images * 255).round() / 255
