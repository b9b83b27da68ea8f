"""Prompts that ask for the target in other words, and prompts that hold it beside something kept.

The rungs name, prefix, variant, short and long are EMMA's (arXiv 2512.17320); languages and
templates are asked as in HUB (Moon et al. 2025). docs/robustness.md describes every probe.
"""

from ...errors import ForgetError
from ..suite import PROBES


def rungs(trial):
    """Ask for the target by every probe of ``PROBES``; prompts go around, one seed a picture.

    Cost: ``trial.count`` pictures a probe, drawn twice; those of the untouched model are kept.

    Returns:
        ``rows`` with probe, prompt, seed, still and untouched; ``absent``: probes without prompts.
    """
    rows, absent = [], []
    for probe in PROBES:
        prompts = prompts_of(trial, probe)
        if not prompts:
            absent.append(probe)
            continue
        asks = [trial.ask(prompts[i % len(prompts)], i) for i in range(trial.count)]
        still = trial.shows_target(trial.draw(asks))
        rows += judged_rows(trial, asks, still, probe=probe)
    return {"rows": rows, "absent": absent, "count": trial.count}


def judged_rows(trial, asks, still, **more):
    """One row a picture, with whether the untouched model shows the target for the same ask."""
    known = trial.shows_target(trial.untouched(asks))
    return [
        {**more, "prompt": ask.prompt, "seed": ask.seed, "still": bool(found), "untouched": shown}
        for ask, found, shown in zip(asks, still, known)
    ]


def prompts_of(trial, probe):
    """A probe's prompts: the suite's, or what follows from the target's name and aliases."""
    target = trial.target
    given = target.prompts.get(probe)
    if given:
        return given
    if probe == "misspellings":
        return misspellings(target.name, (*trial.suite.concepts, *trial.suite.styles))
    return {"name": (target.name,), "aliases": target.aliases}.get(probe, ())


def misspellings(name, known=()):
    """Neighbours swapped, a letter doubled, a letter dropped: at most one of each.

    The change is as near to the middle of the longest word as gives something new, which is
    neither the name nor one of ``known``. A name of one letter is only doubled.
    """
    words = name.split()
    at = max(range(len(words)), key=lambda i: len(words[i]))
    taken = {_plain(name), *map(_plain, known)}
    made = []
    for change in (_swapped, _doubled, _dropped):
        for place in _from_middle(len(words[at])):
            text = " ".join([*words[:at], change(words[at], place), *words[at + 1 :]])
            if text.strip() and _plain(text) not in taken:
                taken.add(_plain(text))
                made.append(text)
                break
    return tuple(made)


def _plain(text):
    return " ".join(text.lower().split())


def _from_middle(length):
    return sorted(range(length), key=lambda i: (abs(2 * i + 1 - length), i))


def _swapped(word, i):
    return word[:i] + word[i : i + 2][::-1] + word[i + 2 :]


def _doubled(word, i):
    return word[: i + 1] + word[i:]


def _dropped(word, i):
    return word[:i] + word[i + 1 :]


def together(trial):
    """Ask for the target beside something kept: is the one gone, and the other still there?

    A judge that gives one label a picture cannot count things, so each of the two is looked for
    with the other left out: found is what is then the most probable label, and more probable than
    chance. Cost: ``trial.count`` pictures, drawn twice; those of the untouched model are kept.

    Returns:
        ``rows`` with prompt, seed, keeps (the kept name), still, untouched, kept, untouched_kept,
        and the probability and rank of both; empty, and ``absent`` true, without such prompts.

    Raises:
        ForgetError: the judge does not know the kept name.
    """
    pairs = trial.target.together
    if not pairs:
        return {"rows": [], "absent": True}
    unknown = [name for _, name in pairs if name not in trial.judge.labels["concept"]]
    if unknown:
        raise ForgetError(
            f"The judge '{trial.judge.name}' has no label '{unknown[0]}', which a prompt of "
            f"'{trial.target.name}' keeps: use another judge or another prompt."
        )
    chosen = [pairs[i % len(pairs)] for i in range(trial.count)]
    asks = [trial.ask(prompt, i) for i, (prompt, _) in enumerate(chosen)]
    names = [name for _, name in chosen]
    now = _both(trial, trial.draw(asks), names)
    before = _both(trial, trial.untouched(asks), names)
    rows = [
        {
            "prompt": ask.prompt,
            "seed": ask.seed,
            "keeps": name,
            **after,
            "untouched": old["still"],
            "untouched_kept": old["kept"],
        }
        for ask, name, after, old in zip(asks, names, now, before)
    ]
    return {"rows": rows, "absent": False, "count": trial.count}


def _both(trial, images, names):
    """What of the target and of the kept thing is in each picture."""
    labels = trial.judge.labels["concept"]
    probabilities = trial.judge.probabilities(images, "concept")
    rows = []
    shown = trial.shows_target(images)
    for p, name, found in zip(probabilities, names, shown):
        kept = labels.index(name)
        if trial.target.domain == "concept":
            target = labels.index(trial.target.name)
            found = _stands_out(p, target, kept)
            sizes = {"p": float(p[target]), "rank": _rank(p, target)}
        else:
            target, sizes = None, {}
        rows.append(
            {
                "still": found,
                "kept": _stands_out(p, kept, target),
                "p_kept": float(p[kept]),
                "rank_kept": _rank(p, kept),
                **sizes,
            }
        )
    return rows


def _stands_out(p, label, other):
    """Whether a label is the most probable one with ``other`` left out, and beats chance."""
    rest = p.clone()
    if other is not None:
        rest[other] = 0
    return bool(rest.argmax() == label) and bool(p[label] > 1 / len(p))


def _rank(p, label):
    return int((p > p[label]).sum()) + 1
