"""Sentences that speak of a concept, each beside the same one of its anchor, or of nothing."""

import re

from ..text import with_article
from .concept import TEMPLATES

PLACEHOLDER = "<*>"  # stands in a prompt for input embeddings that are no word's
# Sentence i is frame i with setting i, both taken in turns. Their numbers have no common divisor,
# so all 11 x 20 and 9 x 20 pairs come before any comes again.
FRAMES = (
    "a photo of {} {}", "a painting of {} {}", "{} {}", "a picture of {} {}", "a drawing of {} {}",
    "a close-up of {} {}", "a poster of {} {}", "an illustration of {} {}", "a sketch of {} {}",
    "an old photo of {} {}", "a detailed picture of {} {}",
)  # fmt: skip
SETTINGS = (
    "", "at the beach", "in a forest", "on a table", "in a city at night", "in the snow",
    "with a cat", "in a kitchen", "in black and white", "near a house", "under a tree",
    "with a red car", "in the rain", "on a mountain", "with flowers", "in a museum",
    "beside a river", "with a child", "at sunset", "in an empty room",
)  # fmt: skip
STYLE_FRAMES = (
    "a painting of {1} by {0}", "{1}, {0}", "{1} in the style of {0}", "{0} of {1}",
    "an artwork by {0} that shows {1}", "{1} as {0}", "a picture of {1}, {0} style",
    "{0}, {1}", "a portrait of {1} inspired by {0}",
)  # fmt: skip
THINGS = (
    "a house", "a woman", "a dog", "a forest", "a city at night", "a bowl of fruit", "a ship",
    "a cat", "a bridge", "a mountain", "flowers in a vase", "a man with a hat", "a horse",
    "a street in the rain", "a castle", "a tree", "a child", "a river", "a car", "the sea",
)  # fmt: skip

KEPT_FRAMES = (
    "{}", "a photo of {}", "{}, {}", "{1} of {0}", "{} in the style of {}", "a picture of {}, {}",
)  # fmt: skip
STRIDE = 5  # through the styles: next to each other in the lists are those that look alike


def sentences(concept, count):
    """[(text, anchored text)]: sentences with each name, then the concept's own prompts.

    Without an anchor the other sentence is the same one without the name. Own prompts are read
    literally: parentheses are no weights.
    """
    found = []
    for subject in concept.subjects:
        for i in range(count):
            text, other = (_sentence(concept, name, i) for name in (subject, concept.anchor))
            found.append((text, other))
    own = concept.bare_prompts()[len(concept.subjects) :]
    return found + [(prompt.text, anchored or _without(prompt)) for prompt, anchored in own]


def styled_sentences(concept, styles, count):
    """[(text, anchored text)]: sentences like the kept ones in styles; none for a style."""
    if concept.kind == "style" or not styles:
        return []
    found = []
    for subject in concept.subjects:
        for i in range(count):
            style = styles[(i * STRIDE + len(subject)) % len(styles)]
            names = subject, concept.anchor
            if i % 2:
                names = with_article(subject), concept.anchor and with_article(concept.anchor)
            texts = [KEPT_FRAMES[2 + i % 4].format(name, style) for name in names]
            found.append(tuple(map(_tidy, texts)))
    return found


def _tidy(text):
    """Without the spaces and the comma in front that a missing name leaves."""
    return " ".join(text.split()).replace(" ,", ",").removeprefix(", ")


def _sentence(concept, name, i):
    style = concept.kind == "style"
    frames, others = (STYLE_FRAMES, THINGS) if style else (FRAMES, SETTINGS)
    names = [*concept.subjects, *filter(None, [concept.anchor])]
    # Whoever forgets "cat" must not find "with a cat" in both sentences.
    others = [each for each in others if not any(_holds(each, one) for one in names)]
    return " ".join(frames[i % len(frames)].format(name, others[i % len(others)]).split())


def _holds(text, name):
    return re.search(rf"\b{re.escape(name)}\b", text, flags=re.I) is not None


def kept_sentences(words, styles, count):
    """``count`` sentences of kept words, some of them in a style; the empty prompt comes first.

    Spread evenly over the words. What a patch keeps should look like what people type: words in
    sentences, beside other words.
    """
    forms = KEPT_FRAMES if styles else KEPT_FRAMES[:2]
    found = [""]
    for i in range(count if words else 0):
        style = styles[(i * STRIDE + i // len(styles)) % len(styles)] if styles else ""
        word = words[i * len(words) // count]
        word = word if i % len(forms) == 0 else with_article(word)
        found.append(forms[i % len(forms)].format(word, style))
    return found


def together(words, count):
    """Words in groups of up to ``count``, from all over the list, as one word each: "a, b, c"."""
    groups = -(-len(words) // count)
    if groups == len(words):
        return list(words)
    return [", ".join(map(with_article, words[i::groups])) for i in range(groups)]


def _without(prompt):
    """A concept's own prompt without the name."""
    return " ".join(re.sub(re.escape(prompt.subject), "", prompt.text, flags=re.I).split())


def blanked(concept, count):
    """Prompts with ``PLACEHOLDER`` for the name: the template, the own ones, ``count`` more."""
    names = "|".join(re.escape(name) for name in sorted(concept.subjects, key=len, reverse=True))
    template = TEMPLATES.get(concept.kind, "{}").format(PLACEHOLDER)
    own = [prompt.text for prompt, _ in concept.bare_prompts()[len(concept.subjects) :]]
    own = [re.sub(rf"\b({names})\b", PLACEHOLDER, text, flags=re.I) for text in own]
    more = [_sentence(concept, PLACEHOLDER, i) for i in range(count)]
    return tuple(dict.fromkeys(text for text in (template, *own, *more) if PLACEHOLDER in text))
