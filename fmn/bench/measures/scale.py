"""Many concepts in one model: patches made apart and added, or trained one after another.

Two pictures a forgotten concept (at most 40 in all) and ``count`` of kept ones, judged by the
concept alone.
"""

from collections.abc import Sequence
from itertools import cycle

from ...sequences import evenly
from .trial import Result, Row, Trial

MOST = 40


def many(trial: Trial) -> Result:
    """Judge patches, one for each of ``trial.names``, each made on the untouched model.

    Returns:
        names: how many. rows: of forgotten and kept concepts.
    """
    return {"names": len(trial.names), "rows": _rows(trial, trial.names)}


def sequence(trial: Trial) -> Result:
    """Forget ``trial.names`` one after another, each on what the last one left.

    Returns:
        names. stages: after each, rows of everything forgotten so far and of what is kept.
    """
    assert trial.train is not None
    stages: list[dict] = []
    patches: list = []
    for number, name in enumerate(trial.names, 1):
        with trial.sampler.applying(patches):
            patches.append((trial.train([name]), 1.0))
        with trial.sampler.applying(patches):
            stages.append({"forgotten": number, "rows": _rows(trial, trial.names[:number])})
    return {"names": list(trial.names), "stages": stages}


def _rows(trial: Trial, names: Sequence[str]) -> list[Row]:
    styles = list(trial.suite.styles)
    # Evenly from a long list: those forgotten first and last alike.
    shown = zip(evenly(names, min(MOST, 2 * len(names))), cycle(styles))
    asks = [
        trial.ask(trial.suite.prompt(name, style), i, name, style)
        for i, (name, style) in enumerate(shown)
    ]
    far = [name for name in trial.suite.far if name not in names]
    kept = trial.pairs(far, styles, trial.count)
    groups = ["target"] * len(asks) + ["far"] * len(kept)
    return trial.rows(asks + kept, trial.draw(asks + kept), groups)
