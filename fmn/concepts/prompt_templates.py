"""Prompts that name a concept, each beside the same prompt with its anchor, or without the name."""

import re
from collections.abc import Sequence

from ..sequences import evenly
from ..text import with_article
from .concept import TEMPLATES, Concept, Prompt
from .prompt_syntax import words_of_prompt

PLACEHOLDER = "<*>"  # stands in a prompt for input embeddings that belong to no word
# Prompt i is template i with setting i, both taken in turns. Their counts have no common divisor,
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
STRIDE = 5  # through the styles: neighbours in the lists look alike


def fill(template: str, words: str) -> str:
    """A user's template with the words for {}; other braces stay as they are."""
    return template.replace("{}", words)


def sentences(concept: Concept, count: int) -> list[tuple[str, str]]:
    """[(prompt, anchored prompt)]: ``count`` for each name, then the concept's own prompts.

    Without an anchor the second is the same prompt without the name. Own prompts lose their
    weights.
    """
    pairs: list[tuple[str, str]] = []
    anchored = _prompts(concept, concept.anchor, count)
    for subject in concept.subjects:
        pairs += zip(_prompts(concept, subject, count), anchored)
    own = concept.own_prompts()
    return pairs + [(p.words, words_of_prompt(anchored) or _without_name(p)) for p, anchored in own]


def _prompts(concept: Concept, name: str, count: int) -> list[str]:
    """``count`` prompts with a name in the concept's place."""
    style = concept.kind == "style"
    frames, contexts = (STYLE_FRAMES, THINGS) if style else (FRAMES, SETTINGS)
    # Whoever forgets "cat" must not find "with a cat" in both prompts.
    names = "|".join(map(re.escape, (*concept.subjects, *filter(None, [concept.anchor]))))
    named = re.compile(rf"(?<!\w)(?:{names})(?!\w)", flags=re.IGNORECASE)
    others = [context for context in contexts if not named.search(context)]
    filled = [frames[i % len(frames)].format(name, others[i % len(others)]) for i in range(count)]
    return [" ".join(prompt.split()) for prompt in filled]


def styled_sentences(concept: Concept, styles: Sequence[str], count: int) -> list[tuple[str, str]]:
    """[(prompt, anchored prompt)] as in ``kept_sentences`` with a style; none for a style."""
    if concept.kind == "style" or not styles:
        return []
    pairs = []
    for subject in concept.subjects:
        for i in range(count):
            style = styles[(i * STRIDE + len(subject)) % len(styles)]
            names = subject, concept.anchor
            if i % 2:
                names = with_article(subject), concept.anchor and with_article(concept.anchor)
            frame = KEPT_FRAMES[2 + i % 4]
            prompt, anchored = (_tidy(frame.format(name, style)) for name in names)
            pairs.append((prompt, anchored))
    return pairs


def _tidy(text: str) -> str:
    """Without the spaces and the comma in front that a missing name leaves."""
    return " ".join(text.split()).replace(" ,", ",").removeprefix(", ")


def kept_sentences(words: Sequence[str], styles: Sequence[str], count: int) -> list[str]:
    """The empty prompt and ``count`` prompts with kept words, some of them in a style.

    Spread evenly over the words. What a patch keeps should look like what people type: words in
    sentences, beside other words.
    """
    frames = KEPT_FRAMES if styles else KEPT_FRAMES[:2]
    prompts = [""]
    for i, word in enumerate(evenly(words, count if words else 0)):
        style = styles[(i * STRIDE + i // len(styles)) % len(styles)] if styles else ""
        word = word if i % len(frames) == 0 else with_article(word)
        prompts.append(frames[i % len(frames)].format(word, style))
    return prompts


def together(words: Sequence[str], count: int) -> list[str]:
    """Words in groups of up to ``count`` from all over the list, each group as "a, b, c"."""
    groups = -(-len(words) // count)
    if groups == len(words):
        return list(words)
    return [", ".join(map(with_article, words[i::groups])) for i in range(groups)]


def _without_name(prompt: Prompt) -> str:
    """A concept's own prompt without the name."""
    name = re.escape(prompt.subject)
    return " ".join(re.sub(name, "", prompt.words, flags=re.IGNORECASE).split())


def blanked(concept: Concept, count: int) -> tuple[str, ...]:
    """Prompts with ``PLACEHOLDER`` for the name: the template, the own ones, ``count`` more."""
    names = "|".join(re.escape(name) for name in sorted(concept.subjects, key=len, reverse=True))
    named = re.compile(rf"(?<!\w)({names})(?!\w)", flags=re.IGNORECASE)
    template = fill(TEMPLATES.get(concept.kind, "{}"), PLACEHOLDER)
    own = [named.sub(PLACEHOLDER, prompt.words) for prompt, _ in concept.own_prompts()]
    prompts = (template, *own, *_prompts(concept, PLACEHOLDER, count))
    return tuple(dict.fromkeys(prompt for prompt in prompts if PLACEHOLDER in prompt))
