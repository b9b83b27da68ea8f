"""The node that names what must stay."""

from comfy_api.latest import io

from ..fmn.keep import CHOICES, keep_for
from .types import CATEGORY, Concepts, Keep


class KeepListNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_KeepList",
            display_name="Keep List",
            category=CATEGORY,
            description="Names what a model shall keep while it forgets: your own words and a list "
            "that comes along, without what is forgotten.",
            inputs=[
                Concepts.Input(
                    "concepts",
                    tooltip="What is to be forgotten. It is left out of the list.",
                ),
                io.Combo.Input(
                    "list",
                    options=list(CHOICES),
                    default="auto",
                    tooltip="A list that comes along. auto: by the concepts' kinds. none: only "
                    "your own words. common: everyday things. styles: styles and media. artists: "
                    "painters of the past. people: people by role, and some of history.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own words or prompts to keep, one a line, such as close "
                    "neighbours of what is forgotten. They go first. Empty: only the list.",
                ),
            ],
            outputs=[
                Keep.Output(
                    "KEEP",
                    display_name="keep",
                    tooltip="Your words and the list, for keep on the training nodes.",
                )
            ],
        )

    @classmethod
    def execute(cls, concepts, list, words=""):
        return io.NodeOutput(keep_for(concepts, words.splitlines(), list))


NODES = [KeepListNode]
