"""Pictures of the same prompts and seeds before and after forgetting, and what a judge sees."""

import re
from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..images import heat_map, labelled_grid, to_image
from ..metrics.judge import Judge

STRONGEST = 0.5  # change of a pixel, of 1, that is drawn palest
LINE = 34  # letters of a label, which has two lines


class Pair(NamedTuple):
    """One prompt and seed, drawn before and after."""

    prompt: str
    forgotten: bool  # its concept should go; else it should stay
    before: Tensor  # [H, W, 3] in 0..1
    after: Tensor
    seen: tuple[tuple[str, ...], ...] = ()  # by the judge, before and after

    @property
    def change(self) -> float:
        """Mean absolute difference of the pixels, 0..1."""
        return float((self.after - self.before).abs().mean())


def judged(pairs: Sequence[Pair], judge: Judge) -> list[Pair]:
    """The same with the likeliest label of each of the judge's domains that the prompt names."""

    def labels(pair: Pair, image: Tensor) -> tuple[str, ...]:
        domains = [d for d in judge.labels if any(names(pair.prompt, x) for x in judge.labels[d])]
        found = (judge.probabilities(image[None], domain).argmax(1) for domain in domains)
        return tuple(judge.labels[domain][int(best)] for domain, best in zip(domains, found))

    return [
        pair._replace(seen=(labels(pair, pair.before), labels(pair, pair.after))) for pair in pairs
    ]


def names(prompt: str, words: str) -> bool:
    """Whether a prompt has these words in it."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, re.IGNORECASE) is not None


def grid(pairs: Sequence[Pair], side: int = 192) -> Image.Image:
    """A row for each pair: before, after, and where they differ."""
    rows = []
    for pair in pairs:
        title = f"{'forget' if pair.forgotten else 'keep'}: {pair.prompt}"
        title = fill(title, LINE, max_lines=2, placeholder=" ...")
        if pair.seen and pair.seen[0]:
            before, after = (", ".join(words) for words in pair.seen)
            title += f"\n\nseen: {before}\n-> {after}"
        change = (pair.after - pair.before).abs().mean(-1) / STRONGEST
        pictures = [to_image(pair.before), to_image(pair.after), heat_map(change, side)]
        rows.append((title, pictures))
    return labelled_grid(rows, ["before", "after", "difference"], side)


def report(pairs: Sequence[Pair]) -> str:
    """How much the pictures changed, and how many show what their prompts name."""
    lines = []
    for forgotten, title in ((True, "forgotten"), (False, "kept")):
        some = [pair for pair in pairs if pair.forgotten == forgotten]
        if not some:
            continue
        change = 100 * sum(pair.change for pair in some) / len(some)
        line = f"{title}: pixels changed by {change:.0f} % on average"
        seen = [pair for pair in some if pair.seen and pair.seen[0]]
        if seen:
            before, after = (sum(_shows(pair, when) for pair in seen) for when in (0, 1))
            line += (
                f"; the judge sees what they name in {before} of {len(seen)} before, {after} after"
            )
        lines.append(line)
    return "\n".join(lines)


def _shows(pair: Pair, when: int) -> bool:
    """Whether what the judge saw is what the prompt names."""
    return all(names(pair.prompt, label) for label in pair.seen[when])
