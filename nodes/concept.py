"""The nodes that name concepts to forget, and what to keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..fmn.concepts.concept import KINDS, Concept
from ..fmn.concepts.concept_list import SUFFIXES, parse_lines, read_concepts
from ..fmn.concepts.keep_list import CHOICES, keep_for
from ..fmn.errors import ForgetError
from ..fmn.patches.embedding_file import Embedding
from .common import file_stamp, lines_of, schema
from .types import Concepts, Keep, Learned

NO_FILE = "none"


class ConceptNode(io.ComfyNode):
    """Names one thing that a model should forget. Chain several to forget them in one run.

    Inputs:
        name: The words that summon the concept, as you type them in prompts. For kind unsafe a
            category: nudity, violence, gore, hate, drugs, self-harm or crime, or unsafe for all of
            them.
        kind: Picks the training prompt: 'a photo of NAME' for identity and object, 'a photo in the
            style of NAME' for style. 'unsafe' uses the terms listed for the category. 'custom' has
            no prompt: write prompts below.
        aliases: Other words for the same thing, one per line, also forgotten.
        prompts: More prompts to train on, one per line. Each must contain the name or an alias.
            Weights such as (name:1.2) work.
        images: Reference pictures of the concept. They need the VAE on the training node. Empty:
            the method decides what it trains on.
        concepts: Concepts to forget together with this one.
        anchor: What is drawn instead, such as 'cat' for 'dog'. Empty: nothing in particular.
            Methods without a target, such as re-steering, ignore it.
        learned: An embedding that still summons the concept on a patched model, from Concept
            Inversion Probe. UCE, RECE, SPEED, OCE and double projections forget it together with
            the name; other methods ignore it.

    Outputs:
        concepts: The concepts that came in, followed by this one.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.String.Input("name", default="dog"),
            io.Combo.Input("kind", options=list(KINDS), default="object"),
            _text_input("aliases"),
            _text_input("prompts"),
            io.Image.Input("images", optional=True),
            Concepts.Input("concepts", optional=True),
            io.String.Input("anchor", default="", optional=True),
            Learned.Input("learned", optional=True),
        ]
        outputs = [Concepts.Output("CONCEPTS", "concepts")]
        return schema(cls, "FMN_Concept", "Concept to Forget", inputs, outputs)

    @classmethod
    def execute(
        cls, name: str, kind: str, aliases: str = "", prompts: str = "",
        images: torch.Tensor | None = None, concepts: Sequence[Concept] | None = None,
        anchor: str = "", learned: Embedding | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        texts = lines_of(aliases), lines_of(prompts)
        vectors = (learned.vectors,) if learned else ()
        concept = Concept(name.strip(), kind, *texts, images, anchor.strip(), vectors)
        return io.NodeOutput([*(concepts or []), concept])


def _text_input(name: str) -> io.Input:
    return io.String.Input(name, default="", multiline=True, optional=True)


class ConceptListNode(io.ComfyNode):
    """Names many things that a model should forget, one per line, here or in a file.

    Inputs:
        text: One concept per line: KIND:NAME | ALIAS -> ANCHOR. The kind (identity, object, style,
            unsafe), aliases (other words for the same thing) and the anchor (what is drawn instead)
            are optional. # begins a comment. At most 10,000 concepts.
        kind: Kind of the lines without one. It picks the training prompt: 'a photo of NAME', or for
            style 'a photo in the style of NAME'.
        concepts: Concepts to forget together with these. They come first.
        file: A list in ComfyUI's input folder, read instead of the text above: lines (.txt), .csv
            with a row of column names, .yaml or .json. none: the text. Refresh (R) to see new
            files.

    Outputs:
        concepts: The concepts that came in, followed by those of the list.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.String.Input(
                "text", default="dog -> cat\nstyle:ink drawing\n# a comment", multiline=True
            ),
            io.Combo.Input(
                "kind",
                options=[kind for kind in KINDS if kind != "custom"],
                default="object",
                optional=True,
            ),
            Concepts.Input("concepts", optional=True),
            io.Combo.Input(
                "file", options=[NO_FILE, *_list_files()], default=NO_FILE, optional=True
            ),
        ]
        outputs = [Concepts.Output("CONCEPTS", "concepts")]
        return schema(cls, "FMN_ConceptList", "Concepts to Forget (List)", inputs, outputs)

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, **inputs: Any) -> str:
        return file_stamp(_list_path(file) if file in _list_files() else None)

    @classmethod
    def execute(
        cls, text: str, kind: str = "object", concepts: Sequence[Concept] | None = None,
        file: str = NO_FILE,
    ) -> io.NodeOutput:  # fmt: skip
        if file == NO_FILE:
            listed = parse_lines(text, kind)
        else:
            listed = read_concepts(_list_path(file), kind)
        return io.NodeOutput([*(concepts or []), *listed])


def _list_files() -> list[str]:
    """Names of the lists in ComfyUI's input folder."""
    files = Path(folder_paths.get_input_directory()).glob("[!.]*")
    return sorted(path.name for path in files if path.suffix.lower() in SUFFIXES)


def _list_path(name: str) -> Path:
    if name not in _list_files():
        raise ForgetError(
            f"There is no list '{name}' in the input folder: put the file there and choose it."
        )
    return Path(folder_paths.get_input_directory()) / name


class KeepListNode(io.ComfyNode):
    """Names what a model should keep while it forgets: your own words and a built-in list, without
    what is to be forgotten.

    Inputs:
        concepts: What is to be forgotten. It is left out of the list.
        list: A built-in list. auto: chosen by the concepts' kinds. none: only your own words.
            common: everyday things. styles: styles and media. artists: painters of the past.
            people: people by role, and some historical ones.
        words: Your own words or prompts to keep, one per line, such as close neighbours of what is
            forgotten. They come first. Empty: only the list.

    Outputs:
        keep: Your words and the list, for keep on the training nodes.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            Concepts.Input("concepts"),
            io.Combo.Input("list", options=list(CHOICES), default="auto"),
            _text_input("words"),
        ]
        outputs = [Keep.Output("KEEP", "keep")]
        return schema(cls, "FMN_KeepList", "Keep List", inputs, outputs)

    @classmethod
    def execute(cls, concepts: Sequence[Concept], list: str, words: str = "") -> io.NodeOutput:
        return io.NodeOutput(keep_for(concepts, words.splitlines(), list))


NODES = [ConceptNode, ConceptListNode, KeepListNode]
