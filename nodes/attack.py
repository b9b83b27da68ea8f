"""Nodes that try to bring a forgotten concept back."""

from dataclasses import asdict
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..fmn.closed_form.adversarial_embedding import hardest
from ..fmn.concepts.concept import Prompt
from ..fmn.concepts.prompt_templates import PLACEHOLDER, fill
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.models.image_sampler import ImageSampler, open_sampler
from ..fmn.models.interface import Text
from ..fmn.models.sampling import Sampling
from ..fmn.patches.embedding_file import embedding_of, save_embedding
from ..fmn.patches.patch import ForgetPatch
from ..fmn.training.textual_inversion import Settings, invert
from .common import advanced, clip_input, schema, strength_input, vae_input
from .page import text_output
from .progress import InversionProgress, stop_if_cancelled
from .textual_inversion import (
    embedding_path,
    inversion_inputs,
    inversion_settings,
    learned_outputs,
    refuse_early,
)
from .types import Patch


class ConceptInversionProbe(io.ComfyNode):
    """Tries to bring a forgotten concept back: learns tokens for its pictures on the model that
    forgot it, and draws with them (Pham et al. 2023). If the concept shows, the model has forgotten
    only its name.

    Inputs:
        model: The model that forgot; or the untouched one, with the patch below.
        images: Pictures of the concept, such as the untouched model draws.
        words: The concept's name. The same prompts are drawn with it, to compare.
        pictures: How many pictures are drawn with the tokens, and as many by name, using the
            templates in turn (20 steps, guidance 7).
        save_as: Name of a file in models/embeddings for the tokens. Empty: no file is saved, and
            the token output is empty.
        patch: Applied to the model for the probe.
        strength: Strength of the patch. 0: the untouched model. Ignored without a patch.

    Outputs:
        by learned tokens: What the model draws with the learned tokens. Does the concept show?
        by name: The same prompts and noise with the concept's name, to compare.
        token: What to write in a prompt: embedding: and the name. Empty without save_as.
        embedding: What was learned, for learned on Concept to Forget.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        tokens, steps, *training = inversion_inputs()
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            vae_input(),
            io.Image.Input("images"),
            io.String.Input("words", default="dog"),
            tokens,
            steps,
            *advanced(*training),
            io.Int.Input("pictures", default=4, min=1, max=64),
            io.String.Input("save_as", default=""),
            Patch.Input("patch", optional=True),
            strength_input(optional=True),
        ]
        outputs = [
            io.Image.Output("LEARNED", "by learned tokens"),
            io.Image.Output("NAMED", "by name"),
            *learned_outputs(),
        ]
        return schema(cls, "FMN_ConceptInversionProbe", "Concept Inversion Probe", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, images: torch.Tensor, words: str,
        pictures: int, save_as: str, patch: ForgetPatch | None = None, strength: float = 1.0,
        **widgets: Any,
    ) -> io.NodeOutput:  # fmt: skip
        words, name, settings = words.strip(), save_as.strip(), inversion_settings(**widgets)
        if not words:
            raise ForgetError("The concept's words are empty: type its name, to compare with.")
        path, host = embedding_path(name) if name else None, ComfyModel(model, clip, vae)
        fingerprint = refuse_early(host)
        progress = InversionProgress(settings.steps + 2 * pictures)
        on_pictures = progress.drawing(words, 2 * pictures)
        patches = [] if patch is None else [(patch, strength)]
        with (
            open_sampler(host, Sampling(), 4, on_pictures, trained=True) as sampler,
            sampler.applying(patches),
        ):
            on_step = progress.training(words)
            learned = invert(host, sampler.denoiser, images, settings, on_step)
            drawn = _draw_both(host, sampler, learned.vectors, words, pictures, settings)
        record = host.family, fingerprint, "concept inversion", asdict(settings), words
        embedding = embedding_of(learned.vectors, learned.losses, *record)
        if path is not None:
            save_embedding(embedding, path, host.family)
        text = f"{words}: does it show? Compare the pictures by learned tokens and by name"
        token = f"embedding:{name}" if name else ""
        return io.NodeOutput(*drawn, token, embedding, ui=text_output(text))


def _draw_both(
    host: ComfyModel, sampler: ImageSampler, vectors: torch.Tensor, words: str, count: int,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pictures [count, H, W, 3] with the tokens and with the words, from the same noise."""
    templates = [settings.templates[i % len(settings.templates)] for i in range(count)]
    seeds = [settings.seed + i for i in range(count)]
    with host.borrow_text_encoder() as encoder, torch.no_grad():
        texts = [encoder.encode(fill(t, PLACEHOLDER), vectors)[0] for t in templates]
    learned = sampler.draw_texts(Text.cat(texts), seeds, after=_cancellable)
    return learned, sampler.draw([fill(t, words) for t in templates], seeds, after=_cancellable)


def _cancellable(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Ends the run on Cancel, after a sampling step."""
    stop_if_cancelled()
    return x


class HardestEmbedding(io.ComfyNode):
    """Solves for the text embedding that undoes a patch best (RECE, Gong et al. 2024), without
    pictures or training. Draw with it on the patched model: does the concept return?

    Inputs:
        model: The model without the patch.
        clip: The CLIP of the same checkpoint, without patches.
        patch: The patch to undo.
        prompt: A prompt with the forgotten concept.
        strength: Strength of the patch, the same as on Apply Forget Patch. Must not be 0.
        r: Weight that pulls the solution to zero. Tiny: undoes the most, and may be far from any
            real text. Large: an empty text. The paper uses 0.1 and 0.001.

    Outputs:
        conditioning: The embedding, as a prompt for the sampler.
        text: How far the patch moves the prompt, and how far the embedding undoes that.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            io.Clip.Input("clip"),
            Patch.Input("patch"),
            io.String.Input("prompt", default="a photo of a dog", multiline=True),
            strength_input(),
            io.Float.Input("r", default=0.1, min=1e-6, max=1000.0, step=1e-6, round=False),
        ]
        outputs = [
            io.Conditioning.Output("CONDITIONING", "conditioning"),
            io.String.Output("TEXT", "text"),
        ]
        return schema(cls, "FMN_HardestEmbedding", "Hardest Embedding", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, patch: ForgetPatch, prompt: str, strength: float,
        r: float,
    ) -> io.NodeOutput:  # fmt: skip
        host = ComfyModel(model, clip)
        encoded = host.encode(Prompt(prompt, prompt, plain=False))
        with host.watch() as denoiser:
            solution = hardest(denoiser, host.family, [(patch, strength)], encoded.context, r)
        text = (
            f"The patch moves keys and values of '{prompt}' by {solution.before:.2%}. With the "
            f"hardest embedding they are within {solution.after:.2%} of what they were."
        )
        # A patch of cross-attention does not reach XL's pooled text: the prompt's own serves.
        options = {"pooled_output": encoded.vectors["pooled"]} if encoded.vectors else {}
        conditioning = [[solution.contexts.float(), options]]
        return io.NodeOutput(conditioning, text, ui=text_output(text))


NODES = [ConceptInversionProbe, HardestEmbedding]
