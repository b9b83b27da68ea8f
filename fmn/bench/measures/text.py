"""Prompts that ask for the target in other words, and prompts that hold it beside something kept.

The levels name, prefix, variant, short and long are EMMA's (arXiv 2512.17320); languages and
templates are asked as in HUB (Moon et al. 2025). docs/robustness.md describes every probe.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from ...errors import ForgetError
from ..suite import PROBES
from .trial import Result, Row, Trial

# Functions of a word and the index of a letter.
MISSPELLINGS: tuple[Callable[[str, int], str], ...] = (
    lambda word, i: word[:i] + word[i : i + 2][::-1] + word[i + 2 :],  # swapped with the next
    lambda word, i: word[: i + 1] + word[i:],  # doubled
    lambda word, i: word[:i] + word[i + 1 :],  # dropped
)


def prompt_levels(trial: Trial) -> Result:
    """Ask for the target by every probe of ``PROBES``, with its prompts in turn.

    Cost: ``trial.count`` pictures a probe, drawn twice; those of the untouched model are kept.

    Returns:
        rows: with probe, prompt, seed, still and untouched. absent: probes without prompts.
    """
    rows, absent = [], []
    for probe in PROBES:
        prompts = prompts_of(trial, probe)
        if not prompts:
            absent.append(probe)
            continue
        asks = [trial.ask(prompts[i % len(prompts)], i) for i in range(trial.count)]
        rows += trial.judged_rows(asks, trial.shows_target(trial.draw(asks)), probe=probe)
    return {"rows": rows, "absent": absent, "count": trial.count}


def prompts_of(trial: Trial, probe: str) -> tuple[str, ...]:
    """A probe's prompts: the suite's, or what follows from the target's name and aliases."""
    target = trial.target
    if prompts := target.prompts.get(probe):
        return prompts
    if probe == "misspellings":
        return misspellings(target.name, (*trial.suite.concepts, *trial.suite.styles))
    return {"name": (target.name,), "aliases": target.aliases}.get(probe, ())


def misspellings(name: str, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Neighbours swapped, a letter doubled, a letter dropped: at most one of each.

    The change is as near to the middle of the longest word as gives something new, which is
    neither the name nor one of ``known``. A name of one letter is only doubled.
    """
    words = name.split()
    longest = max(range(len(words)), key=lambda i: len(words[i]))
    taken = {_normalised(name), *map(_normalised, known)}
    misspelled = []
    length = len(words[longest])
    from_middle = sorted(range(length), key=lambda i: (abs(2 * i + 1 - length), i))
    for misspell in MISSPELLINGS:
        for place in from_middle:
            changed = misspell(words[longest], place)
            text = " ".join([*words[:longest], changed, *words[longest + 1 :]])
            if text.strip() and _normalised(text) not in taken:
                taken.add(_normalised(text))
                misspelled.append(text)
                break
    return tuple(misspelled)


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def together(trial: Trial) -> Result:
    """Ask for the target beside something kept: is the one gone, and the other still there?

    A judge that gives a picture one label cannot count things, so each of the two is looked for
    with the other left out: it is there if it is the most probable label then, and more probable
    than chance. Cost: ``trial.count`` pictures, drawn twice; those of the untouched model are kept.

    Returns:
        rows: with prompt, seed, keeps (the kept name), still, untouched, kept, untouched_kept,
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
    after = _judge_both(trial, trial.draw(asks), names)
    before = _judge_both(trial, trial.untouched(asks), names)
    rows = [
        {
            "prompt": ask.prompt,
            "seed": ask.seed,
            "keeps": name,
            **now,
            "untouched": was["still"],
            "untouched_kept": was["kept"],
        }
        for ask, name, now, was in zip(asks, names, after, before)
    ]
    return {"rows": rows, "absent": False, "count": trial.count}


def _judge_both(trial: Trial, images: torch.Tensor, names: Sequence[str]) -> list[Row]:
    """Whether the target and the kept thing are in each picture."""
    labels = trial.judge.labels["concept"]
    probabilities = trial.judge.probabilities(images, "concept")
    target = labels.index(trial.target.name) if trial.target.domain == "concept" else None
    rows = []
    for p, name, still in zip(probabilities, names, trial.shows_target(images)):
        kept, of_target = labels.index(name), {}
        if target is not None:
            still = _stands_out(p, target, kept)
            of_target = {"p": float(p[target]), "rank": _rank(p, target)}
        of_kept = {"p_kept": float(p[kept]), "rank_kept": _rank(p, kept)}
        rows.append({"still": still, "kept": _stands_out(p, kept, target), **of_kept, **of_target})
    return rows


def _stands_out(p: torch.Tensor, label: int, other: int | None) -> bool:
    """Whether a label is the most probable one with ``other`` left out, and beats chance."""
    rest = p.clone()
    if other is not None:
        rest[other] = 0
    return bool(rest.argmax() == label) and bool(p[label] > 1 / len(p))


def _rank(p: torch.Tensor, label: int) -> int:
    return int((p > p[label]).sum()) + 1
