"""Many concepts in one model: patches made apart and added, or trained one after another.

Two pictures a forgotten concept (at most 40 in all) and ``count`` of kept ones, judged by the
concept alone.
"""

MOST = 40


def many(trial):
    """The sampler wears one patch a name in ``trial.names``, each made on the untouched model.

    Returns:
        names: how many; erased, kept: rows of judged pictures.
    """
    return {"names": len(trial.names), **_judged(trial, trial.names)}


def sequence(trial):
    """Forget ``trial.names`` one after another, each on what the last one left.

    Returns:
        names; stages: after each, rows of everything forgotten so far and of what is kept.
    """
    stages, worn = [], []
    for number, name in enumerate(trial.names, 1):
        with trial.sampler.applying(worn):
            worn.append((trial.train([name]), 1.0))
        with trial.sampler.applying(worn):
            stages.append({"forgotten": number, **_judged(trial, trial.names[:number])})
    return {"names": list(trial.names), "stages": stages}


def _judged(trial, names):
    styles = list(trial.suite.styles)
    count = min(MOST, 2 * len(names))
    # Evenly from a long list: those forgotten first and last alike.
    shown = [(names[i * len(names) // count], styles[i % len(styles)]) for i in range(count)]
    asks = [
        trial.ask(trial.suite.prompt(name, style), i, name, style)
        for i, (name, style) in enumerate(shown)
    ]
    far = [name for name in trial.suite.far if name not in names]
    kept = trial.pairs(far, styles, trial.count)
    rows = trial.rows(asks + kept, trial.draw(asks + kept), None)
    for row, group in zip(rows, ["target"] * len(asks) + ["far"] * len(kept)):
        row["group"] = group
    return {"rows": rows}
