"""The node that shows what forgetting did: the same prompts and seeds before and after."""

import time

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.drawing import draw
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.jobs.compare import Pair, grid, judged, report
from ..fmn.metrics.judge import Judge
from ..fmn.metrics.load import load_judge
from ..fmn.models.families import Family
from ..fmn.patches.patch import ForgetPatch
from .common import advanced, clip_input, image_of, lines_of, schema, seed_input, vae_input
from .demo import DemoConfig, TransformerConfig
from .page import text_output
from .progress import Progress
from .types import Patch

AUTO = "auto"


class CompareBeforeAfter(io.ComfyNode):
    """Draws prompts before and after forgetting, at equal seeds, in one labelled grid: is the
    concept gone, and is everything else still there?

    Inputs:
        model: The model before forgetting.
        patch: The patch to compare with and without.
        after: Instead of a patch: the model after forgetting, from any node.
        after_clip: Instead of a patch: the CLIP after forgetting, if that changed it.
        forgotten: Prompts whose concept should be gone, one per line.
        kept: Prompts that should look as before, one per line. Take near ones.
        pictures: Pictures of each prompt, each with its own seed.
        first_seed: Seed of a prompt's first picture; the next ones count up.
        steps: Sampling steps (euler).
        guidance: Guidance scale (cfg). 0: 3.5 for the demo models, 7 for Stable Diffusion, 1 for
            others. 1: none, as distilled models need.
        size: Pixels of a picture's sides. 0: what the model was trained at.
        judge: What says what the pictures show. auto: the demo's judge for the demo models, none
            for others. none: nothing. 'clip:' and a folder of a CLIP model: which of the prompts a
            picture looks like.

    Outputs:
        grid: A row a picture: before, after, and where they differ.
        text: The result in words.
        thumbnail: The first prompt before and after, for Save Forget Patch.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        drawing = [
            io.Int.Input("steps", default=12, min=1, max=150, optional=True),
            io.Float.Input("guidance", default=0.0, min=0.0, max=30.0, step=0.1, optional=True),
            io.Int.Input("size", default=0, min=0, max=2048, step=64, optional=True),
            io.String.Input("judge", default=AUTO, optional=True),
        ]
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            vae_input(),
            Patch.Input("patch", optional=True),
            io.Model.Input("after", optional=True),
            io.Clip.Input("after_clip", optional=True),
            io.String.Input("forgotten", default="a photo of a dog", multiline=True),
            io.String.Input("kept", default="a photo of a cat", multiline=True),
            io.Int.Input("pictures", default=1, min=1, max=8),
            seed_input("first_seed"),
            *advanced(*drawing),
        ]
        outputs = [
            io.Image.Output("IMAGE", "grid"),
            io.String.Output("TEXT", "text"),
            io.Image.Output("THUMBNAIL", "thumbnail"),
        ]
        return schema(cls, "FMN_CompareBeforeAfter", "Compare Before and After", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, vae: VAE, forgotten: str, kept: str, pictures: int,
        first_seed: int, steps: int = 12, guidance: float = 0.0, size: int = 0, judge: str = AUTO,
        patch: ForgetPatch | None = None, after: ModelPatcher | None = None,
        after_clip: CLIP | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        rows = [(text, True) for text in lines_of(forgotten)]
        rows += [(text, False) for text in lines_of(kept)]
        if not rows:
            raise ForgetError("There is no prompt to compare: write at least one, a line each.")
        if (patch is None) == (after is None and after_clip is None):
            raise ForgetError(
                "Connect either a patch or what comes after it (after, after_clip), so that there "
                "is something to compare with."
            )
        host = host_of(model, clip, vae)
        demo = isinstance(model.model.model_config, (DemoConfig, TransformerConfig))
        found = _judge(judge, demo, [text for text, _ in rows])  # before any drawing
        changed = after or model, after_clip or clip
        if patch is not None:
            changed = host.patched(patch, 1.0), clip
            if patch.changes_text:
                changed = changed[0], host.patched_clip(patch, 1.0)
        prompts = [(text, first_seed + i) for text, _ in rows for i in range(pictures)]
        count, begun = _Counter(2 * len(prompts)), (model, clip)
        side = size or host.family.resolution
        guidance = guidance or _usual_guidance(host.family, demo)
        before, afterwards = (
            draw(*models, vae, prompts, side, steps, guidance, count) for models in (begun, changed)
        )
        which = [goes for _, goes in rows for _ in range(pictures)]
        pairs = [
            Pair(text, goes, *two)
            for (text, _), goes, two in zip(prompts, which, zip(before, afterwards))
        ]
        pairs = judged(pairs, found) if found else pairs
        text = report(pairs)
        first = torch.stack([pairs[0].before, pairs[0].after])
        return io.NodeOutput(image_of(grid(pairs)), text, first, ui=text_output(text))


class _Counter(Progress):
    """The bar over all pictures."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.start = time.monotonic()

    def __call__(self) -> None:
        done = self.done + 1
        left = (time.monotonic() - self.start) / done * (self.total - done)
        self.show(done, f"picture {done}/{self.total}, {left:.0f} s left")


def _usual_guidance(family: Family, demo: bool) -> float:
    """3.5 for demo models and 7 for other U-Nets; others have it built in or are asked for."""
    if demo:
        return 3.5
    return 7.0 if family.known else 1.0


def _judge(name: str, demo: bool, prompts: list[str]) -> Judge | None:
    if name.strip() in ("", "none"):
        return None
    if name.strip() == AUTO:
        return load_judge("demo") if demo else None
    labels = {"prompt": {text: text for text in dict.fromkeys(prompts)}}
    return load_judge(name.strip(), labels if name.startswith("clip:") else None)


NODES = [CompareBeforeAfter]
