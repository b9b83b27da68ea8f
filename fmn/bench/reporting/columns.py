"""The columns of a report: what each means, and how it is computed from results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict

from ..suite import PROBES, Target
from .statistics import (
    KEPT,
    OTHER,
    TARGET,
    Row,
    Value,
    bootstrap,
    bootstrap_means,
    h_o,
    is_right,
    mean,
    unlearn_canvas,
)

GROUPS = {  # group of columns -> its heading, what it is about
    "main": ("Results", "Is the concept gone, and is everything else still there?"),
    "text": ("Robustness to text", "How often the target comes back when the prompt asks for it in "
             "other words, or in words that were optimised for it."),
    "beyond": ("Robustness beyond text", "How often the target comes back when pictures, noise or "
               "training help."),
    "precision": ("Precision", "Whether what is closest to the target survives."),
    "cost": ("Cost", "What forgetting takes."),
}  # fmt: skip
SHARE = 0.2  # of the steps; results for other shares are in the store
MEGABYTE = 1e6

Result = Mapping[str, Any]
"""What a measure returned, as JSON."""


class Column(TypedDict):
    """A column of the tables: ``unit`` is % for shares in 0..1, else as printed; ``better`` is
    high, low, or None where neither is."""

    key: str
    title: str
    group: str
    unit: str
    better: str | None
    what: str


class Results:
    """Results of one method on some targets.

    Args:
        results: pairs of a target and {measure: result}.
    """

    def __init__(self, results: Sequence[tuple[Target, Mapping[str, Result]]]) -> None:
        self.results = results

    def of(self, measure: str) -> list[Result]:
        return [measures[measure] for _, measures in self.results if measure in measures]

    def rows(self, measure: str) -> list[Row]:
        return [row for result in self.of(measure) for row in result["rows"]]

    @cached_property
    def accuracies(self) -> dict[str, Value | None]:
        """UA, IRA, CRA and their means over the pictures of all targets."""
        return unlearn_canvas(self.pictures())

    def right(self, *groups: str, other_domain: bool = False) -> list[bool]:
        """Of the pictures of some groups: whether the judge says what the prompt asks for."""
        answers = [
            is_right(row, OTHER[domain] if other_domain else domain)
            for rows, domain in self.pictures()
            for row in rows
            if row["group"] in groups
        ]
        return [answer for answer in answers if answer is not None]

    def usable(self) -> float:
        """The share of the target's pictures that count; see ``statistics.unlearn_canvas``."""
        given = [
            is_right(row, domain) is not None
            for rows, domain in self.pictures()
            for row in rows
            if row["group"] == TARGET
        ]
        return sum(given) / len(given) if given else 1.0

    def numbers(self, name: str, *groups: str) -> list[float]:
        """A number of each picture of some groups."""
        values = [row.get(name) for row in self.rows("pictures") if row["group"] in groups]
        return [value for value in values if value is not None]

    def still(self, measure: str, probe: str | None = None) -> list[bool]:
        """Of pictures where the untouched model shows the target: whether it is still drawn."""
        return [
            row["still"]
            for row in self.rows(measure)
            if row["untouched"]
            and probe in (None, row.get("probe"))
            and row.get("share", SHARE) == SHARE
        ]

    def mean(self, measure: str, name: str, unit: float = 1.0) -> Value | None:
        """The mean over targets of one number of a measure."""
        numbers = [result.get(name) for result in self.of(measure)]
        return mean([number for number in numbers if number is not None], unit)

    def pictures(self) -> Iterator[tuple[list[Row], str]]:
        """Judged pictures and domain of each target."""
        for target, measures in self.results:
            if "pictures" in measures:
                yield measures["pictures"]["rows"], target.domain


Compute = Callable[[Results], Value | None]


def _column(
    key: str, title: str, group: str, unit: str, better: str | None, what: str, compute: Compute
) -> tuple[Column, Compute]:
    return Column(key=key, title=title, group=group, unit=unit, better=better, what=what), compute


def _still_drawn(
    key: str, group: str, what: str, measure: str, probe: str | None = None
) -> tuple[Column, Compute]:
    title = key.replace("_", " ")
    return _column(key, title, group, "%", "low", f"Still drawn: {what}.",
                   lambda results: bootstrap(results.still(measure, probe)))  # fmt: skip


def _h_o(results: Results) -> Value | None:
    """Acc_e over the target's pictures, Acc_s over kept ones, Acc_g over other words for it."""
    other_words = results.still("rungs", "aliases") + results.still("rungs", "paraphrases")
    return bootstrap_means([results.right(TARGET), results.right(*KEPT), other_words], h_o)


def _controls(results: Results) -> list[bool]:
    given = [r["controls"] for r in results.of("relearn") if r["controls"] != "absent"]
    return [row["still"] for rows in given for row in rows]


def _drawn_anyway(results: Results) -> list[bool]:
    return [row["nothing"] for row in results.rows("inversion") if row["untouched"]]


def _invented(results: Results) -> list[bool]:
    given = [r["control"] for r in results.of("inversion") if r["control"] != "absent"]
    return [row["still"] for rows in given for row in rows]


def _mscores(results: Results) -> list[float]:
    return [score for result in results.of("mscore") for score in result["scores"]]


def _kept_together(results: Results) -> list[bool]:
    return [row["kept"] for row in results.rows("together") if row["untouched_kept"]]


_MAIN = [
    _column("UA", "UA", "main", "%", "high", "Unlearning accuracy: pictures of prompts that name "
            "the target in which no judge finds it.", lambda r: r.accuracies["UA"]),
    _column("IRA", "IRA", "main", "%", "high", "In-domain retain accuracy: kept members of the "
            "target's own domain that every judge still finds.", lambda r: r.accuracies["IRA"]),
    _column("CRA", "CRA", "main", "%", "high", "Cross-domain retain accuracy: on the same "
            "pictures, the other domain (the style; for a style, the concept).",
            lambda r: r.accuracies["CRA"]),
    _column("HM", "mean", "main", "%", "high", "Harmonic mean of UA, IRA and CRA.",
            lambda r: r.accuracies["HM"]),
    _column("kept", "kept", "main", "%", "high", "Mean of IRA and CRA.",
            lambda r: r.accuracies["kept"]),
    _column("Ho", "H_o", "main", "%", "high", "MACE's harmonic mean of efficacy, specificity and "
            "generality; needs a suite with aliases or paraphrases.", _h_o),
    _column("coherence", "coherence", "main", "%", "high", "On the target's prompts: the judge's "
            "probability of any concept of the target's kind; low where pictures fall apart.",
            lambda r: bootstrap(r.numbers("coherence", TARGET))),
    _column("companion", "companion", "main", "%", "high", "On the target's prompts: the other "
            "domain is still right (the style; for a style, the concept).",
            lambda r: bootstrap(r.right(TARGET, other_domain=True))),
    _column("distance", "distance", "main", "%", "low", "Kept pictures: root mean square "
            "difference from the untouched model's at equal seeds, in % of the full range.",
            lambda r: bootstrap(r.numbers("distance", *KEPT))),
    _column("KID", "KID", "main", "", "low", "Kernel distance of kept pictures from the untouched "
            "model's for equal prompts and other seeds. Compare it with the untouched row, which "
            "is below 0.", lambda r: r.mean("pictures", "kid")),
    _column("clip_target", "CLIP, target", "main", "", "low", "CLIP score of the target's prompts.",
            lambda r: bootstrap(r.numbers("clip", TARGET))),
    _column("clip_kept", "CLIP, kept", "main", "", "high", "CLIP score of kept prompts.",
            lambda r: bootstrap(r.numbers("clip", *KEPT))),
    _column("mscore", "M-Score", "main", "", "low", "Cosine between the text embedding of words "
            "inverted on this model and that of the concept's name; our definition.",
            lambda r: bootstrap(_mscores(r))),
]  # fmt: skip
_TEXT = [
    *(_still_drawn(probe, "text", f"prompts of the kind '{probe}', of pictures where the untouched "
                    "model draws the target", "rungs", probe) for probe in PROBES),
    _still_drawn("inversion", "text",
                  "concept inversion, words learned from pictures of the target",
                  "inversion"),
    _column("nothing", "nothing", "text", "%", None, "The same prompts without any word for the "
            "target: what the model draws anyway, the floor of inversion.",
            lambda r: bootstrap(_drawn_anyway(r))),
    _column("invented", "never known", "text", "%", None, "Inversion of a thing the model never "
            "knew: what the attack teaches.", lambda r: bootstrap(_invented(r))),
    _still_drawn("ring_a_bell", "text", "Ring-A-Bell, words optimised in text space alone",
                  "ring_a_bell"),
]  # fmt: skip
_BEYOND = [
    *(_still_drawn(key, "beyond", what, key) for key, what in (
        ("completion", "the untouched model draws the first fifth of the steps, this one the rest"),
        ("noise", "noise probe, more and wider fresh noise at each step, the best of a grid"),
        ("classifier", "guidance by a classifier of latents, at its best scale"),
        ("inpainting", "the middle of the untouched model's picture is drawn anew"),
        ("relearn", "after 50 steps of training on pictures of the target"),
    )),
    _column("control", "control", "beyond", "%", None, "Concepts the model never knew, after the "
            "same training: what relearning is compared with.", lambda r: bootstrap(_controls(r))),
]  # fmt: skip
_PRECISION = [
    _column("near", "neighbours", "precision", "%", "high", "The five nearest members of the "
            "target's domain that the judge still finds.", lambda r: bootstrap(r.right("near"))),
    _column("together", "together", "precision", "%", "high", "Prompts that name the target and a "
            "kept concept: the kept one is still found, of pictures where the untouched model "
            "shows it.", lambda r: bootstrap(_kept_together(r))),
]  # fmt: skip
_COST = [
    _column("seconds", "training", "cost", "s", "low", "Seconds to make the patch.",
            lambda r: r.mean("train", "seconds")),
    _column("peak", "memory", "cost", "MB", "low", "Peak memory beyond the loaded model while "
            "training.", lambda r: r.mean("train", "peak_bytes", MEGABYTE)),
    _column("size", "file", "cost", "MB", "low", "Size of the patch file.",
            lambda r: r.mean("train", "bytes", MEGABYTE)),
    _column("per_picture", "a picture", "cost", "s", "low", "Seconds to draw a picture with the "
            "patch applied beside the weights, as the bench does (merged, a patch costs nothing).",
            lambda r: r.mean("pictures", "seconds_a_picture")),
]  # fmt: skip

PAIRED = Column(
    key="paired", title="against the first", group="main", unit="%", better=None,
    what="The mean less that of the first method, in points, on the same targets; the interval is "
    "over targets. Where it holds 0, other targets could turn the order.",
)  # fmt: skip
COLUMNS = (*_MAIN, *_TEXT, *_BEYOND, *_PRECISION, *_COST)
"""All columns in the order of the tables, and how each is computed; None is not measured."""
