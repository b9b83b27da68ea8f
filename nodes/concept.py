"""The nodes that name concepts."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..fmn.concepts.concept import KINDS, Concept
from ..fmn.concepts.concept_list import SUFFIXES, parse_lines, read_concepts
from ..fmn.concepts.keep_list import CHOICES, keep_for
from ..fmn.errors import ForgetError
from .common import lines_of, stamp_of
from .types import CATEGORY, Concepts, Keep, Learned

NO_FILE = "none"


def _list_files():
    """Names of the lists in ComfyUI's input folder."""
    found = Path(folder_paths.get_input_directory()).glob("*")
    return sorted(path.name for path in found if path.suffix.lower() in SUFFIXES)


def _list_path(name):
    if name not in _list_files():
        raise ForgetError(
            f"There is no list '{name}' in the input folder: put the file there and choose it."
        )
    return Path(folder_paths.get_input_directory()) / name


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
                    tooltip="The words that summon the concept, as you type them in prompts. For "
                    "kind unsafe a category: nudity, violence, gore, hate, drugs, self-harm or "
                    "crime, or unsafe for all of them.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="object",
                    tooltip="Picks the training prompt: 'a photo of NAME' for identity and "
                    "object, 'a photo in the style of NAME' for style. 'unsafe' takes a category's "
                    "listed terms for the name. 'custom' has none: write prompts below.",
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
                io.String.Input(
                    "anchor",
                    default="",
                    optional=True,
                    tooltip="What is drawn instead, such as 'cat' for 'dog'. Empty: nothing in "
                    "particular. Methods without a target, such as re-steering, ignore it.",
                ),
                Learned.Input(
                    "learned",
                    optional=True,
                    tooltip="An embedding that still summons the concept on a patched model, from "
                    "Concept Inversion Probe. UCE, RECE, SPEED, OCE and double projections "
                    "forget it along with the name; other methods ignore it.",
                ),
            ],
            outputs=[
                Concepts.Output(
                    "CONCEPTS",
                    display_name="concepts",
                    tooltip="This concept, behind those that came in.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, name, kind, aliases="", prompts="", images=None, concepts=None, anchor="", learned=None
    ):
        texts = lines_of(aliases), lines_of(prompts)
        vectors = (learned.vectors,) if learned else ()
        concept = Concept(name.strip(), kind, *texts, images, anchor.strip(), vectors)
        return io.NodeOutput([*(concepts or []), concept])


class ConceptListNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_ConceptList",
            display_name="Concepts to Forget (List)",
            category=CATEGORY,
            description="Names many things that a model shall forget, one a line, here or in a "
            "file.",
            inputs=[
                io.String.Input(
                    "text",
                    default="dog -> cat\nstyle:ink drawing\n# a comment",
                    multiline=True,
                    tooltip="One concept a line: KIND:NAME | ALIAS -> ANCHOR. The kind (identity, "
                    "object, style, unsafe), aliases (other words for the same thing) and the "
                    "anchor (what is drawn instead) can be left out. # begins a comment. At most "
                    "2000 concepts.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[kind for kind in KINDS if kind != "custom"],
                    default="object",
                    optional=True,
                    tooltip="Kind of the lines that name none. It picks the training prompt: 'a "
                    "photo of NAME', or for style 'a photo in the style of NAME'.",
                ),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Concepts to forget along with these. They come first.",
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *_list_files()],
                    default=NO_FILE,
                    optional=True,
                    tooltip="A list in ComfyUI's input folder: lines (.txt), .csv with a row of "
                    "column names, .yaml or .json. It is read in place of the text above. none: "
                    "the text. New files show up after a refresh (R).",
                ),
            ],
            outputs=[
                Concepts.Output(
                    "CONCEPTS",
                    display_name="concepts",
                    tooltip="The concepts of the list, behind those that came in.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, text, kind="object", concepts=None, file=NO_FILE):
        return stamp_of(_list_path(file) if file in _list_files() else None)

    @classmethod
    def execute(cls, text, kind="object", concepts=None, file=NO_FILE):
        if file == NO_FILE:
            named = parse_lines(text, kind)
        else:
            named = read_concepts(_list_path(file), kind)
        return io.NodeOutput([*(concepts or []), *named])


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


NODES = [ConceptNode, ConceptListNode, KeepListNode]
