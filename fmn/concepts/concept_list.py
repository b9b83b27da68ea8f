"""Lists of concepts: lines, CSV, YAML or JSON. A list is untrusted, so everything is bounded."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ..downloads import first_bytes
from ..errors import ForgetError
from .concept import Concept, kind_and_name, parse_concept
from .published_lists import leco_entry, mapping_entries, name_column, row_entry
from .wordlists import lines_of

MAX_BYTES = 1 << 20
MAX_CONCEPTS = 10_000
MAX_TEXTS = 200  # aliases or prompts of one concept
MAX_LENGTH = 1000  # letters of one text
FIELDS = ("name", "kind", "aliases", "prompts", "anchor")
LIST_FIELDS = ("aliases", "prompts")
SUFFIXES = (".txt", ".csv", ".yaml", ".yml", ".json")
Entry: TypeAlias = tuple[int, Any]  # number of its line, from 1, and plain data
NUMBER = re.compile(r"(\d{1,4})[.)]\s+")
COMMA = re.compile(r"[^\W\d],[^\W\d]")
SEPARATORS = re.compile(r"[|;]")  # of aliases and prompts in a cell of CSV
KINDS_OF_DATA = {
    list: "a list", dict: "a mapping", type(None): "empty", bool: "yes or no",
    int: "a number", str: "a text", float: "a number",
}  # fmt: skip


def read_concepts(text_or_path: str | Path, kind: str = "object") -> list[Concept]:
    """Concepts from a text or a file.

    Args:
        text_or_path: a ``Path``, or a string that is one line and ends like a file name
            (``SUFFIXES``), is read as a file; any other string is the list itself, in lines as
            ``parse_lines`` reads them. YAML and JSON files hold a list; each entry is such a line
            or a mapping with the fields ``FIELDS``. CSV begins with a row of those fields, in any
            order; aliases and prompts stand in one cell each, with | or ; between them. Where no
            kind is given, the name may be KIND:NAME. ``published_lists`` are read too.
        kind: kind of entries that name none.

    Raises:
        ForgetError: no such file, too big, or something wrong in it; the message names the line.
    """
    if isinstance(text_or_path, str):
        text = text_or_path.strip()
        if len(text.splitlines()) != 1 or not text.lower().endswith(SUFFIXES):
            return parse_lines(text_or_path, kind)
        text_or_path = text
    path = Path(text_or_path)
    text, suffix = _read(path), path.suffix.lower()
    place = f"'{path.name}', line "
    if suffix == ".json":
        return _concepts(_json_entries(text, place), kind, place)
    if suffix in (".yaml", ".yml"):
        return _concepts(_yaml_entries(text, place), kind, place)
    if suffix == ".csv":
        return _concepts(_csv_entries(text, place), kind, place)
    return parse_lines(text, kind, place)


def parse_lines(text: str, kind: str = "object", place: str = "Line ") -> list[Concept]:
    """Concepts from lines ``KIND:NAME | ALIAS -> ANCHOR``, all but the name optional.

    ``#`` begins a comment.

    Args:
        place: begins error messages, before the line's number.

    Raises:
        ForgetError: a line is wrong, or there is no concept.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ForgetError(f"The list has more than {MAX_BYTES >> 20} MiB: make it shorter.")
    text = text.removeprefix("\ufeff")
    if text.lstrip().startswith("["):  # as UCE keeps what it erased
        return _concepts(_json_entries(text, place), kind, place)
    return _concepts(_lines(text, place), kind, place)


def _lines(text: str, place: str) -> list[Entry]:
    """The lines of a list, without the numbers of one that is numbered.

    Raises:
        ForgetError: a line holds more than one name, or a name and words about it.
    """
    lines = lines_of(text)
    numbered = [NUMBER.match(line) for _, line in lines]
    if all(match and int(match[1]) == i for i, match in enumerate(numbered, 1)):
        lines = [(number, NUMBER.sub("", line)) for number, line in lines]
    for number, line in lines:
        if COMMA.search(line) and ":" not in line:
            raise ForgetError(
                f"{place}{number}: '{line:.60}' is more than a name: write one name a line, from "
                "UCE's list of artists only what is before the comma; in a name a space follows it."
            )
    return lines


def _read(path: Path) -> str:
    first_bytes(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ForgetError(
                f"'{path}' has more than {MAX_BYTES >> 20} MiB: that is too much for a list."
            )
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgetError(
            f"The list '{path}' cannot be read ({reason}): give the path of a UTF-8 text file."
        ) from error


def _concepts(entries: Iterable[Entry], kind: str, place: str) -> list[Concept]:
    concepts: dict[tuple[str, str], tuple[int, Concept]] = {}
    for number, entry in entries:
        if len(concepts) == MAX_CONCEPTS:
            raise ForgetError(
                f"{place}{number}: more than {MAX_CONCEPTS:,} concepts: split the list."
            )
        try:
            concept = concept_of(entry, kind)
        except ForgetError as error:
            raise ForgetError(f"{place}{number}: {error}") from error
        key = concept.name.casefold(), concept.kind
        first, known = concepts.setdefault(key, (number, concept))
        if known is not concept:
            raise ForgetError(
                f"{place}{number}: '{concept.name}' is on line {first} already: keep one."
            )
    if not concepts:
        raise ForgetError("The list names no concept: write at least one, e.g. 'dog -> cat'.")
    return [concept for _, concept in concepts.values()]


def concept_of(entry: Any, kind: str = "object") -> Concept:
    """A concept of untrusted plain data: a line, or a mapping of ``FIELDS``.

    Raises:
        ForgetError: it has other fields or kinds of values, or too many or long ones.
    """
    if isinstance(entry, str):
        return parse_concept(_text(entry, "the line"), kind)
    if isinstance(entry, dict) and "target" in entry:
        entry = leco_entry(entry)
    if not isinstance(entry, dict):
        raise ForgetError(f"an entry is {_kind(entry)}: write a name, or fields such as 'name'.")
    for key in entry:
        if key not in FIELDS:
            shown = f"'{key:.60}'" if isinstance(key, str) else f"that is {_kind(key)}"
            raise ForgetError(f"there is no field {shown}: use {', '.join(FIELDS)}.")
    if "name" not in entry:
        raise ForgetError("the field 'name' is missing: write the words to forget.")
    values: dict[str, Any] = {
        name: (_texts if name in LIST_FIELDS else _text)(value, name)
        for name, value in entry.items()
    }
    if "kind" not in values:
        values["kind"], values["name"] = kind_and_name(values["name"], kind)
    return Concept(**values)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ForgetError(f"{name} is {_kind(value)}: write a text, in quotes if need be.")
    if len(value) > MAX_LENGTH:
        raise ForgetError(f"{name} has {len(value)} letters: use at most {MAX_LENGTH}.")
    return value.strip()


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ForgetError(f"{name} is {_kind(value)}: write a list of texts.")
    if len(value) > MAX_TEXTS:
        raise ForgetError(f"{name} has {len(value)} entries: use at most {MAX_TEXTS}.")
    return tuple(_text(one, f"an entry of {name}") for one in value)


def _kind(value: Any) -> str:
    return KINDS_OF_DATA.get(type(value), f"a {type(value).__name__}")


def _csv_entries(text: str, place: str) -> Iterator[Entry]:
    """The rows of a table; blank ones are skipped."""
    reader, begun = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    columns, published, listed = None, None, set[str]()
    try:
        for row in reader:
            number, begun = begun, reader.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                columns = [cell.lower() for cell in cells]
                published = name_column(columns, f"{place}{number}: ")
                if not published:
                    _check_columns(columns, f"{place}{number}: ")
                continue
            if len(cells) > len(columns):
                raise ForgetError(
                    f"{place}{number}: there are {len(cells)} cells for {len(columns)} columns: "
                    "put a cell that has a comma in it in double quotes."
                )
            entry = dict(zip(columns, cells))
            if published:
                if (name := entry.get(published, "")) in listed:
                    continue
                listed.add(name)
                yield number, row_entry(published, name)
            else:
                yield number, _entry_of_row(entry)
    except csv.Error as error:
        raise ForgetError(f"{place}{begun}: this CSV cannot be read: {error}.") from error


def _check_columns(cells: list[str], place: str) -> None:
    """Refuse a header row that does not name our columns."""
    wrong = [cell for cell in cells if cell not in FIELDS]
    if wrong or "name" not in cells or len(set(cells)) < len(cells):
        found = " ".join(", ".join(cells).split())
        raise ForgetError(
            f"{place}the first row has to name the columns, each once and with commas between "
            f"them: name, and any of {', '.join(FIELDS[1:])}; this one has '{found:.40}'."
        )


def _entry_of_row(cells: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {name: cell for name, cell in cells.items() if cell or name == "name"}
    for name in LIST_FIELDS:
        if name in entry:
            texts = (text.strip() for text in SEPARATORS.split(entry[name]))
            entry[name] = [text for text in texts if text]
    return entry


def _json_entries(text: str, place: str) -> list[Entry]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ForgetError(f"{place}{error.lineno}: this is not valid JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a deep nest
        raise ForgetError(f"{place}1: this JSON is not a list of concepts: {error}.") from error
    if isinstance(data, dict):
        return [(1, entry) for entry in mapping_entries(data, f"{place}1: ")]
    if not isinstance(data, list):
        raise ForgetError(f"{place}1: the file is not a list: write [...] around the concepts.")
    if len(data) > MAX_CONCEPTS:
        raise ForgetError(f"{place}1: more than {MAX_CONCEPTS:,} concepts: split the list.")
    decoder, numbers, position = json.JSONDecoder(), [], text.index("[") + 1
    for _ in data:
        while text[position].isspace() or text[position] == ",":
            position += 1
        numbers.append(text.count("\n", 0, position) + 1)
        _, position = decoder.raw_decode(text, position)
    return list(zip(numbers, data))


def _yaml_entries(text: str, place: str) -> list[Entry]:
    try:
        import yaml
    except ImportError as error:
        raise ForgetError(
            "YAML lists need the package pyyaml: install it, or write the list as plain lines."
        ) from error

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            # A few nested aliases can stand for more data than fits in memory, and tags (!) for
            # values that their constructors fail on.
            event = self.peek_event()
            alias = isinstance(event, yaml.AliasEvent)
            if alias or event.tag is not None:
                what = "aliases (*)" if alias else "tags (!)"
                raise yaml.MarkedYAMLError(
                    problem=f"{what} are not read here", problem_mark=event.start_mark
                )
            return super().compose_node(parent, index)

    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            data = loader.construct_object(root, deep=True)
            return [(1, entry) for entry in mapping_entries(data, f"{place}1: ")]
        if not isinstance(root, yaml.SequenceNode):
            raise ForgetError(f"{place}1: the file is not a list: write '- ' before each concept.")
        return [
            (node.start_mark.line + 1, loader.construct_object(node, deep=True))
            for node in root.value
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line + 1 if mark else 1
        reason = " ".join(str(error.problem).split())
        raise ForgetError(f"{place}{number}: this YAML cannot be read: {reason:.200}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ForgetError(f"{place}1: this YAML cannot be read: {reason:.200}.") from error
