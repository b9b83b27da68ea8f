"""Nodes that learn words from pictures, and that try to bring a forgotten concept back."""

from dataclasses import asdict

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..fmn.closed_form.adversarial_embedding import hardest
from ..fmn.concepts.concept import Prompt
from ..fmn.concepts.prompt_templates import PLACEHOLDER
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.images import loss_picture
from ..fmn.models.generator import open_studio
from ..fmn.models.interface import Text
from ..fmn.models.sampling import Sampling
from ..fmn.patches.embedding_file import embedding_of, save_embedding
from ..fmn.training.textual_inversion import Settings, filled, invert
from .common import lines_of, strength_input
from .embedding import FOLDER, embedding_path
from .types import CATEGORY, Learned, Patch, show_text, told

PREVIEW_SIDE = 512


def _inputs():
    """Widgets of an inversion, the same on both nodes."""
    settings = Settings()
    return [
        io.Int.Input(
            "tokens",
            default=settings.tokens,
            min=1,
            max=8,
            tooltip="How many tokens are learned. 8: can describe most, and needs more steps.",
        ),
        io.Int.Input(
            "steps",
            default=settings.steps,
            min=1,
            max=100000,
            tooltip="Training steps. 1: hardly more than the start. The default suits the demo "
            "model; for Stable Diffusion 1.x, published settings are 3000 to 5000.",
        ),
        io.Float.Input(
            "lr",
            display_name="learning rate",
            default=settings.lr,
            min=1e-6,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Too low: the tokens stay where they start. Too high: they grow far too long.",
        ),
        io.Int.Input(
            "batch",
            default=settings.batch,
            min=1,
            max=256,
            tooltip="Noised pictures a step. 1: least memory and noisiest.",
        ),
        io.String.Input(
            "start",
            default="",
            tooltip="Words whose tokens to start from, such as 'art'. Empty: random tokens.",
        ),
        io.String.Input(
            "templates",
            default="\n".join(settings.templates),
            multiline=True,
            tooltip="Prompts to learn in, one a line, each with one {} for the tokens. Say in them "
            "what does not belong to the concept. Empty: 'a photo of {}'.",
        ),
        io.Int.Input(
            "training_seed",
            default=0,
            min=0,
            max=2**53,
            tooltip="The same seed and settings give the same tokens.",
        ),
    ]


def _learned_outputs(unless=""):
    """What both nodes give: the words for a prompt, and what was learned."""
    return [
        io.String.Output(
            "TOKEN",
            display_name="token",
            tooltip=f"What to write in a prompt: embedding: and the name.{unless}",
        ),
        Learned.Output(
            "EMBEDDING",
            display_name="embedding",
            tooltip="What was learned, for learned on Concept to Forget.",
        ),
    ]


def _settings(start, templates, training_seed, **values):
    lines = lines_of(templates)
    written = {"templates": lines} if lines else {}
    return Settings(start=start.strip(), seed=training_seed, **values, **written)


class TextualInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_TextualInversion",
            display_name="Textual Inversion",
            category=CATEGORY,
            description="Learns a few made-up words from pictures (Gal et al. 2022), and saves "
            "them so that prompts can use them as embedding:NAME. The model stays as it is.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Stable Diffusion 1.x or 2.x, with its LoRAs and patches."
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input("images", tooltip="Pictures of what the words shall mean."),
                io.String.Input(
                    "name",
                    default="my-concept",
                    tooltip=f"Name of the file in models/{FOLDER}, with / for folders: letters, "
                    "digits, - and _. A file that is there already is never overwritten.",
                ),
                *_inputs(),
            ],
            outputs=_learned_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, images, name, **inputs):
        name, settings = name.strip(), _settings(**inputs)
        path, host = embedding_path(name), ComfyModel(model, clip, vae)
        fingerprint = _refuse_early(host)
        with host.borrow() as borrowed:
            found = invert(host, borrowed, images, settings, _Progress(name, settings.steps))
        record = host.family, fingerprint, "textual inversion", asdict(settings), name
        embedding = embedding_of(found.vectors, found.losses, *record)
        save_embedding(embedding, path, host.family)
        token = f"embedding:{name}"
        text = f"saved {name}.safetensors in models/{FOLDER}: write {token} in a prompt"
        return io.NodeOutput(token, embedding, ui=told(text, token))


class ConceptInversionProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_ConceptInversionProbe",
            display_name="Concept Inversion Probe",
            category=CATEGORY,
            description="Tries to bring a forgotten concept back: learns tokens for its pictures "
            "on the model that forgot it, and draws with them (Pham et al. 2023). If it shows, the "
            "model has not forgotten it, only its name.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that forgot, or the untouched one and its patch."
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "images", tooltip="Pictures of the concept, such as the untouched model draws."
                ),
                io.String.Input(
                    "words",
                    default="dog",
                    tooltip="The concept's name. The same prompts are drawn with it, to compare.",
                ),
                *_inputs(),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many pictures are drawn with the tokens, and as many by name (20 "
                    "steps, guidance 7), one a template in turn.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip=f"Name of a file in models/{FOLDER} to keep the tokens in. Empty: no "
                    "file, and the token output is empty.",
                ),
                Patch.Input("patch", optional=True, tooltip="Put on the model for the probe."),
                strength_input(
                    "Of the patch. 0: the untouched model. Ignored without a patch.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output(
                    "LEARNED",
                    display_name="by learned tokens",
                    tooltip="What the model draws with the learned tokens. Does the concept show?",
                ),
                io.Image.Output(
                    "NAMED",
                    display_name="by name",
                    tooltip="The same prompts and noise with the concept's name, to compare.",
                ),
                *_learned_outputs(" Empty without save_as."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, images, words, pictures, save_as, patch=None, strength=1.0, **inputs
    ):
        words, name, settings = words.strip(), save_as.strip(), _settings(**inputs)
        if not words:
            raise ForgetError("The concept's words are empty: type its name, to compare with.")
        path, host = embedding_path(name) if name else None, ComfyModel(model, clip, vae)
        fingerprint = _refuse_early(host)
        show = _Progress(words, settings.steps + 2 * pictures)
        worn = [] if patch is None else [(patch, strength)]
        with (
            open_studio(host, Sampling(), batch=4, on_pictures=show.drawn) as studio,
            studio.applying(worn),
        ):
            found = invert(host, studio.borrowed, images, settings, show)
            learned, named = _drawn(host, studio, found.vectors, words, pictures, settings)
        record = host.family, fingerprint, "concept inversion", asdict(settings), words
        embedding = embedding_of(found.vectors, found.losses, *record)
        if path is not None:
            save_embedding(embedding, path, host.family)
        text = f"{words}: does it show? Compare the pictures by learned tokens and by name"
        token = f"embedding:{name}" if name else ""
        return io.NodeOutput(learned, named, token, embedding, ui=told(text))


def _drawn(host, studio, vectors, words, count, settings):
    """Pictures [count, H, W, 3] with the tokens and with the words, from the same noise."""
    templates = [settings.templates[i % len(settings.templates)] for i in range(count)]
    seeds = [settings.seed + i for i in range(count)]
    with host.borrow_text() as encoder, torch.no_grad():
        texts = [encoder.encode(filled(t, PLACEHOLDER), vectors)[0] for t in templates]
    learned = studio.draw_texts(Text.cat(texts), seeds, after=_cancellable)
    return learned, studio.draw([filled(t, words) for t in templates], seeds, after=_cancellable)


def _cancellable(x, alpha):
    """Ends the run on Cancel, after a step of sampling."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return x


def _refuse_early(host):
    """The base's fingerprint; what cannot be learned on is refused before any work is done."""
    with host.borrow_text():
        return host.fingerprint()


class HardestEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_HardestEmbedding",
            display_name="Hardest Embedding",
            category=CATEGORY,
            description="Solves for the text that undoes a patch best (RECE, Gong et al. 2024): no "
            "pictures, no training. Draw with it on the patched model: does the concept return?",
            inputs=[
                io.Model.Input("model", tooltip="The model without the patch."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint, untouched."),
                Patch.Input("patch", tooltip="The patch to undo."),
                io.String.Input(
                    "prompt",
                    default="a photo of a dog",
                    multiline=True,
                    tooltip="A prompt with the forgotten concept.",
                ),
                strength_input("Of the patch: the same as on Apply Forget Patch. Not 0."),
                io.Float.Input(
                    "r",
                    default=0.1,
                    min=1e-6,
                    max=1000.0,
                    step=1e-6,
                    round=False,
                    tooltip="Pulls the solution to zero. Tiny: undoes the most, and may be far "
                    "from any real text. Large: an empty text. The paper uses 0.1 and 0.001.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING",
                    display_name="conditioning",
                    tooltip="The hardest text, as a prompt for the sampler.",
                ),
                io.String.Output(
                    "TEXT",
                    display_name="text",
                    tooltip="How far the patch moved the prompt, and how near this comes back.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, patch, prompt, strength, r):
        host = ComfyModel(model, clip)
        encoded = host.encode(Prompt(prompt, prompt, plain=False))
        with host.borrow() as borrowed:
            found = hardest(borrowed, host.family, [(patch, strength)], encoded.context, r)
        text = (
            f"The patch moves keys and values of '{prompt}' by {found.before:.2%}. Through it, the "
            f"hardest embedding comes within {found.after:.2%} of what they were."
        )
        # A patch of cross-attention does not reach XL's pooled text: the prompt's own serves.
        options = {"pooled_output": encoded.vectors["pooled"]} if encoded.vectors else {}
        return io.NodeOutput([[found.contexts.float(), options]], text, ui=told(text))


class _Progress:
    """Bar, picture of the loss and a line of text; ends the run on Cancel."""

    def __init__(self, title, total):
        self.title, self.total, self.done = title, total, 0
        self.bar = comfy.utils.ProgressBar(total)

    def __call__(self, step):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done = step.index
        picture = loss_picture(step.losses, step.total)
        self.bar.update_absolute(self.done, self.total, ("JPEG", picture, PREVIEW_SIDE))
        show_text(
            f"{self.title}: step {step.index}/{step.total}, loss {step.losses[-1]:.4g}, "
            f"{step.seconds_left:.0f} s left"
        )

    def drawn(self, count):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += count
        self.bar.update_absolute(self.done, self.total)
        show_text(f"{self.title}: drawing, {self.total - self.done} pictures left")


NODES = [TextualInversion, ConceptInversionProbe, HardestEmbedding]
