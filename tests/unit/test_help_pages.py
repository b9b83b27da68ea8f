"""Help pages: every input and output is described, and the Chinese page, which ComfyUI looks for at
NODE/zh.md, says the same. A missing or outdated translation is a warning.
"""

import re
import warnings
from collections import Counter

import pytest
from PIL import Image

from tools.locales import BOOK, LOCALES, ROOT, read

DOCS = ROOT / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
TRANSLATED = [name for name in PAGES if (DOCS / name / "zh.md").is_file()]
HAN = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CODE = re.compile(r"```.*?```", re.DOTALL)
PARTS = {"## Inputs": "inputs", "## Outputs": "outputs"}


def english(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def chinese(name):
    return (DOCS / name / "zh.md").read_text(encoding="utf-8")


def expect_same(name, what, in_english, in_chinese):
    """Warn that a Chinese page is outdated unless both are equal."""
    if in_english != in_chinese:
        warnings.warn(
            f"web/docs/{name}/zh.md is outdated: {what}: {in_english} != {in_chinese}", stacklevel=2
        )


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
    """{a name as the English page may have it: its label on a Chinese page}."""
    book, texts = read(BOOK), read(LOCALES / "en" / "nodeDefs.json")[node].get(part, {})
    known = {}
    for name, text in texts.items():
        spellings = {name, name.replace("_", " "), text["name"], text["name"].lower()}
        known |= dict.fromkeys(spellings, book.get(text["name"]) or text["name"])
    return known


def with_labels(cell, known):
    """A name with the label it has on a Chinese page, so that a row is found by either."""
    return "\u3001".join(
        name if known[name].lower() == name.lower() else f"{name}\uff08{known[name]}\uff09"
        for name in cell.split(", ")
    )


def test_no_page_is_left_over():
    assert len(PAGES) > 30
    translated = {path.parent.name for path in DOCS.glob("*/*.md")}
    assert translated <= set(PAGES)
    if missing := set(PAGES) - translated:
        warnings.warn(f"help pages without a Chinese one: {sorted(missing)}", stacklevel=1)


@pytest.mark.parametrize("name", PAGES)
def test_a_picture_of_the_node_is_under_the_title(name):
    """Made by tools/node_pictures.py. The page looks below docs/, for each language."""
    address = f"images/{name}.png"
    for text in [english(name), *([chinese(name)] if name in TRANSLATED else [])]:
        title = text.partition("\n")[0].removeprefix("# ")
        assert text.startswith(f"# {title}\n\n![{title}]({address})\n\n")
    assert (DOCS / address).stat().st_size < 25_000
    with Image.open(DOCS / address) as picture:
        picture.load()  # all of it is there
        assert picture.format == "PNG" and picture.width > 300


def test_no_picture_is_left_over():
    assert sorted(path.stem for path in (DOCS / "images").iterdir()) == PAGES


@pytest.mark.parametrize("name", TRANSLATED)
def test_headings_and_code_are_the_same(name):
    levels = [
        re.findall(r"^#+(?= )", CODE.sub("", text), re.MULTILINE)
        for text in (english(name), chinese(name))
    ]
    expect_same(name, "headings", *levels)
    expect_same(name, "code", CODE.findall(english(name)), CODE.findall(chinese(name)))
    title = read(LOCALES / "zh" / "nodeDefs.json")[name].get("display_name")
    expect_same(name, "title", f"# {title}", chinese(name).partition("\n")[0])


@pytest.mark.parametrize("name", TRANSLATED)
def test_tables_have_the_same_rows(name):
    ours, theirs = tables(english(name)), tables(chinese(name))
    expect_same(name, "number of tables", len(ours), len(theirs))
    for (heading, rows), (_, twins) in zip(ours, theirs):
        known = labels(name, PARTS[heading]) if heading in PARTS else {}
        shapes = [[len(row) for row in table] for table in (rows, twins)]
        expect_same(name, f"{heading}: cells per row", *shapes)
        if shapes[0] != shapes[1]:
            continue
        for row, twin in zip(rows, twins):
            if known and set(row[0].split(", ")) <= known.keys():
                expect_same(name, heading, with_labels(row[0], known), twin[0])
            elif not HAN.search(twin[0]):  # a message as it is on the screen, or a translation
                expect_same(name, heading, row[0], twin[0])


@pytest.mark.parametrize("name", PAGES)
def test_every_input_and_output_row_is_known(name):
    for heading, rows in tables(english(name)):
        part = PARTS.get(heading)
        if part and rows[0][0] not in ("weak",):  # Safe Latent Diffusion lists its presets there
            known = labels(name, part)
            for row in rows:
                assert set(row[0].split(", ")) <= known.keys(), row[0]


@pytest.mark.parametrize("name", TRANSLATED)
def test_numbers_code_and_node_names_are_the_same(name):
    book, nodes = read(BOOK), read(LOCALES / "en" / "nodeDefs.json")
    titles = {node["display_name"]: book.get(node["display_name"]) for node in nodes.values()}
    ours, theirs = english(name), chinese(name)
    numbers = [Counter(NUMBER.findall(text)) for text in (ours, theirs)]
    for words in ("2", "1"):  # may be a word in one language: "double", "first"
        for counter in numbers:
            counter.pop(words, None)
    expect_same(name, "numbers", *numbers)
    spans = [set(re.findall(r"`[^`\n]+`", CODE.sub("", text))) for text in (ours, theirs)]
    expect_same(name, "code", *spans)
    bold = [re.findall(r"\*\*(.+?)\*\*", text) for text in (ours, theirs)]
    mentioned = Counter(titles[text] for text in bold[0] if text in titles)
    named = Counter(text for text in bold[1] if text in titles.values())
    expect_same(name, "nodes", mentioned, named)
