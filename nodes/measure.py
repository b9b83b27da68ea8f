"""Nodes that measure: where a concept's words get attention, and what they still mean."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from torch import Tensor

from ..fmn.concepts.concept import TEMPLATES, Concept
from ..fmn.concepts.prompt_templates import fill
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.methods import resteer
from ..fmn.metrics.mscore import Score, Summary, check, m_score, plot, report, summary
from ..fmn.models.attention_maps import maps_grid, maps_text, measure_attention
from ..fmn.models.image_sampler import open_sampler
from ..fmn.models.interface import UNet
from ..fmn.models.sampling import Sampling
from ..fmn.training.textual_inversion import Settings
from .common import clip_input, image_of, lines_of, schema, seed_input, vae_input
from .page import show_text, text_output
from .progress import InversionProgress, stop_if_cancelled
from .textual_inversion import inversion_inputs, refuse_early
from .types import Concepts


class AttentionMap(io.ComfyNode):
    """Shows where in the picture a concept's words get attention, and how much, in each part of the
    model. Use one before and one after a patch to compare.

    Inputs:
        model: The model to look into, with its patches and LoRAs.
        concepts: Concepts to look at, one row each, by the words in their first prompt.
        references: What is looked at for concepts without reference pictures. samples: a picture of
            the concept that this model draws. zeros: an empty picture, the same for every model you
            compare. A concept's first reference picture takes precedence.
        picture_seed: Seed of the picture if references is 'samples', else ignored.
        brightest: Share of attention in percent that is drawn palest. 0: the highest in each row.
            100: all attention. Give two nodes the same number to compare their colours.
        vae: Shows the picture beside and under the map; needed for concepts with reference
            pictures. Empty: maps only.

    Outputs:
        maps: A row for each concept: where its words get attention. Paler is more.
        text: Shares of attention in percent, overall and by part of the model.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            Concepts.Input("concepts"),
            io.Vae.Input("vae", optional=True),
            io.Combo.Input("references", options=list(resteer.REFERENCES), default="samples"),
            seed_input("picture_seed"),
            io.Float.Input("brightest", default=0.0, min=0.0, max=100.0, step=0.1),
        ]
        outputs = [io.Image.Output("IMAGE", "maps"), io.String.Output("TEXT", "text")]
        return schema(cls, "FMN_AttentionMap", "Attention Map", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, concepts: Sequence[Concept], references: str,
        picture_seed: int, brightest: float, vae: VAE | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        host = ComfyModel(model, clip, vae)
        show_text("preparing")
        settings = resteer.Settings(references=references, samples=1, seed=picture_seed)
        data = resteer.prepare(host, concepts, settings)
        stop_if_cancelled()
        pictures = [
            None if vae is None else host.decode(latent)[0] for *_, latent in data.probe_inputs()
        ]
        names = [concept.name for concept in concepts]
        rows = list(zip(names, measure_attention(host, data), pictures))
        text = maps_text(host.family, rows)
        picture = image_of(maps_grid(host.family, rows, brightest / 100))
        return io.NodeOutput(picture, text, ui=text_output(text))


class MScore(io.ComfyNode):
    """Learns words from pictures of a concept on this model, and measures how close they are to its
    name: 1 is the name itself. The definition is this project's own; the help page says what it can
    and cannot show.

    Inputs:
        model: The model under test, with its patches. Not Stable Diffusion XL.
        concepts: What to measure. Words are learned from a concept's reference pictures, or from
            pictures that the untouched model draws. Several concepts are compared with each other.
        templates: Prompts to learn and compare in, one per line, with {} for the concept. Empty:
            the one of the concept's kind, such as 'a photo of {}'.
        inversions: How often words are learned for each concept and model. 1: the spread is not
            known. Time grows in proportion.
        tokens: How many tokens are learned. 1: the least room. 64: can describe the most, and needs
            more steps.
        pictures: How many pictures are drawn of a concept without reference pictures (20 steps,
            guidance 7).
        measuring_seed: First seed of the inversions and of drawn pictures. The same seed and
            settings give the same score.
        untouched: The model without the patch. It is measured too, and draws missing pictures.
            Empty: only this model is measured, and it draws them.
        untouched_clip: The CLIP without the patch, if the patch changes the text encoder too.
            Empty: both models use the same one.

    Outputs:
        text: The scores with their spread, as text.
        plot: The scores as a plot.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        tokens, steps, lr, batch, *_ = inversion_inputs(64, 10_000)
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            vae_input(),
            Concepts.Input("concepts"),
            io.Model.Input("untouched", optional=True),
            io.String.Input("templates", default="", multiline=True),
            io.Int.Input("inversions", default=3, min=1, max=100),
            steps,
            lr,
            tokens,
            batch,
            io.Int.Input("pictures", default=10, min=1, max=200),
            seed_input("measuring_seed"),
            io.Clip.Input("untouched_clip", optional=True),
        ]
        outputs = [io.String.Output("TEXT", "text"), io.Image.Output("IMAGE", "plot")]
        return schema(cls, "FMN_MScore", "M-Score", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, concepts: Sequence[Concept],
        templates: str, inversions: int, pictures: int, measuring_seed: int,
        untouched: ModelPatcher | None = None, untouched_clip: CLIP | None = None, **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        host, reference = ComfyModel(model, clip, vae), None
        if untouched is not None or untouched_clip is not None:
            reference = ComfyModel(untouched or model, untouched_clip or clip, vae)
        seeds = range(measuring_seed, measuring_seed + inversions)
        measured = _Measured(host, reference, seeds, Settings(**settings), pictures)
        prompts = {concept.name: _templates(concept, templates) for concept in concepts}
        for name in prompts:
            check(name, prompts[name], seeds)
        for each in filter(None, (host, reference)):
            refuse_early(each)
        progress = InversionProgress(sum(measured.steps_of(concept) for concept in concepts))
        results = {}
        for concept in concepts:
            others = [name for name in prompts if name != concept.name]
            scores = measured.scores(concept, prompts[concept.name], others, progress)
            results[concept.name] = scores
        compared = reference is not None
        text = "\n\n".join(report(name, scores, compared) for name, scores in results.items())
        return io.NodeOutput(text, image_of(plot(results, compared)), ui=text_output(text))


def _templates(concept: Concept, written: str) -> tuple[str, ...]:
    if lines := lines_of(written):
        return lines
    if concept.kind not in TEMPLATES:
        raise ForgetError(
            f"Concept '{concept.name}' is of kind custom, which has no template: write templates "
            "with {} for the concept."
        )
    return (TEMPLATES[concept.kind],)


class _Measured(NamedTuple):
    """The models, and how each concept is measured on them."""

    host: ComfyModel
    reference: ComfyModel | None  # the untouched model, if it is compared
    seeds: Sequence[int]  # one inversion each
    settings: Settings
    pictures: int

    def steps_of(self, concept: Concept) -> int:
        """Length of the progress bar."""
        models = 1 if self.reference is None else 2
        drawn = self.pictures if concept.images is None else 0
        return models * len(self.seeds) * self.settings.steps + drawn

    def scores(
        self, concept: Concept, templates: Sequence[str], others: Sequence[str],
        progress: InversionProgress,
    ) -> Summary:  # fmt: skip
        """Scores of one concept, as ``mscore.summary`` gives them."""
        name, images, before = concept.name, concept.images, None
        on_pictures = progress.drawing(name, self.pictures)

        def scored(model: ComfyModel, unet: UNet, images: Tensor, which: str) -> list[Score]:
            on_step = progress.training(f"{name}, {which}", len(self.seeds))
            given = name, templates, self.seeds, self.settings, others
            return m_score(model, unet, images, *given, on_step)

        drawing = self.reference or self.host
        with open_sampler(drawing, Sampling(), 4, on_pictures, trained=True) as sampler:
            if images is None:
                prompts = [fill(templates[i % len(templates)], name) for i in range(self.pictures)]
                seeds = range(self.seeds[0], self.seeds[0] + self.pictures)
                images = sampler.draw(prompts, list(seeds))
            if self.reference is not None:
                before = scored(self.reference, sampler.denoiser, images, "untouched")
        with self.host.borrow_denoiser() as denoiser:
            after = scored(self.host, denoiser, images, "this model")
        return summary(self.host, before or after, after, name, templates)


NODES = [AttentionMap, MScore]
