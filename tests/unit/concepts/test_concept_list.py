import json
import sys
from pathlib import Path

import pytest

from fmn.concepts.concept import Concept
from fmn.concepts.concept_list import MAX_BYTES, parse_lines, read_concepts
from fmn.errors import ForgetError

LINES = """
# people
identity: ada lovelace -> a woman  # a comment
dog->cat

style:c# -> d
object:mission: impossible
"""
FOUND = [
    Concept("ada lovelace", "identity", anchor="a woman"),
    Concept("dog", anchor="cat"),
    Concept("c#", "style", anchor="d"),
    Concept("mission: impossible"),
]
YAML = """
- name: ada lovelace
  kind: identity
  anchor: a woman
- dog -> cat
- {name: "c#", kind: style, anchor: d}
- "object:mission: impossible"
"""
JSON = """[
  {"name": "ada lovelace", "kind": "identity", "anchor": "a woman"},
  "dog -> cat", {"name": "c#", "kind": "style", "anchor": "d"},
  "object:mission: impossible"
]"""


CSV = """kind,Name,anchor,aliases,prompts

identity,ada lovelace,a woman,,
,dog,cat,
style,c#,d
object,"mission: impossible"
"""


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines():
    assert parse_lines(LINES) == FOUND == read_concepts(LINES)
    assert parse_lines("dog", "style") == [Concept("dog", "style")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", LINES), ("a.md", LINES), ("b.txt", b"\xef\xbb\xbf" + LINES.encode()),
        ("c.txt", LINES.replace("\n", "\r\n")), ("a.yaml", YAML), ("a.YML", YAML), ("a.json", JSON),
        ("a.csv", CSV), ("a.CSV", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
    ],
)  # fmt: skip
def test_files(tmp_path, name, content):
    path = written(tmp_path, name, content)
    assert read_concepts(path) == FOUND
    if path.suffix != ".md":
        assert read_concepts(str(path)) == FOUND


def test_all_fields(tmp_path):
    given = Concept("dog", "custom", ("puppy",), ("a dog", "a puppy"), anchor="cat")
    text = '[{"name": "dog", "kind": "custom", "aliases": ["puppy"], "anchor": "cat",\n'
    text += '"prompts": ["a dog", "a puppy"]}]'
    for name in ("a.json", "a.yaml"):
        assert read_concepts(written(tmp_path, name, text)) == [given]


def test_a_line_may_have_aliases():
    assert parse_lines("object: dog | puppy|hound -> cat\nfox|vixen") == [
        Concept("dog", "object", ("puppy", "hound"), anchor="cat"),
        Concept("fox", aliases=("vixen",)),
    ]
    with pytest.raises(ForgetError, match="Line 2: An alias of 'dog' is empty"):
        parse_lines("# pets\ndog | ")


def test_a_name_without_a_field_for_its_kind_is_read_as_a_line_is(tmp_path):
    both = "style:ink drawing", "object:mission: impossible"
    expected = [Concept("ink drawing", "style"), Concept("mission: impossible")]
    table = "\n".join(["name,kind", *(f"{name}," for name in both)])
    assert read_concepts(written(tmp_path, "a.csv", table)) == expected
    mappings = [{"name": name} for name in both]
    assert read_concepts(written(tmp_path, "a.json", json.dumps(mappings))) == expected
    given = written(tmp_path, "b.csv", "kind,name\nstyle,person: a play")
    assert read_concepts(given) == [Concept("person: a play", "style")]
    with pytest.raises(ForgetError, match="line 3: 'person' is not a kind"):
        read_concepts(written(tmp_path, "a.csv", "name\ndog\nperson:elon musk"))


def test_all_columns_of_a_table(tmp_path):
    text = "aliases,name,prompts,kind,anchor\n"
    text += '"puppy| hound;",dog,"a dog, sitting | two\nhounds",object,cat\nvixen,fox\n'
    expected = [
        Concept(
            "dog", "object", ("puppy", "hound"), ("a dog, sitting", "two\nhounds"), anchor="cat"
        ),
        Concept("fox", aliases=("vixen",)),
    ]
    assert read_concepts(written(tmp_path, "a.csv", text)) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "names no concept"),
        ("name,kind\n", "names no concept"),
        ("\ndog,object\n", "line 2: the first row has to name the columns"),
        ("name;kind\ndog;object", "line 1: the first row .* this one has 'name;kind'"),
        ("name,name\ndog,cat", "line 1: the first row has to name the columns, each once"),
        ("kind,anchor\nobject,cat", "line 1: the first row"),
        ('name,prompts\ndog,"a\ndog"\n,x', "line 4: The concept's name is empty"),
        ("name,kind\ndog,object\n\ncat,person", "line 4: Unknown kind 'person'"),
        ("name,anchor\ndog,a cat, sleeping", "line 2: there are 3 cells for 2 columns"),
        ('name\ndog\n"cat" x', "line 3: this CSV cannot be read"),
        ('name\ndog\n"cat', "line 3: this CSV cannot be read"),
        ("name,aliases\ndog," + "x|" * 201, "line 2: aliases has 201 entries"),
        ("name\n" + "a" * 1001, "line 2: name has 1001 letters"),
        ("name\n" + "a" * 200_000, "line 2: this CSV cannot be read: field larger"),
        ("name\n" + "\n".join(f"dog {i}" for i in range(10_001)), "line 10002: more than 10,000"),
        ("name\ndog\nDog", "line 3: 'Dog' is on line 2 already"),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path, content, message):
    with pytest.raises(ForgetError, match=message) as caught:
        read_concepts(written(tmp_path, "a.csv", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_kind_for_entries_that_name_none(tmp_path):
    path = written(tmp_path, "a.json", '["monet", {"name": "dog"}, "object:cat"]')
    assert [one.kind for one in read_concepts(path, "style")] == ["style", "style", "object"]


def test_the_same_name_may_have_two_kinds():
    assert len(parse_lines("style:dog\nobject:dog")) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no concept"),
        (" \n# nothing\n", "names no concept"),
        ("dog\n\nstyle:", "Line 3: The concept's name is empty"),
        ("dog\n-> cat", "Line 2: The concept's name is empty"),
        ("dog\nperson:elon musk", "Line 2: 'person' is not a kind: use identity"),
        ("dog ->", "Line 1: .* nothing after"),
        ("dog -> cat -> fox", "Line 1: .* more than one"),
        ("# a\ndog -> DOG", "Line 2: The anchor of 'dog' is 'DOG'"),
        ("custom:dog", "Line 1: .* add at least one prompt"),
        ("dog\ncat\n Dog ", "Line 3: 'Dog' is on line 1 already"),
        ("a" * 1001, "Line 1: the line has 1001 letters: use at most 1000"),
        ("\n".join(f"dog {i}" for i in range(10_001)), "Line 10001: more than 10,000 concepts"),
        ("\u00e9" * (MAX_BYTES // 2 + 1), "more than 1 MiB"),
    ],
)
def test_bad_lines(text, message):
    with pytest.raises(ForgetError, match=message):
        parse_lines(text)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "line 1: this is not valid JSON"),
        ('["dog",\n\n"cat"', "line 3: this is not valid JSON"),
        ('{"name": "dog"}', "line 1: the file is not a list"),
        ("[]", "names no concept"),
        ("[\n\n3]", "line 3: an entry is a number"),
        ("[true]", "line 1: an entry is yes or no"),
        ("[" + "1,\n" * 200_000 + "1]", "more than 10,000 concepts"),
        ('["dog",\nnull]', "line 2: an entry is empty"),
        ('["dog",\n["cat"]]', "line 2: an entry is a list"),
        ('[\n{"kind": "style"}]', "line 2: the field 'name' is missing"),
        ('[{"name": 3}]', "line 1: name is a number: write a text"),
        ('[{"name": ""}]', "line 1: The concept's name is empty"),
        ('[{"name": "dog", "kind": "person"}]', "line 1: Unknown kind 'person'"),
        ('[{"name": "dog", "kind": ["style"]}]', "line 1: kind is a list"),
        ('[{"name": "dog", "aliases": "puppy"}]', "line 1: aliases is a text: write a list"),
        ('[{"name": "dog", "aliases": [1]}]', "line 1: an entry of aliases is a number"),
        ('[{"name": "dog", "aliases": [""]}]', "line 1: An alias of 'dog' is empty"),
        ('[{"name": "dog", "prompts": {}}]', "line 1: prompts is a mapping: write a list"),
        ('[{"name": "dog", "images": []}]', "line 1: there is no field 'images': use name, kind"),
        ('[{"name": "dog", "anchor": null}]', "line 1: anchor is empty: write a text"),
        ('[{"name": "dog", "anchor": "dog"}]', "line 1: The anchor of 'dog' is 'dog'"),
        ('["dog", "dog"]', "line 1: 'dog' is on line 1 already"),
        ("[NaN, 1]", "line 1: an entry is a number"),
        ("[" * 100_000, "line 1: this JSON is not a list of concepts"),
        ("[1" + "0" * 5000 + "]", "line 1: this JSON is not a list of concepts"),
        (b'["caf\xe9"]', "cannot be read .*: give the path of a UTF-8 text file"),
        ('["' + "a" * MAX_BYTES + '"]', "more than 1 MiB"),
    ],
)
def test_bad_json(tmp_path, content, message):
    with pytest.raises(ForgetError, match=message) as caught:
        read_concepts(written(tmp_path, "a.json", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_too_many_aliases(tmp_path):
    many = ", ".join(['"x"'] * 201)
    path = written(tmp_path, "a.json", f'[{{"name": "dog", "aliases": [{many}]}}]')
    with pytest.raises(ForgetError, match="line 1: aliases has 201 entries: use at most 200"):
        read_concepts(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "line 1: the file is not a list"),
        ("name: dog", "line 1: the file is not a list"),
        ("- dog\n- !!bool foo", "tags"),
        ('- !!int ""', "tags"),
        ("- !!timestamp foo", "tags"),
        ("- dog\n- 'cat", "line 2: this YAML cannot be read"),
        ("- dog\n- cat\n- name: [", "line 3: this YAML cannot be read"),
        ("- dog\n\n- 2020-01-01", "line 3: an entry is a date"),
        ("- dog\n- name: no\n", "line 2: name is yes or no: write a text, in quotes"),
        ("- dog\n- nmae: cat\n", "line 2: there is no field 'nmae'"),
        ("- dog\n- 3: cat\n", "line 2: there is no field that is a number"),
        ("- 0x" + "f" * 9000, "line 1: an entry is a number"),
        ("- 2020-13-45", "line 1: this YAML cannot be read: month"),
        ("- &a dog\n- *a", "line 2: this YAML cannot be read: aliases"),
        ("- !!python/object/apply:os.getcwd []", "line 1: this YAML cannot be read: tags"),
        ("- dog\n---\n- cat", "this YAML cannot be read"),
        ("- \x01", "this YAML cannot be read"),
        ("[" * 2000, "this YAML cannot be read"),
        ("- dog: the film\n", "line 1: there is no field 'dog'"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    with pytest.raises(ForgetError, match=message) as caught:
        read_concepts(written(tmp_path, "a.yaml", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("path", ["missing.txt", Path("missing"), Path("."), "zero\0.json"])
def test_no_such_file(path):
    with pytest.raises(ForgetError, match="cannot be read"):
        read_concepts(path)


def test_yaml_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ForgetError, match="need the package pyyaml"):
        read_concepts(written(tmp_path, "a.yaml", YAML))
    assert read_concepts(written(tmp_path, "a.json", JSON)) == FOUND
