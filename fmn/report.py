"""Patches in words."""

from .scores import scores_text

PARTS_SHOWN = 12  # of a merged patch


def printable(text):
    """Text from a stranger without control characters, which a terminal would obey."""
    if text.isprintable():  # nearly always, and much faster
        return text
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def describe(patch):
    """What a patch forgets, how it was made, and on which base: a few lines of text."""
    info = patch.info
    concepts = [f"{c['name']} ({c['kind']})" for c in info["concepts"]]
    ranks = "-".join(str(rank) for rank in sorted({patch.ranks[0], patch.ranks[-1]}))
    lines = [
        f"forgets: {', '.join(concepts)}",
        f"for: {patch.family.title}, {info.get('base.prediction', 'epsilon')} prediction, "
        f"base {info.get('base.fingerprint', 'unknown')}",
        f"layers: {len(patch.changes)}, rank {ranks}",
        f"method: {info.get('method', 'unknown')}",
    ]
    if info.get("merged"):
        lines.append(f"merged: {_merged(info['merged'])}")
    settings = [f"{key} {value}" for key, value in info.get("settings", {}).items()]
    if settings:
        lines.append(f"settings: {', '.join(settings)}")
    loss = info.get("loss")
    if loss:
        lines.append(f"loss: {loss['first']:.4g} -> {loss['last']:.4g} in {loss['steps']} steps")
    lines += scores_text(info)
    for key, meaning in (
        ("truncation_error", "cut off by the rank"),
        ("rounding_error", "lost by 16-bit rounding"),
    ):
        if key in info:
            lines.append(f"{meaning}: {info[key]:.2%} of the change")
    lines.append(f"made: {info.get('date', 'unknown')}, version {info.get('version', 'unknown')}")
    return "\n".join(printable(line) for line in lines)


def _merged(parts):
    """The patches that one was merged of, each with its strength; many of them in short."""
    if len(parts) <= PARTS_SHOWN:
        return "; ".join(
            f"{', '.join(part['concepts'])} ({part['method']}) at {part['strength']:g}"
            for part in parts
        )
    methods = ", ".join(dict.fromkeys(part["method"] for part in parts))
    strengths = sorted(part["strength"] for part in parts)
    return f"{len(parts)} patches by {methods}, at {strengths[0]:g} to {strengths[-1]:g}"
