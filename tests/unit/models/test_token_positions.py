import pytest

from fmn.concepts.concept import Prompt
from fmn.errors import ForgetError
from fmn.hosts.diffusers.load import make_tokenizer
from fmn.models.token_positions import (
    EOS_ID,
    end_positions,
    flagged_positions,
    mentions,
    word_positions,
)

from ..tiny import BOS, sections

A, PHOTO, OF, ELON, MUSK, CAT = 320, 1125, 539, 20406, 19063, 2368
EXCLAMATION = 0  # CLIP's id of "!", and what Stable Diffusion 2.x pads with
PORTRAIT = A, PHOTO, OF, ELON, MUSK


def sd1(*words):
    return sections(words, EOS_ID)


def sd2(*words):
    return sections(words, 0)


PROMPT = Prompt("some prompt", "a name")


def flagged(ids, subject, which_ends="none"):
    return flagged_positions(lambda p: ids if p == PROMPT else subject, PROMPT, which_ends)


def subject_positions(ids, subject):
    found = mentions(lambda p: ids if p == PROMPT else subject, PROMPT)
    return sorted({position for mention in found for position in mention})


def missing(ids, subject):
    with pytest.raises(ForgetError, match="are not in the encoded prompt"):
        subject_positions(ids, subject)
    return True


@pytest.mark.parametrize("section", [sd1, sd2])
def test_words_end_at_the_first_eot(section):
    assert word_positions(section(*PORTRAIT)) == [1, 2, 3, 4, 5]
    assert word_positions(section()) == []
    assert word_positions([]) == []


def test_words_of_a_section_without_eot():
    assert word_positions([BOS, *[CAT] * 76]) == list(range(1, 77))


def test_words_of_several_sections():
    ids = sd2(*[CAT] * 76)
    assert len(ids) == 154
    assert word_positions(ids) == [*range(1, 76), 78]


@pytest.mark.parametrize("section", [sd1, sd2])
def test_subject_of_several_tokens(section):
    assert subject_positions(section(*PORTRAIT), section(ELON, MUSK)) == [4, 5]


def test_only_whole_runs_count():
    assert missing(sd1(ELON, CAT, MUSK, ELON), sd1(ELON, MUSK))
    assert subject_positions(sd1(MUSK, ELON, ELON, MUSK), sd1(ELON, MUSK)) == [3, 4]


def test_every_occurrence_counts():
    assert subject_positions(sd1(CAT, A, CAT, OF, CAT), sd1(CAT)) == [1, 3, 5]


def test_occurrences_may_overlap():
    assert subject_positions(sd1(CAT, A, CAT, A, CAT), sd1(CAT, A, CAT)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("section", [sd1, sd2])
def test_subject_across_the_edge_of_two_sections(section):
    ids = section(*[CAT] * 74, ELON, MUSK, CAT)
    assert subject_positions(ids, section(ELON, MUSK)) == [75, 78]


def test_subject_in_every_section():
    ids = sd1(ELON, MUSK, *[CAT] * 75, ELON, MUSK)
    assert subject_positions(ids, sd1(ELON, MUSK)) == [1, 2, 80, 81]


def test_subject_longer_than_the_prompt():
    assert missing(sd1(ELON), sd1(ELON, MUSK))


def test_padding_is_no_word_but_the_same_id_before_eot_is():
    assert subject_positions(sd2(CAT, EXCLAMATION, CAT), sd2(EXCLAMATION)) == [2]
    assert missing(sd2(CAT), sd2(EXCLAMATION))
    # A run must not go on into the padding either.
    assert missing(sd2(CAT), sd2(CAT, EXCLAMATION))


def test_vectors_match_nothing():
    assert subject_positions(sd1(A, None, CAT), sd1(CAT)) == [3]
    assert missing(sd1(A, None), sd1(None))


def test_end_positions():
    ids = sd1(CAT)
    assert end_positions(ids, "none") == []
    assert end_positions(ids, "first") == [2]
    assert end_positions(ids, "all") == list(range(2, 77))
    assert end_positions(sd2(CAT), "all") == [2]


def test_end_positions_of_several_sections():
    ids = sd1(*[CAT] * 76)
    assert end_positions(ids, "first") == [76, 79]
    assert end_positions(ids, "all") == [76, *range(79, 154)]
    assert end_positions(sd2(*[CAT] * 76), "all") == [76, 79]


@pytest.mark.parametrize(
    "section, which, count",
    # papers.md 1.6: with use_pooler the name and one EOT on SD 2.x, 73 of 77 on SD 1.x.
    [
        (sd2, "none", 2), (sd2, "first", 3), (sd2, "all", 3),
        (sd1, "none", 2), (sd1, "first", 3), (sd1, "all", 73),
    ],
)  # fmt: skip
def test_flagged_positions_of_a_photo_of_elon_musk(section, which, count):
    positions = flagged(section(*PORTRAIT), section(ELON, MUSK), which)
    assert len(positions) == count
    assert positions == [4, 5, *range(6, 6 + count - 2)]


def test_flagged_positions_are_sorted_across_sections():
    ids = sd1(*[CAT] * 75, ELON, MUSK)
    assert flagged(ids, sd1(ELON, MUSK), "first") == [76, 78, 79, 80]


def test_subject_that_is_not_in_the_prompt():
    with pytest.raises(ForgetError, match="tokens of 'a name' are not in .* 'some prompt'"):
        flagged(sd1(A, PHOTO, OF, CAT), sd1(ELON, MUSK))


def test_subject_that_was_cut_off():
    cut = sd1(*[CAT] * 74, ELON, MUSK)[:77]
    with pytest.raises(ForgetError, match="keep it whole"):
        flagged(cut, sd1(ELON, MUSK), "all")


def test_subject_without_tokens():
    with pytest.raises(ForgetError, match="'a name' gives no tokens"):
        flagged(sd1(CAT), sd1())


TOKENIZER = make_tokenizer("<|endoftext|>")


def tokenize(prompt):
    return TOKENIZER(prompt.words, padding="max_length", max_length=77).input_ids


def mentioned(text, subject, plain=True):
    """The tokens of each mention, as CLIP writes them."""
    prompt = Prompt(text, subject, plain)
    ids = tokenize(prompt)
    found = mentions(tokenize, prompt)
    return [TOKENIZER.convert_ids_to_tokens([ids[i] for i in each]) for each in found]


NAME = ["harry</w>", "con", "nick</w>", "jr</w>"]
WHAM = ["w", "ham</w>"]
JOINED = {
    "comma": ("a song by Harry Connick Jr., live", "Harry Connick Jr.", [[*NAME, ".,</w>"]]),
    "alone": ("a song by Harry Connick Jr.", "Harry Connick Jr.", [[*NAME, ".</w>"]]),
    "exclamation": ("Wham!, a band", "Wham!", [[*WHAM, "!,</w>"]]),
    "both": ("WHAM! at night, wham!, by day", "Wham!", [[*WHAM, "!</w>"], [*WHAM, "!,</w>"]]),
    "more behind": ("(Wham!!!)", "Wham!", [[*WHAM, "!!!)</w>"]]),
    "parentheses": (
        "name (series), flowers", "name (series)",
        [["name</w>", "(</w>", "series</w>", "),</w>"]],
    ),
    "in front": (
        '"$uicideboy$" on stage', "$uicideboy$",
        [["$</w>", "u", "ici", "de", "boy</w>", "$", '"</w>']],
    ),
    "joined in front": ("...@home", "@home", [["...@</w>", "home</w>"]]),
    "underscore": ("snake_, x", "snake_", [["snake</w>", "_,</w>"]]),
    "letters stay apart": ("a dog, a dog.", "dog", [["dog</w>"], ["dog</w>"]]),
}  # fmt: skip


@pytest.mark.parametrize("text, subject, tokens", JOINED.values(), ids=JOINED)
def test_punctuation_that_clip_joins_to_a_name(text, subject, tokens):
    assert mentioned(text, subject) == tokens


def test_escaped_parentheses_of_a_prompt_are_the_names():
    text = r"(hatsune miku \(vocaloid\), smiling:1.2)"
    assert mentioned(text, "hatsune miku (vocaloid)", plain=False)[0][-1] == "),</w>"


def test_letters_behind_a_name_make_another_word():
    with pytest.raises(ForgetError, match="set it apart"):
        mentioned("dogs!", "dog")
