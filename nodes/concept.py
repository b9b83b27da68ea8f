"""The Concept node."""

from comfy_api.latest import io

from ..fmn.concept import KINDS, Concept
from .types import CATEGORY, Concepts


def _lines(text):
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class ConceptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_Concept",
            display_name="Concept to Forget",
            category=CATEGORY,
            description="Names one thing that a model shall forget. Chain several to forget them "
            "in one run.",
            inputs=[
                io.String.Input(
                    "name",
                    default="dog",
                    tooltip="The words that summon the concept, as you type them in prompts.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="object",
                    tooltip="Picks the training prompt: 'a photo of NAME' for identity and "
                    "object, 'a photo in the style of NAME' for style. 'custom' has none: write "
                    "prompts below.",
                ),
                io.String.Input(
                    "aliases",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Other words for the same thing, one a line. They are forgotten too.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="More prompts to train on, one a line. Each must contain the name or "
                    "an alias. Weights like (name:1.2) work.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Reference pictures of the concept. They need the VAE on the training "
                    "node. Without them the method decides what it trains on.",
                ),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Concepts to forget along with this one.",
                ),
            ],
            outputs=[Concepts.Output("CONCEPTS", display_name="concepts")],
        )

    @classmethod
    def execute(cls, name, kind, aliases="", prompts="", images=None, concepts=None):
        concept = Concept(name.strip(), kind, _lines(aliases), _lines(prompts), images)
        return io.NodeOutput([*(concepts or []), concept])


NODES = [ConceptNode]
