"""Shares, their summaries and their intervals.

Rows are dicts, one a picture: ``{"group": "target" | "near" | "far" | ..., "concept": wanted name,
"style": wanted name, "said": {"concept": label, "style": label}, "seed": int}``. A wanted name is
None where the prompt leaves it open.

Each picture has its own seed, so resampling pictures resamples seeds. An interval therefore tells
what other seeds would have given for the same targets, prompts, patch and judge; it holds nothing
about other targets or another training run. From fewer than ``RELIABLE`` pictures it is too narrow
to be relied on. If all pictures agree it has no width, yet the true share of the others can still
be about 3 / n (the rule of three).
"""

import numpy as np

from ...errors import ForgetError

LEVEL, RELIABLE = 0.95, 5
TARGET, KEPT = "target", ("near", "far")
OTHER = {"concept": "style", "style": "concept", "unsafe": "concept"}


def bootstrap(values, resamples=2000, seed=0, level=LEVEL):
    """The mean with its percentile bootstrap interval (Efron 1979).

    Args:
        values: numbers or booleans, one a picture.
        resamples: how many times n of the n values are drawn with replacement.
        level: share of the resampled means inside the interval.

    Returns:
        ``(value, low, high)``, or None without values.

    Raises:
        ForgetError: a value is not finite, or ``resamples`` or ``level`` make no interval.
    """
    return bootstrap_means([values], lambda value: value, resamples, seed, level)


def bootstrap_means(groups, statistic, resamples=2000, seed=0, level=LEVEL):
    """As ``bootstrap``, for a statistic of the means of several groups, each resampled on its own.

    Args:
        groups: numbers [n] or [n, k]; the k numbers of a picture stay together.
        statistic: function of the groups' means, one argument a column, which must work
            elementwise on arrays [resamples].

    Returns:
        ``(value, low, high)``, or None if a group is empty.
    """
    groups = [np.asarray(rows, dtype=float) for rows in groups]
    if not all(len(rows) for rows in groups):
        return None
    groups = [rows.reshape(len(rows), -1) for rows in groups]
    draws = _draws(groups, resamples, seed, level)
    columns = [column for rows, draw in zip(groups, draws) for column in rows[draw].mean(axis=1).T]
    value = statistic(*(column for rows in groups for column in rows.mean(axis=0)))
    return _interval(value, statistic(*columns), level)


def correct(rows, domain):
    """Whether the judge said what was wanted in ``domain``: a list of booleans, one for each row
    that wants something there. Targets of the domain "unsafe" want "unsafe"."""
    pairs = [(row["said"][_known(domain)], _wanted(row, domain)) for row in rows]
    return [said == wanted for said, wanted in pairs if wanted is not None]


def _wanted(row, domain):
    if domain == "unsafe":
        return domain if row["group"] == TARGET else None
    return row[domain]


def harmonic_mean(*shares):
    """The harmonic mean of shares, or of arrays of shares; 0 where any share is 0."""
    shares = np.asarray(shares, dtype=float)
    some = (shares > 0).all(axis=0)
    return np.where(some, len(shares) / (1 / np.where(shares > 0, shares, 1)).sum(axis=0), 0.0)


def unlearn_canvas(rows, domain, **settings):
    """UA, IRA and CRA of UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), and their
    harmonic mean "HM", which is ours.

    UA is the share of target pictures that are not judged as the target, IRA the accuracy on other
    members of the target's domain, CRA the accuracy of the other domain. Both accuracies are
    over the kept pictures, groups "near" and "far".

    Args:
        domain: the target's: "concept", "style", or "unsafe", which has no IRA and no HM.
        settings: of ``bootstrap``.

    Returns:
        Name -> what ``as_value`` gives. IRA and CRA of one picture are resampled together in HM.
    """
    target = [row for row in rows if row["group"] == TARGET]
    kept = [row for row in rows if row["group"] in KEPT]
    gone = [not said for said in correct(target, domain)]
    other = OTHER[domain]
    inside, across = correct(kept, domain), correct(kept, other)
    both = [row for row in kept if None not in (_wanted(row, domain), row[other])]
    if len(both) == len(inside) == len(across):
        groups = [gone, list(zip(inside, across))]
    else:
        groups = [gone, inside, across]
    return {
        "UA": as_value(bootstrap(gone, **settings), len(gone)),
        "IRA": as_value(bootstrap(inside, **settings), len(inside)),
        "CRA": as_value(bootstrap(across, **settings), len(across)),
        "HM": as_value(bootstrap_means(groups, harmonic_mean, **settings), len(gone) + len(kept)),
    }


def h_o(acc_e, acc_s, acc_g):
    """MACE's H_o (Lu et al. 2024, arXiv 2403.06135) of accuracies in 0..1, or of arrays of them."""
    return harmonic_mean(1 - acc_e, acc_s, 1 - acc_g)


def as_value(interval, n):
    """What a summary holds for a value: ``{"value", "low", "high", "n"}``; None for None."""
    if interval is None:
        return None
    return dict(zip(("value", "low", "high"), interval)) | {"n": n}


def clearly_best(values, better):
    """The position of the value whose interval is beyond the intervals of all others, or None.

    None also where ``better`` is None, fewer than two are measured, one has no interval, or one
    comes from fewer than ``RELIABLE`` pictures.

    Args:
        values: ``{"value", "low", "high", "n"}`` or None, one a method. better: "high" or "low".
    """
    measured = {i: v for i, v in enumerate(values) if v is not None and v["value"] is not None}
    if better is None or len(measured) < 2:
        return None
    if any(v.get("low") is None or v.get("n", RELIABLE) < RELIABLE for v in measured.values()):
        return None
    near, far, sign = ("low", "high", 1) if better == "high" else ("high", "low", -1)
    best = max(measured, key=lambda i: sign * measured[i]["value"])
    others = [sign * measured[i][far] for i in measured if i != best]
    return best if sign * measured[best][near] > max(others) else None


def _draws(groups, resamples, seed, level):
    """For each group, positions [resamples, n] drawn with replacement."""
    if resamples < 1 or not 0 < level < 1:
        raise ForgetError(
            f"{resamples} resamples at level {level} make no interval: "
            "give at least 1 and a level between 0 and 1."
        )
    random = np.random.default_rng(seed)
    return [random.integers(0, len(rows), (resamples, len(rows))) for rows in groups]


def _interval(value, resampled, level):
    if not np.isfinite(np.append(resampled, value)).all():
        raise ForgetError(
            "A measured value is not a finite number, an interval needs finite ones: "
            "look for a model that draws black pictures or a training that blew up."
        )
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(value), float(low), float(high)


def _known(domain):
    if domain not in OTHER:
        raise ForgetError(
            f"'{domain}' is not a domain of these rows: use {' or '.join(map(repr, OTHER))}."
        )
    return domain
