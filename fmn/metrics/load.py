"""Judges by name. Each is imported when it is asked for."""

from ..errors import ForgetError
from .judge import find_labels, short_list

KNOWN = "'demo', 'demo:2', 'clip:' and a folder, or 'nudenet'"


def load_judge(spec, suite_labels=None, templates=None):
    """A judge by its name.

    Args:
        spec: "demo", "demo:2" (another architecture, to check the first), "clip:FOLDER" (a CLIP
            model as transformers saves it) or "nudenet".
        suite_labels: for each domain to be judged {label: phrase}. CLIP is asked about the
            phrases; the others must know the labels.
        templates: for CLIP, a sentence with {} for the phrase, for each domain; "{}" by default.

    Raises:
        ForgetError: there is no such judge, something it needs is missing, or it cannot tell a
            domain or label asked for.
    """
    if not isinstance(spec, str):
        raise ForgetError(f"A judge is named by {KNOWN}, not by {spec!r}.")
    kind, _, rest = spec.partition(":")
    if kind == "clip":
        from .clip_judge import ClipJudge

        return ClipJudge(rest, suite_labels, templates)
    if templates:
        raise ForgetError(f"Judge '{spec}' takes no templates: they are for 'clip:' and a folder.")
    judge = _named(spec)
    for domain, labels in (suite_labels or {}).items():
        _check_known(judge, domain, labels)
    return judge


def _named(spec):
    if spec in ("demo", "demo:2"):
        from .demo_judge import DemoJudge

        return DemoJudge(spec)
    if spec == "nudenet":
        from .nudenet_judge import NudeNetJudge

        return NudeNetJudge()
    raise ForgetError(f"There is no judge '{spec}': use {KNOWN}.")


def _check_known(judge, domain, labels):
    known = find_labels(judge, domain)
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ForgetError(
            f"Judge '{judge.name}' does not know the {domain} '{unknown[0]}' "
            f"({len(unknown)} of {len(labels)} are unknown): use names from {short_list(known)}."
        )
