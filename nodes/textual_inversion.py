"""Textual inversion: words learned from pictures."""

import inspect
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.patches.embedding_file import embedding_of, save_embedding
from ..fmn.training.textual_inversion import Settings, invert
from .common import clip_input, described, file_names, lines_of, schema, seed_input, vae_input
from .page import text_output
from .progress import InversionProgress
from .types import Learned

FOLDER = "embeddings"
# What a prompt can name after "embedding:".
NAME = re.compile(r"[A-Za-z0-9_-]{1,80}(/[A-Za-z0-9_-]{1,80})*")


class TextualInversion(io.ComfyNode):
    """Learns a few new words from pictures (Gal et al. 2022) and saves them, so that prompts can
    use them as embedding:NAME. The model does not change.

    Inputs:
        model: Stable Diffusion 1.x or 2.x, with its LoRAs and patches.
        images: Pictures of what the words should mean.
        name: Name of the file in models/embeddings, with / for folders: letters, digits, - and _.
            An existing file is never overwritten.

    Outputs:
        token: What to write in a prompt: embedding: and the name.
        embedding: What was learned, for learned on Concept to Forget.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            vae_input(),
            io.Image.Input("images"),
            io.String.Input("name", default="my-concept"),
            *inversion_inputs(),
        ]
        outputs = learned_outputs()
        return schema(
            cls, "FMN_TextualInversion", "Textual Inversion", inputs, outputs, is_output_node=True
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, images: torch.Tensor, name: str,
        **widgets: Any,
    ) -> io.NodeOutput:  # fmt: skip
        name, settings = name.strip(), inversion_settings(**widgets)
        path, host = embedding_path(name), ComfyModel(model, clip, vae)
        fingerprint = refuse_early(host)
        on_step = InversionProgress(settings.steps).training(name)
        with host.borrow_denoiser() as denoiser:
            learned = invert(host, denoiser, images, settings, on_step)
        record = host.family, fingerprint, "textual inversion", asdict(settings), name
        embedding = embedding_of(learned.vectors, learned.losses, *record)
        save_embedding(embedding, path, host.family)
        token = f"embedding:{name}"
        text = f"saved {name}.safetensors in models/{FOLDER}: write {token} in a prompt"
        return io.NodeOutput(token, embedding, ui=text_output(text, token))


def inversion_inputs(most_tokens: int = 8, most_steps: int = 100_000) -> list[io.Input]:
    """The widgets of an inversion.

    Inputs:
        tokens: How many tokens are learned. 1: the least room. 8: can describe the most, and needs
            more steps.
        steps: Training steps of an inversion. 1: hardly more than the start. The default suits the
            demo model; for Stable Diffusion 1.x, published settings are 3000 to 5000.
        lr: AdamW's learning rate. Too low: the tokens stay where they start. Too high: they grow
            far longer than those of real words.
        batch: Noised pictures per step. 1: least memory, noisiest gradients.
        start: Words whose tokens training starts from, such as 'art'. Empty: random tokens.
        templates: Prompts to learn in, one per line, each with one {} for the tokens. Name in them
            what does not belong to the concept. Empty: 'a photo of {}'.
        training_seed: The same seed and settings give the same tokens.
    """
    default, title = Settings(), "learning rate"
    inputs = [
        io.Int.Input("tokens", default=default.tokens, min=1, max=most_tokens),
        io.Int.Input("steps", default=default.steps, min=1, max=most_steps),
        io.Float.Input("lr", title, default=default.lr, min=1e-6, max=1.0, step=1e-6, round=False),
        io.Int.Input("batch", default=default.batch, min=1, max=256),
        io.String.Input("start", default=""),
        io.String.Input("templates", default="\n".join(default.templates), multiline=True),
        seed_input("training_seed"),
    ]
    return described(inspect.getdoc(inversion_inputs) or "", inputs)


def learned_outputs() -> list[io.Output]:
    return [io.String.Output("TOKEN", "token"), Learned.Output("EMBEDDING", "embedding")]


def inversion_settings(start: str, templates: str, training_seed: int, **values: Any) -> Settings:
    """Settings from the widgets of ``inversion_inputs``."""
    if lines := lines_of(templates):
        values["templates"] = lines
    return Settings(start=start.strip(), seed=training_seed, **values)


def refuse_early(host: ComfyModel) -> str:
    """The base's fingerprint; weights and text encoders that cannot be trained through are refused
    before any work is done."""
    with host.borrow_text_encoder():
        host.check_trainable()
        return host.fingerprint()


def embedding_path(name: str) -> Path:
    """Where a new ``embedding:NAME`` goes: ComfyUI's first folder for embeddings.

    Raises:
        ForgetError: a prompt could not use the name, it leads out of the folder, or it is taken.
    """
    if not NAME.fullmatch(name):
        raise ForgetError(
            f"'{name:.60}' cannot name an embedding: use letters, digits, - and _, with / for "
            f"folders inside models/{FOLDER}."
        )
    for file in file_names(FOLDER):
        # ComfyUI looks for a name in subfolders too.
        if f"/{file.rpartition('.')[0]}".endswith(f"/{name}"):
            raise ForgetError(
                f"'embedding:{name}' already means the embedding '{file}': choose another name, or "
                "remove that file."
            )
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


NODES = [TextualInversion]
