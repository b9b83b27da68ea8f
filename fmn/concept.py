"""What is to be forgotten, and the prompts that speak of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import ForgetError

KINDS = ("identity", "object", "style", "custom")

# The two templates of the released Forget-Me-Not code (SHI-Labs/Forget-Me-Not, train_attn.py);
# identities use the object's.
TEMPLATES = {
    "identity": "a photo of {}",
    "object": "a photo of {}",
    "style": "a photo in the style of {}",
}


class Prompt(NamedTuple):
    """A prompt and the words in it that name the concept."""

    text: str
    subject: str
    plain: bool = True  # the text is literal: parentheses are not weights


@dataclass(frozen=True)
class Concept:
    """One thing to forget.

    Attributes:
        name: the words that summon it, as users type them.
        kind: one of ``KINDS``; picks the prompt template. ``custom`` has none and needs prompts.
        aliases: other words for the same thing, forgotten along with the name.
        prompts: further prompts to train on; each must contain the name or an alias. They may use
            the host's prompt syntax, such as weights in ComfyUI.
        images: reference pictures, float [N, H, W, 3] in 0..1, or None.
    """

    name: str
    kind: str = "object"
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    images: object = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if not self.name.strip():
            raise ForgetError("The concept's name is empty: type the words to forget.")
        if not all(alias.strip() for alias in self.aliases):
            raise ForgetError(f"An alias of '{self.name}' is empty: type a name or remove it.")
        if self.kind not in KINDS:
            raise ForgetError(f"Unknown kind '{self.kind}': choose one of {', '.join(KINDS)}.")
        if self.kind == "custom" and not self.prompts:
            raise ForgetError(
                f"Concept '{self.name}' is of kind custom, which has no prompt template: "
                "add at least one prompt that contains it, or choose another kind."
            )

    @property
    def subjects(self):
        return (self.name, *self.aliases)

    def training_prompts(self):
        """The template filled with the name and every alias, then the concept's own prompts."""
        made = []
        if self.kind in TEMPLATES:
            template = TEMPLATES[self.kind]
            made = [Prompt(template.format(subject), subject) for subject in self.subjects]
        return made + [self._own(text) for text in self.prompts]

    def _own(self, text):
        # Longest first, so that an alias that contains the name is taken whole.
        plain = text.replace("\\(", "(").replace("\\)", ")").lower()
        for subject in sorted(self.subjects, key=len, reverse=True):
            if subject.lower() in plain:
                return Prompt(text, subject, plain=False)
        raise ForgetError(
            f"The prompt '{text}' does not contain the concept '{self.name}': "
            "write the name or one of its aliases into it, or remove the prompt."
        )

    def describe(self):
        """What a patch file says of the concept: everything but the pictures."""
        lists = {"aliases": list(self.aliases), "prompts": list(self.prompts)}
        return {"name": self.name, "kind": self.kind} | lists


def parse_concept(text, kind="object", **more):
    """Read ``kind:name`` or a bare name, e.g. ``style:ink drawing``; ``more`` goes to Concept."""
    prefix, colon, name = text.partition(":")
    if colon and prefix.strip() in KINDS:
        return Concept(name.strip(), prefix.strip(), **more)
    return Concept(text.strip(), kind, **more)
