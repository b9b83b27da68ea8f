"""The list formats that other projects publish, as entries of ours.

- UCE (rohitgandikota/unified-concept-editing): ``artists1734_prompts.csv``, a prompt a row with its
  ``artist`` or ``profession``; a JSON list of names in a .txt.
- MACE (Shilin-LU/MACE): ``configs/*.yaml`` with ``multi_concept`` and ``mapping_concept``; JSON
  of names and their paraphrases.
- LECO (p1atdev/LECO) and SPM (Con6924/SPM): YAML of ``target``, ``positive``, ``neutral``,
  ``action``.
"""

from typing import Any

from ..errors import ForgetError

NAMES = ("artist", "target", "concept", "class", "profession")  # columns that name a concept
OF_PROMPTS = ("prompt", "evaluation_seed", "case_number")  # columns of a table to draw from
LECO = ("target", "positive")


def name_column(cells: list[str], place: str) -> str | None:
    """The column with the names in a published table's header, in small letters; None in ours.

    Raises:
        ForgetError: it is a table of prompts that names no concept.
    """
    if "name" in cells or not set(cells) & {*OF_PROMPTS, *NAMES}:
        return None
    found = next((name for name in NAMES if name in cells), None)
    if found is None:
        raise ForgetError(
            f"{place}this is a table of prompts to draw, as UCE, MACE and SPM publish them, and "
            f"names no concept: give their list of concepts, or add a column 'name'."
        )
    return found


def row_entry(column: str, name: str) -> dict[str, Any]:
    """A row's concept."""
    return {"name": name, "kind": "style"} if column == "artist" else {"name": name}


def mapping_entries(data: dict, place: str) -> list[Any]:
    """The concepts of a file that is no list: a MACE configuration, or names with paraphrases.

    Raises:
        ForgetError: it is neither.
    """
    config = data.get("MACE", data)
    if isinstance(config, dict) and "multi_concept" in config:
        return _mace_entries(config, place)
    if data and all(isinstance(words, list) for words in data.values()):
        return [{"name": name, "aliases": words} for name, words in data.items()]
    raise ForgetError(
        f"{place}the file is not a list: write [...] around the concepts in JSON, and '- ' before "
        "each in YAML."
    )


def _mace_entries(config: dict, place: str) -> list[Any]:
    pairs = config["multi_concept"]
    if isinstance(pairs, list) and len(pairs) == 1:
        pairs = pairs[0]
    anchors = config.get("mapping_concept") or []
    if not isinstance(pairs, list) or not isinstance(anchors, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        for pair in pairs
    ):  # fmt: skip
        raise ForgetError(
            f"{place}multi_concept is not as MACE has it: write [[[name, kind], ...]], and its "
            "anchors as a list, mapping_concept."
        )
    if anchors and len(anchors) != len(pairs):
        raise ForgetError(
            f"{place}mapping_concept has {len(anchors)} anchors for {len(pairs)} concepts: write "
            "one for each."
        )
    named = [{"name": name.replace("-", " "), "kind": kind} for name, kind in pairs]
    return [entry | {"anchor": to} for entry, to in zip(named, anchors)] if anchors else named


def leco_entry(entry: dict) -> dict[str, Any]:
    """An entry of LECO or SPM, which is one with a target.

    Raises:
        ForgetError: it does not erase, or erases one thing from another.
    """
    target, action = entry.get("target"), entry.get("action", "erase")
    if not isinstance(action, str) or not action.startswith("erase"):
        raise ForgetError(f"action is '{action!s:.40}': only LECO's and SPM's 'erase' forgets.")
    if entry.get("positive", target) != target:
        raise ForgetError(
            f"this LECO entry erases '{entry['positive']!s:.60}' from '{target!s:.60}': name "
            "it alone, with method esd and its setting erase_from."
        )
    anchor = entry.get("neutral") or entry.get("unconditional") or ""
    return {"name": target} | ({"anchor": anchor} if anchor else {})
