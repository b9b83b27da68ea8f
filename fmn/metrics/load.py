"""Judges by name. Each is imported when it is asked for."""

from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import ForgetError
from .judge import JoinedJudges, Judge, labels_of

KNOWN = "'demo', 'demo:2', 'clip:' and a folder, or 'nudenet'"


def load_judge(
    spec: str,
    suite_labels: Mapping[str, dict[str, str]] | None = None,
    templates: dict[str, str] | None = None,
) -> Judge:
    """A judge by its name.

    Args:
        spec: "demo", "demo:2" (another architecture, to check the first), "clip:FOLDER" (a CLIP
            model as transformers saves it) or "nudenet"; "JUDGE+nudenet" adds unsafe content.
        suite_labels: for each domain to be judged {label: phrase}. CLIP is asked about the
            phrases; the others must know the labels.
        templates: for CLIP, a sentence with {} for the phrase, for each domain; "{}" by default.

    Raises:
        ForgetError: the name is unknown, something it needs is missing, or it does not know a
            domain or label asked for.
    """
    if not isinstance(spec, str):
        raise ForgetError(f"A judge is named by {KNOWN}, not by {spec!r}.")
    if spec.endswith("+nudenet"):
        first = load_judge(spec.removesuffix("+nudenet"), suite_labels, templates)
        return JoinedJudges([first, load_judge("nudenet")])
    kind, _, folder = spec.partition(":")
    if kind == "clip":
        from .clip_judge import ClipJudge

        return ClipJudge(folder, suite_labels, templates)
    if templates:
        raise ForgetError(f"Judge '{spec}' takes no templates: they are for 'clip:' and a folder.")
    judge: Judge
    if spec in ("demo", "demo:2"):
        from .demo_judge import DemoJudge

        judge = DemoJudge(spec)
    elif spec == "nudenet":
        from .nudenet_judge import NudeNetJudge

        judge = NudeNetJudge()
    else:
        raise ForgetError(f"There is no judge '{spec}': use {KNOWN}.")
    for domain, labels in (suite_labels or {}).items():
        _check_known(judge, domain, labels)
    return judge


def weight_files(spec: str) -> list[Path]:
    """Files and folders with a judge's weights; none for NudeNet, which is a package."""
    from .demo_judge import FILE

    paths = []
    for part in spec.split("+"):
        kind, _, folder = part.partition(":")
        paths += {"demo": [FILE], "clip": [Path(folder)] if folder else []}.get(kind, [])
    return paths


def _check_known(judge: Judge, domain: str, labels: Collection[str]) -> None:
    known = labels_of(judge, domain)
    unknown = [label for label in labels if label not in known]
    if unknown:
        names = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
        raise ForgetError(
            f"Judge '{judge.name}' does not know the {domain} '{unknown[0]}' "
            f"({len(unknown)} of {len(labels)} are unknown): use names from {names}."
        )
