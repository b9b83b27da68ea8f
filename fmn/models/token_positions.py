"""Which positions of an encoded prompt belong to the concept, and which end it.

A prompt is one or more sections of 77 CLIP tokens: BOS, words, EOT, padding. Stable Diffusion 1.x
pads with EOT again, 2.x and the second encoder of XL with id 0. Ids that are no integer words
(textual-inversion vectors) are None here and match nothing.
"""

from ..errors import ForgetError

CHUNK = 77
EOS_ID = 49407  # CLIP's <|endoftext|>
END_TOKENS = ("none", "first", "all")


def word_positions(ids):
    """Positions of the prompt's words: after each section's BOS, before its first EOT."""
    words = []
    for start in range(0, len(ids), CHUNK):
        section = ids[start : start + CHUNK]
        end = section.index(EOS_ID) if EOS_ID in section else len(section)
        words += range(start + 1, start + end)
    return words


def subject_positions(ids, subject_ids):
    """Positions of every occurrence of the subject's token run, also across a section's edge.

    Args:
        ids: token ids of the whole prompt.
        subject_ids: token ids of the subject encoded alone.
    """
    run = [subject_ids[i] for i in word_positions(subject_ids)]
    words = word_positions(ids)
    found = set()
    if not run or None in run:
        return []
    for start in range(len(words) - len(run) + 1):
        span = words[start : start + len(run)]
        if [ids[i] for i in span] == run:
            found.update(span)
    return sorted(found)


def end_positions(ids, which):
    """Positions of EOT: ``none``, the ``first`` of each section, or ``all`` that have its id.

    ``all`` is the released rule (``use_pooler``). Where padding is EOT, as in Stable Diffusion
    1.x, it takes in every padding position: 73 of 77 for "a photo of elon musk".
    """
    if which == "none":
        return []
    ends = [i for i, token in enumerate(ids) if token == EOS_ID]
    if which == "first":
        return [i for i in ends if EOS_ID not in ids[i - i % CHUNK : i]]
    return ends


def mentions(prompt, ids, subject_ids):
    """Positions of a prompt's subject.

    Raises:
        ForgetError: it is not in the prompt as the encoder saw it.
    """
    found = subject_positions(ids, subject_ids)
    if not found:
        raise ForgetError(
            f"The tokens of '{prompt.subject}' are not in the encoded prompt '{prompt.text}': "
            "set it apart by spaces, spell it the same way, and keep it whole."
        )
    return found


def flagged_positions(prompt, ids, subject_ids, which_ends):
    """Positions whose attention is to vanish: the subject's and, if asked for, EOT.

    Raises:
        ForgetError: the subject has no tokens, or is not in the prompt as the encoder saw it.
    """
    if not word_positions(subject_ids):
        raise ForgetError(f"The concept '{prompt.subject}' gives no tokens: type some letters.")
    found = mentions(prompt, ids, subject_ids)
    return sorted({*found, *end_positions(ids, which_ends)})
