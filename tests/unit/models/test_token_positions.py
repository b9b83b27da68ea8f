import pytest

from fmn.concepts.concept import Prompt
from fmn.errors import ForgetError
from fmn.models.token_positions import (
    EOS_ID,
    end_positions,
    flagged_positions,
    subject_positions,
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


def flagged(ids, subject, which_ends="none"):
    return flagged_positions(Prompt("some prompt", "a name"), ids, subject, which_ends)


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
    assert subject_positions(sd1(ELON, CAT, MUSK, ELON), sd1(ELON, MUSK)) == []
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
    assert subject_positions(sd1(ELON), sd1(ELON, MUSK)) == []


def test_padding_is_no_word_but_the_same_id_before_eot_is():
    assert subject_positions(sd2(CAT, EXCLAMATION, CAT), sd2(EXCLAMATION)) == [2]
    assert subject_positions(sd2(CAT), sd2(EXCLAMATION)) == []
    # A run must not go on into the padding either.
    assert subject_positions(sd2(CAT), sd2(CAT, EXCLAMATION)) == []


def test_vectors_match_nothing():
    assert subject_positions(sd1(A, None, CAT), sd1(CAT)) == [3]
    assert subject_positions(sd1(A, None), sd1(None)) == []


def test_empty_subject_matches_nothing():
    assert subject_positions(sd1(*PORTRAIT), sd1()) == []
    assert subject_positions(sd1(*PORTRAIT), []) == []


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
