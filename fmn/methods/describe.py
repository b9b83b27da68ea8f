"""A patch in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..patches.metadata import CHANGED
from ..patches.patch import ForgetPatch
from ..patches.scores import scores_text
from ..text import printable
from . import METHODS, method

PARTS_SHOWN = 12  # of a merged patch
SETTINGS_SHOWN = 50  # more than any method has
CONCEPTS_SHOWN = 50


def describe(patch: ForgetPatch) -> str:
    """What a patch forgets, how it was made, and on which base: a few lines of text."""
    info = patch.info
    ranks = "-".join(str(rank) for rank in sorted({patch.ranks[0], patch.ranks[-1]}))
    lines = [
        f"forgets: {_concepts(info['concepts'])}",
        f"for: {patch.family.title}, {info.get('base.prediction', 'epsilon')} prediction, "
        f"base {info.get('base.fingerprint', 'unknown')}",
        f"layers: {len(patch.changes)}, rank {ranks}",
        f"method: {info.get('method', 'unknown')}",
    ]
    if info.get("merged"):
        lines.append(f"merged: {_merged(info['merged'])}")
    if info.get("imported"):
        lines.append(_imported(info["imported"]))
    lines += _settings(info)
    loss = info.get("loss")
    if loss:
        # What solves records two: before and after.
        steps = f" in {loss['steps']} steps" if loss["steps"] > 2 else ""
        lines.append(f"loss: {loss['first']:.4g} -> {loss['last']:.4g}{steps}")
    lines += [f"changed: {CHANGED}"] if info.get("changed") else scores_text(info)
    if "scores" in info and patch.source and not patch.source.bound:
        lines.append("not checked: the file does not say which weights its scores belong to")
    for key, meaning in (
        ("truncation_error", "cut off by the rank"),
        ("rounding_error", "lost by 16-bit rounding"),
    ):
        if key in info:
            lines.append(f"{meaning}: {info[key]:.2%} of the change")
    lines.append(f"made: {info.get('date', 'unknown')}, version {info.get('version', 'unknown')}")
    return "\n".join(printable(line) for line in lines)


def _imported(record: Mapping[str, Any]) -> str:
    """Where an imported patch came from, by its untrusted record."""
    kind, file, digest = (str(record.get(key, "unknown")) for key in ("kind", "file", "sha256"))
    return f"imported: {kind:.40} from {file:.100}, SHA-256 {digest:.16}..."


def _concepts(concepts: Sequence[Mapping[str, Any]]) -> str:
    """The first concepts, and how many more there are."""
    more = len(concepts) - CONCEPTS_SHOWN
    shown = "; ".join(map(_concept, concepts[:CONCEPTS_SHOWN]))
    return shown if more <= 0 else f"{shown}; and {more:,} more"


def _concept(concept: Mapping[str, Any]) -> str:
    """A concept with its aliases and its anchor."""
    aliases = f", also {', '.join(concept['aliases'])}" if concept.get("aliases") else ""
    anchor = f" -> {concept['anchor']}" if concept.get("anchor") else ""
    return f"{concept['name']} ({concept['kind']}){aliases}{anchor}"


def _settings(info: Mapping[str, Any]) -> list[str]:
    """The preset that comes closest, and a line for each setting that is not as there.

    All of them, for a method or settings that are not known here.
    """
    settings, name = info.get("settings", {}), info.get("method")
    if not settings:
        return []
    if name not in METHODS:
        return ["settings:", *_listed(settings)]
    module = method(METHODS[name][0])
    settings = module.Settings.current(settings)
    changes = {
        preset: {key: value for key, value in settings.items() if value != known.get(key)}
        for preset, known in ((each, asdict(own)) for each, own in module.PRESETS.items())
    }
    closest = min(changes, key=lambda preset: len(changes[preset]))
    if not changes[closest]:
        return [f"settings: as preset {closest}"]
    return [f"settings: as preset {closest}, except", *_listed(changes[closest])]


def _listed(settings: Mapping[str, Any]) -> list[str]:
    lines = [f"- {key} {value}" for key, value in settings.items()]
    more = len(lines) - SETTINGS_SHOWN
    return [*lines[:SETTINGS_SHOWN], f"- and {more} more"] if more > 0 else lines


def _merged(parts: Sequence[Mapping[str, Any]]) -> str:
    """The patches that one was merged of, each with its strength; many of them in short."""
    if len(parts) <= PARTS_SHOWN:
        return "; ".join(
            f"{', '.join(part['concepts'])} ({part['method']}) at {part['strength']:g}"
            for part in parts
        )
    methods = ", ".join(dict.fromkeys(part["method"] for part in parts))
    strengths = sorted(part["strength"] for part in parts)
    return f"{len(parts)} patches by {methods}, at {strengths[0]:g} to {strengths[-1]:g}"
