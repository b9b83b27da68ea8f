"""Nodes that measure: where the attention of a concept is, and what its words still mean."""

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..fmn.concepts.concept import TEMPLATES
from ..fmn.concepts.prompt_templates import fill
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.methods import resteer
from ..fmn.metrics.mscore import check, m_score, plot, report, summary
from ..fmn.models.attention_maps import maps_grid, maps_text, measure_attention
from ..fmn.models.image_sampler import open_sampler
from ..fmn.models.sampling import Sampling
from ..fmn.training.textual_inversion import Settings
from .common import image_of, lines_of
from .types import CATEGORY, Concepts, show_text, told


class AttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_AttentionMap",
            display_name="Attention Map",
            category=CATEGORY,
            description="Shows where in the picture a concept's words get attention, and how much, "
            "in each part of the model. Put one before and one after a patch to compare.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to look into, with its patches and LoRAs."
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concepts.Input(
                    "concepts",
                    tooltip="Whose words to look at, one row each, in the concept's first prompt.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Shows the picture beside and under the map, and is needed for "
                    "concepts with reference pictures. Empty: maps only.",
                ),
                io.Combo.Input(
                    "references",
                    options=list(resteer.REFERENCES),
                    default="samples",
                    tooltip="What is looked at for concepts without pictures. samples: a picture "
                    "that this model draws of the concept. zeros: nothing, so that two models are "
                    "compared on the same. A concept's first own picture goes first.",
                ),
                io.Int.Input(
                    "picture_seed",
                    default=0,
                    min=0,
                    max=2**53,
                    tooltip="For the picture, if references is 'samples'. Ignored otherwise.",
                ),
                io.Float.Input(
                    "brightest",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Share of attention in percent that is drawn palest. 0: the highest in "
                    "each row. Give two nodes the same number to compare their colours. 100: all.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    display_name="maps",
                    tooltip="A row for each concept: where its words get attention. Paler is more.",
                ),
                io.String.Output(
                    "TEXT",
                    display_name="text",
                    tooltip="The shares of attention in percent, in all and by part of the model.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concepts, references, picture_seed, brightest, vae=None):
        host = ComfyModel(model, clip, vae)
        show_text("preparing")
        settings = resteer.Settings(references=references, samples=1, seed=picture_seed)
        data = resteer.prepare(host, concepts, settings)
        comfy.model_management.throw_exception_if_processing_interrupted()
        pictures = [
            None if vae is None else host.decode(latent)[0] for *_, latent in data.probe_inputs()
        ]
        names = [concept.name for concept in concepts]
        rows = list(zip(names, measure_attention(host, data), pictures))
        text = maps_text(host.family, rows)
        picture = image_of(maps_grid(host.family, rows, brightest / 100))
        return io.NodeOutput(picture, text, ui=told(text))


class MScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = Settings()
        return io.Schema(
            node_id="FMN_MScore",
            display_name="M-Score",
            category=CATEGORY,
            description="Learns words from pictures of a concept on this model, and measures how "
            "close they are to its name: 1 is the name itself. Our own definition; its help page "
            "says what it can and cannot tell.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model under test, with its patches. Not Stable Diffusion XL.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Concepts.Input(
                    "concepts",
                    tooltip="What to measure. Words are learned from a concept's pictures; without "
                    "any, the untouched model draws them. The others in the chain are compared.",
                ),
                io.Model.Input(
                    "untouched",
                    optional=True,
                    tooltip="The model from before the patch. It is measured first, and draws "
                    "missing pictures. Empty: only this model is measured, and it draws them.",
                ),
                io.String.Input(
                    "templates",
                    default="",
                    multiline=True,
                    tooltip="Prompts to learn and compare in, one a line, with {} for the "
                    "concept. Empty: the one of the concept's kind, such as 'a photo of {}'.",
                ),
                io.Int.Input(
                    "inversions",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="How often words are learned anew for each concept and model. 1: no "
                    "spread is known. Time grows with it.",
                ),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=1,
                    max=10000,
                    tooltip="Training steps for each inversion. 1: hardly more than random words. "
                    "More take longer and follow the pictures more closely.",
                ),
                io.Float.Input(
                    "lr",
                    display_name="learning rate",
                    default=default.lr,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="AdamW's learning rate for the words. Too low: they stay random. Too "
                    "high: they grow far longer than real words.",
                ),
                io.Int.Input(
                    "tokens",
                    default=default.tokens,
                    min=1,
                    max=64,
                    tooltip="How many tokens are learned. 1: least room. More can describe more, "
                    "and need more steps.",
                ),
                io.Int.Input(
                    "batch",
                    default=default.batch,
                    min=1,
                    max=256,
                    tooltip="Noised pictures a step. 1: least memory and noisiest.",
                ),
                io.Int.Input(
                    "pictures",
                    default=10,
                    min=1,
                    max=200,
                    tooltip="How many pictures are drawn of a concept that has none (20 steps, "
                    "guidance 7).",
                ),
                io.Int.Input(
                    "measuring_seed",
                    default=0,
                    min=0,
                    max=2**53,
                    tooltip="First seed of the inversions and of drawn pictures. The same seed and "
                    "settings give the same score.",
                ),
                io.Clip.Input(
                    "untouched_clip",
                    optional=True,
                    tooltip="The CLIP from before the patch, if the patch changes the text "
                    "encoder too. Empty: both models use the same one.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "TEXT", display_name="text", tooltip="The scores with their spread, as text."
                ),
                io.Image.Output("IMAGE", display_name="plot", tooltip="The scores as a plot."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, concepts, templates, inversions, pictures, measuring_seed,
        untouched=None, untouched_clip=None, **settings,
    ):  # fmt: skip
        host = ComfyModel(model, clip, vae)
        compared = untouched is not None or untouched_clip is not None
        reference = ComfyModel(untouched or model, untouched_clip or clip, vae)
        reference = reference if compared else host
        seeds = range(measuring_seed, measuring_seed + inversions)
        settings = Settings(**settings)
        jobs = [(concept, _templates(concept, templates)) for concept in concepts]
        for concept, prompts in jobs:
            check(concept.name, prompts, seeds)
        with host.borrow_text_encoder():
            pass  # what cannot be measured is refused before anything is drawn
        runs = (2 if compared else 1) * inversions
        show = _Progress(len(jobs) * runs * settings.steps, inversions)
        results = {}
        for concept, prompts in jobs:
            others = [other.name for other in concepts if other.name != concept.name]
            given = concept.name, prompts, seeds, settings, others
            results[concept.name] = _measure(host, reference, concept, given, pictures, show)
        text = "\n\n".join(report(name, found, compared) for name, found in results.items())
        return io.NodeOutput(text, image_of(plot(results, compared)), ui=told(text))


def _templates(concept, written):
    found = lines_of(written)
    if not found and concept.kind not in TEMPLATES:
        raise ForgetError(
            f"Concept '{concept.name}' is of kind custom, which has no template: write templates "
            "with {} for the concept."
        )
    return found or (TEMPLATES[concept.kind],)


def _measure(host, reference, concept, given, count, show):
    """Scores of one concept on both models, as ``mscore.summary`` gives them."""
    phrase, prompts, seeds, *_ = given
    images, before = concept.images, None
    with open_sampler(reference, Sampling(), batch=4, on_pictures=show.drawn) as sampler:
        if images is None:
            show.start(f"{phrase}: drawing {count} pictures")
            named = [fill(prompts[i % len(prompts)], phrase) for i in range(count)]
            images = sampler.draw(named, [seeds[0] + i for i in range(count)])
        if reference is not host:
            show.start(f"{phrase}, untouched")
            before = m_score(reference, sampler.denoiser, images, *given, show)
    show.start(f"{phrase}, this model")
    with host.borrow_denoiser() as denoiser:
        after = m_score(host, denoiser, images, *given, show)
    return summary(host, before or after, after, phrase, prompts)


class _Progress:
    """Bar and a line of text; ends the run on Cancel."""

    def __init__(self, total, inversions):
        self.bar, self.inversions, self.done = comfy.utils.ProgressBar(total), inversions, 0

    def start(self, title):
        self.title, self.inversion = title, 0
        show_text(title)

    def drawn(self, count):
        comfy.model_management.throw_exception_if_processing_interrupted()

    def __call__(self, step):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.inversion += step.index == 1
        self.bar.update_absolute(self.done)
        show_text(
            f"{self.title}, inversion {self.inversion}/{self.inversions}: step "
            f"{step.index}/{step.total}, loss {step.losses[-1]:.4g}, {step.seconds_left:.0f} s left"
        )


NODES = [AttentionMap, MScore]
