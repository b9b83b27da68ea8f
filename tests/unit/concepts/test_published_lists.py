"""Lists as people have them: marks, other separators, and the formats of other projects."""

import re

import pytest

from fmn.concepts.concept import Concept
from fmn.concepts.concept_list import parse_lines, read_concepts
from fmn.errors import ForgetError


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def names_of(found):
    return [one.name for one in found]


@pytest.mark.parametrize(
    "text",
    [
        "- van gogh\n- picasso", "* van gogh\n* picasso", "1. van gogh\n2. picasso",
        "1) van gogh\n\n2) picasso", "\u2022 van gogh\n\u2022 picasso", "\u2013 van gogh\npicasso",
        "van\u00a0gogh\u200b\n\ufeffpicasso", "\ufeff- van gogh\n\u200bobject:picasso",
        '["van gogh", "picasso"]',
    ],
)  # fmt: skip
def test_marks_of_a_list_are_no_part_of_a_name(text):
    assert parse_lines(text) == [Concept("van gogh"), Concept("picasso")]


def test_what_only_looks_like_a_mark_stays():
    text = "1. FC Köln\n2 fast 2 furious\n-ism\n10,000 Maniacs\nParis, Texas\nSteins;Gate"
    assert names_of(parse_lines(text)) == text.splitlines()


def test_kinds_in_capitals(tmp_path):
    assert parse_lines("Style:anime\nOBJECT: dog") == [Concept("anime", "style"), Concept("dog")]
    table = written(tmp_path, "a.csv", "name,kind\nmonet, Style \nmax,Identity")
    assert [one.kind for one in read_concepts(table)] == ["style", "identity"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("van gogh; picasso", "several names: give each concept its own line"),
        ("van gogh;picasso;monet", "several names"),
        ("style:van gogh ; picasso", "several names"),
        ("Aaron Douglas,actor", "more than a name: .* UCE's list"),
        ("Abbott Fuller Graves,realism,painter", "more than a name"),
        ("dog,cat", "more than a name"),
        ("anime:style", "write 'style:anime'"),
        ("Max : Identity", "write .identity:Max."),
        ("dog: Object", "write 'object:dog'"),
    ],
)
def test_lines_that_mean_something_else(text, message):
    try:
        found = parse_lines(f"fox\n{text}")
    except ForgetError as error:
        assert re.search(f"Line 2: .*({message})", str(error)) and len(str(error)) < 300
    else:
        raise AssertionError(found)


PUBLISHED = {  # file: content, what it names
    "artists1734_prompts.csv": (
        ",case_number,prompt,evaluation_seed,artist\n"
        "0,0,Image in the style of A.J.Casson,2657,A.J.Casson\n"
        "1,1,Art inspired by A.J.Casson,2976,A.J.Casson\n"
        '2,2,"A field, in Van Gogh\'s style",3,Van Gogh\n',
        [Concept("A.J.Casson", "style"), Concept("Van Gogh", "style")],
    ),
    "profession.csv": (
        "case_number,prompt,evaluation_seed,profession\n0,Image of Doctor,1,Doctor\n",
        [Concept("Doctor")],
    ),
    "erased-artists.txt": (
        '["Albert Watson", "Antonio J. Manzanedo"]',
        [Concept("Albert Watson"), Concept("Antonio J. Manzanedo")],
    ),
    "erase_cele.yaml": (
        "MACE:\n  # primary\n  multi_concept:\n  - [\n    ['adam-driver', 'object'],\n"
        "    ['brent-heighton', 'style'],\n  ]\n  use_pooler: true\n  mapping_concept: \n"
        "    - 'a person'\n    - 'art'\n  learning_rate: 1.0e-04\n",
        [
            Concept("adam driver", anchor="a person"),
            Concept("brent heighton", "style", anchor="art"),
        ],
    ),
    "paraphrase.json": (
        '{"airplane": ["aircraft", "plane"], "bird": ["avian"]}',
        [Concept("airplane", aliases=("aircraft", "plane")), Concept("bird", aliases=("avian",))],
    ),
    "prompt.yaml": (
        '- target: "snoopy"\n  positive: "snoopy"\n  unconditional: ""\n  neutral: "a dog"\n'
        '  action: "erase_with_la"\n  guidance_scale: "1.0"\n  la_strength: 1000\n',
        [Concept("snoopy", anchor="a dog")],
    ),
    "prompts.yaml": (
        '- target: "van gogh" # the word\n  positive: "van gogh"\n  unconditional: ""\n'
        '  neutral: ""\n  action: "erase"\n  bucketing: false\n- target: cat\n',
        [Concept("van gogh"), Concept("cat")],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists(tmp_path, name):
    content, expected = PUBLISHED[name]
    assert read_concepts(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", ",type,prompt,evaluation_seed\n0,erased,A portrait of X,1", "table of prompts"),
        ("a.yaml", "- target: 1girl\n  positive: '1girl, cat ears'\n  action: enhance", "enhance"),
        ("a.yaml", "- target: woman\n  positive: hat", "'hat' from 'woman': .* erase_from"),
        ("a.yaml", "- target: [x]\n  action: [erase]", "action is"),
        ("a.yaml", "- target: [x]\n  positive: {y: z}", "erases"),
        ("a.yaml", "- target: [x]", "name is a list"),
        ("a.yaml", "MACE:\n  multi_concept: bird", "as MACE has it"),
        ("a.yaml", "MACE:\n  multi_concept: [[[bird]]]", "as MACE has it"),
        ("a.yaml", "multi_concept: [[[bird, object]]]\nmapping_concept: [a, b]", "2 anchors for 1"),
        ("a.yaml", "multi_concept: [[[bird, object]]]\nmapping_concept: [5]", "anchor is a number"),
        ("a.yaml", "MACE: 5", "not a list"),
        ("a.json", "{}", "not a list"),
        ("a.json", '{"dog": 5}', "not a list"),
        ("a.json", '{"dog": [5]}', "an entry of aliases is a number"),
        ("a.yaml", "5: [dog]", "name is a number"),
    ],
)
def test_published_lists_that_do_not_fit(tmp_path, name, content, message):
    with pytest.raises(ForgetError, match=message) as caught:
        read_concepts(written(tmp_path, name, content))
    assert len(str(caught.value)) < 300
