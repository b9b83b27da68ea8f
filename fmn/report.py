"""Patches in words."""


def printable(text):
    """Text from a stranger without control characters, which a terminal would obey."""
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
    settings = [f"{key} {value}" for key, value in info.get("settings", {}).items()]
    if settings:
        lines.append(f"settings: {', '.join(settings)}")
    loss = info.get("loss")
    if loss:
        lines.append(f"loss: {loss['first']:.4g} -> {loss['last']:.4g} in {loss['steps']} steps")
    for key, meaning in (
        ("truncation_error", "cut off by the rank"),
        ("rounding_error", "lost by 16-bit rounding"),
    ):
        if key in info:
            lines.append(f"{meaning}: {info[key]:.2%} of the change")
    lines.append(f"made: {info.get('date', 'unknown')}, version {info.get('version', 'unknown')}")
    return "\n".join(printable(line) for line in lines)
