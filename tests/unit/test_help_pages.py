"""Every help page has a Chinese twin with the same parts. ComfyUI looks for NODE/zh.md."""

import re
from collections import Counter

import pytest
from PIL import Image

from tools.locales import BOOK, LOCALES, ROOT, read

DOCS = ROOT / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
HAN = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CODE = re.compile(r"```.*?```", re.DOTALL)


def english(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def chinese(name):
    return (DOCS / name / "zh.md").read_text(encoding="utf-8")


def tables(text):
    """[(heading above, rows)], a row being its cells."""
    found, rows, heading = [], [], ""
    for line in [*CODE.sub("", text).splitlines(), ""]:
        if line.startswith("#"):
            heading = line
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append((heading, rows[2:]))
            rows = []
    return found


def labels(node, part):
    """{a name as the English page has it: its label on a Chinese page}."""
    book, texts = read(BOOK), read(LOCALES / "en" / "nodeDefs.json")[node].get(part, {})
    known = {}
    for name, told in texts.items():
        spelled = {
            name,
            name.replace("_", " "),
            told["name"],
            told["name"].lower(),
        }
        known |= dict.fromkeys(spelled, book[told["name"]])
    return known


def with_labels(cell, known):
    """A name with the label it has on a Chinese page, so that a row is found by either."""
    names = cell.split(", ")
    told = {name: known[name] for name in names}
    return "\u3001".join(
        name if told[name].lower() == name.lower() else f"{name}\uff08{told[name]}\uff09"
        for name in names
    )


def test_no_page_is_left_over():
    assert sorted(path.parent.name for path in DOCS.glob("*/*.md")) == PAGES
    assert len(PAGES) > 30


@pytest.mark.parametrize("name", PAGES)
def test_a_picture_of_the_node_is_under_the_title(name):
    """Made by tools/node_pictures.py. The page looks below docs/, for each language."""
    address = f"images/{name}.png"
    for text in (english(name), chinese(name)):
        title = text.partition("\n")[0].removeprefix("# ")
        assert text.startswith(f"# {title}\n\n![{title}]({address})\n\n")
    assert (DOCS / address).stat().st_size < 25_000
    with Image.open(DOCS / address) as picture:
        picture.load()  # all of it is there
        assert picture.format == "PNG" and picture.width > 300


def test_no_picture_is_left_over():
    assert sorted(path.stem for path in (DOCS / "images").iterdir()) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_headings_and_code_are_the_same(name):
    levels = [
        re.findall(r"^#+(?= )", CODE.sub("", text), re.MULTILINE)
        for text in (english(name), chinese(name))
    ]
    assert levels[0] == levels[1]
    assert CODE.findall(english(name)) == CODE.findall(chinese(name))
    title = read(LOCALES / "zh" / "nodeDefs.json")[name]["display_name"]
    assert chinese(name).startswith(f"# {title}\n")


@pytest.mark.parametrize("name", PAGES)
def test_tables_have_the_same_rows(name):
    ours, theirs = tables(english(name)), tables(chinese(name))
    assert len(ours) == len(theirs)
    for (heading, rows), (_, twins) in zip(ours, theirs):
        assert len(rows) == len(twins), heading
        part = {"## Inputs": "inputs", "## Outputs": "outputs"}.get(heading)
        known = labels(name, part) if part else {}
        for row, twin in zip(rows, twins):
            assert len(row) == len(twin), row
            if known and set(row[0].split(", ")) <= known.keys():
                assert twin[0] == with_labels(row[0], known)
            else:  # a message, as it is on the screen, or what one sees, in Chinese
                assert twin[0] == row[0] or HAN.search(twin[0]), row


@pytest.mark.parametrize("name", PAGES)
def test_every_input_and_output_row_is_known(name):
    for heading, rows in tables(english(name)):
        part = {"## Inputs": "inputs", "## Outputs": "outputs"}.get(heading)
        if part and rows[0][0] not in ("weak",):  # Safe Latent Diffusion lists its presets there
            known = labels(name, part)
            for row in rows:
                assert set(row[0].split(", ")) <= known.keys(), row[0]


@pytest.mark.parametrize("name", PAGES)
def test_numbers_code_and_node_names_are_the_same(name):
    book, nodes = read(BOOK), read(LOCALES / "en" / "nodeDefs.json")
    titles = {node["display_name"] for node in nodes.values()}
    ours, theirs = english(name), chinese(name)
    numbers = [Counter(NUMBER.findall(text)) for text in (ours, theirs)]
    spelled = {"2", "1"}  # may be a word in one language: "double", "first"
    assert {n: c for n, c in numbers[0].items() if n not in spelled} == {
        n: c for n, c in numbers[1].items() if n not in spelled
    }
    spans = [Counter(re.findall(r"`[^`\n]+`", CODE.sub("", text))) for text in (ours, theirs)]
    assert set(spans[0]) == set(spans[1])
    mentioned = [book[bold] for bold in re.findall(r"\*\*(.+?)\*\*", ours) if bold in titles]
    assert Counter(mentioned) == Counter(
        bold for bold in re.findall(r"\*\*(.+?)\*\*", theirs) if bold in map(book.get, titles)
    )
