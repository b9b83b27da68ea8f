"""High-level representation misdirection (HiRM, ICLR 2026, arXiv 2602.19631).

The first layer of CLIP is trained until the output of its last layer's attention for a concept is
a fixed target: noise (HiRM-R), or the output for a wider word such as "painting" (HiRM-S). The
U-Net stays as it is. Details follow a port of the released code, fmp453/erase-eval train_hirm.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, zip_longest

import torch
import torch.nn.functional as F

from ..concepts.concept import Concept
from ..models.adapters import attached
from ..models.families import Family, text_layers
from ..models.token_positions import CHUNK
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..training.fit_adapters import make_adapters, shuffled_cycle
from ..training.loop import AdamWConfig
from ..training.run import TrainingOptions, TrainingRun
from . import shared_settings as shared

TITLE = "HiRM"
REVISION = 1
ABOUT = (
    "High-level representation misdirection (arXiv 2602.19631): trains the text encoder's first "
    "layer until the concept's words mean noise, or its anchor. The patch is for the CLIP."
)
BLOCK = "text_encoder.text_model.encoder.layers.{}."
# Published steps by kind: towards noise, towards an anchor.
STEPS = {"style": (40, 30), "unsafe": (50, 25)}
OTHER_STEPS = (25, 15)  # published for objects


@dataclass(frozen=True)
class Settings(Base, method="hirm"):
    trains = True
    target: str = setting(
        "auto",
        "What the concept's words should mean. noise: random noise (HiRM-R). anchor: the "
        "concept's anchor, or the empty prompt if it has none (HiRM-S). auto: the anchor if "
        "the concept has one, else noise.",
        choices=("auto", "noise", "anchor"),
    )
    steps: int = setting(
        200,
        "Training steps for each concept. 0: as published for full weights, 15 to 50 by kind and "
        "target. More forget more, and harm neighbours.",
        limits=(0, 100_000),
    )
    lr: float = shared.lr(
        2e-3,
        "AdamW's learning rate. Around 0.002 for low rank; the paper trains full weights with "
        "0.00005.",
    )
    rank: int = setting(
        8,
        "Rank of the patch: how many directions each layer may change. The file grows with it. "
        "768: nothing is cut.",
        limits=(1, 768),
    )
    full_weights: bool = advanced(
        False,
        "On: train whole weight matrices, as published, and cut them to the rank when done. Off: "
        "train the low rank itself.",
    )
    preserve: float = setting(
        1.0,
        "Weight of the keep-list: each step also holds one kept prompt in place. 0: no "
        "keep-list, as published, which harms most prompts. Higher: forgets less, harms less.",
        limits=(0.0, 1000.0, 0.01),
    )
    keep_list: str = shared.keep_list()
    scale: float = advanced(
        500.0,
        "Size of the noise: its 2-norm over all 77 tokens. Higher: further away from all that "
        "words mean.",
        limits=(1e-3, 1e6, 0.001),
    )
    seed: int = shared.seed()


PUBLISHED = Settings(steps=0, lr=5e-5, rank=768, full_weights=True, preserve=0.0)
PRESETS = {
    "hirm": Settings(),
    "hirm-r": replace(PUBLISHED, target="noise"),
    "hirm-s": replace(PUBLISHED, target="anchor"),
}
Output = Callable[[str], torch.Tensor]  # from a prompt to h [1, 77, D]


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Train a patch of the text encoder; see ``methods.forget``.

    Only names and aliases are trained on, each alone: a prompt's other words would lose their
    meaning too. The loss is HiRM's |h(c) - target|^2, with h the output of the last projection,
    plus ``preserve`` times |h(k) - h0(k)|^2 / |h0(k)|^2 of a kept prompt k, in units of the first
    term at the start: the retain term of RMU (Li et al. 2024, arXiv 2403.03218), which HiRM left
    out.
    """
    model, concepts, settings, first = task.model, task.concepts, task.settings, BLOCK.format(0)
    names = [layer.name for layer in text_layers(model.family) if layer.name.startswith(first)]
    order = _order(concepts, settings)
    words, generator = task.kept_words(), torch.Generator().manual_seed(settings.seed)
    kept = list(islice(shuffled_cycle(words, generator), len(order))) if words else []
    options.check_steps(len(order))
    with model.borrow_text_encoder(words=False) as text_encoder:
        adapters = make_adapters(text_encoder, names, settings)
        outputs: list[torch.Tensor] = []
        projection = text_encoder.module(last_projection(model.family))
        with (
            projection.register_forward_hook(lambda module, args, out: outputs.append(out)),
            attached(adapters, text_encoder.module) as switch,
        ):

            def output(prompt: str) -> torch.Tensor:
                outputs.clear()  # a preview may have encoded its prompts too
                text_encoder.encode(prompt)
                return outputs.pop().float()

            with torch.no_grad(), switch.off():
                targets = [_target(concept, settings, output) for concept in concepts]
                initial = [
                    float(F.mse_loss(output(concept.subjects[0]), target))
                    for concept, target in zip(concepts, targets)
                ]

            def loss_at(index: int) -> torch.Tensor:
                concept, subject = order[index]
                loss = F.mse_loss(output(subject), targets[concept])  # |h(c) - target|^2
                if kept:
                    loss = loss + settings.preserve * initial[concept] * retain(kept[index])
                return loss

            def retain(prompt: str) -> torch.Tensor:
                """|h(k) - h0(k)|^2 / |h0(k)|^2"""
                with torch.no_grad(), switch.off():
                    before = output(prompt)
                return F.mse_loss(output(prompt), before) / before.square().mean()

            # Gradients are not clipped.
            config = AdamWConfig(settings.lr, (0.9, 0.98), 1e-8, eps=1e-6, max_norm=math.inf)
            module = text_encoder.module(names[0])
            run = TrainingRun(task, adapters, switch, options, config, len(order), module)
            run.train(loss_at, task.on_step)
    return run.finish()


def last_projection(family: Family) -> str:
    """The attention output projection of the last block whose output the U-Net sees.

    That is the last but one of the two encoders of SDXL, of which the first is edited.
    """
    used = family.texts[0].blocks - (1 if len(family.texts) > 1 else 0)
    return BLOCK.format(used - 1) + "self_attn.out_proj"


def _to_noise(concept: Concept, settings: Settings) -> bool:
    return settings.target == "noise" or (settings.target == "auto" and not concept.anchor)


def _target(concept: Concept, settings: Settings, output: Output) -> torch.Tensor:
    """The target of the last projection's output, [1, 77, D]."""
    anchor = output(concept.anchor)
    if not _to_noise(concept, settings):
        return anchor
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.rand(1, CHUNK, anchor.shape[2], generator=generator)
    return (noise / noise.norm() * settings.scale).to(anchor)


def _order(concepts: Sequence[Concept], settings: Settings) -> list[tuple[int, str]]:
    """(concept, words) of each step: concepts in turn, and the names of each in turn."""
    queues = []
    for index, concept in enumerate(concepts):
        published = STEPS.get(concept.kind, OTHER_STEPS)
        count = settings.steps or published[0 if _to_noise(concept, settings) else 1]
        queues.append([(index, subject) for subject in islice(cycle(concept.subjects), count)])
    return [step for turn in zip_longest(*queues) for step in turn if step]
