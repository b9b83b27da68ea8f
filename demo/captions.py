"""What the demo model's pictures are called while it trains."""

import torch

BARE = {
    "santa claus", "mrs claus", "saturn", "cherries", "grapes", "scissors", "fire", "bread",
    "broccoli", "corn",
}  # fmt: skip
SOUNDS_VOWEL, SOUNDS_CONSONANT = {"hourglass"}, {"ufo"}
STYLED = (
    "a photo of {} in the style of {}",
    "{}, {}",
    "{1} of {0}",
    "{} in the style of {}",
)
OPEN = ("a photo of {}", "a photo of {}", "a picture of {}", "{}")
STYLE_ONLY = ("{}", "a picture in the style of {}", "a photo in the style of {}")
# A caption without a style means one of these: the model's answer to it is well defined.
OPEN_STYLES = ("noto emoji", "3d render")
EMPTY_SHARE, STYLE_ONLY_SHARE, OPEN_SHARE, ODD_SHARE = 0.10, 0.03, 0.25, 0.25


def with_article(name):
    """'an apple', 'a ufo'; names of persons, plurals and stuff stay bare."""
    if name in BARE:
        return name
    vowel = name[0] in "aeiou" and name not in SOUNDS_CONSONANT or name in SOUNDS_VOWEL
    return f"{'an' if vowel else 'a'} {name}"


def caption(concept, style, generator):
    """A random caption of a picture; ``generator`` is a torch.Generator on the CPU."""
    kind, odd, choice = torch.rand(3, generator=generator).tolist()
    if kind < EMPTY_SHARE:
        return ""
    if kind < EMPTY_SHARE + STYLE_ONLY_SHARE:
        return _pick(STYLE_ONLY, choice).format(style)
    # Names alone, because prompts for forgetting are made of them: "a photo of dog".
    name = with_article(concept)
    if odd < ODD_SHARE:
        name = concept if name != concept else f"a {concept}"
    opened = EMPTY_SHARE + STYLE_ONLY_SHARE + OPEN_SHARE
    if style in OPEN_STYLES and kind < opened:
        return _pick(OPEN, choice).format(name)
    return _pick(STYLED, choice).format(name, style)


def _pick(options, choice):
    return options[int(choice * len(options))]


def every_word(concepts, styles):
    """Texts that together hold every word that captions can hold."""
    texts = [template.format("a", "an") for template in (*STYLED, *OPEN, *STYLE_ONLY)]
    return [*texts, *concepts, *styles]
