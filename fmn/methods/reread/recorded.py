"""Re-read for transformers: ridge regression on what layers were seen to get and give.

In joint attention the text's tokens change from block to block, so what a layer reads out of a
prompt cannot be computed from the prompt alone. It is recorded, by forwards only: at some of the
picture's tokens the inputs o and outputs y of each block's attention output projection, for prompts
with the concept, and the outputs y* for the same noise without it. No weight is read, so weights
may have any precision.

Pure noise is where the text alone decides; later the picture shows the concept, too. With
``transformer_levels`` lower noise is recorded as well. As each edit changes what the blocks behind
it get, rows with the concept are recorded again with the edits so far and solved again, ``passes``
times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...closed_form.input_edit import Changes
from ...closed_form.output_edit import PartProgress
from ...closed_form.reduced_rank import reduced_rank_ridge
from ...concepts.concept import Prompt
from ...concepts.prompt_templates import sentences
from ...errors import ForgetError
from ...linalg import to_float64
from ...models.adapters import attached, fixed_adapters
from ...models.interface import Text, TransformerModel, Watched
from ...models.recording import Recorder, Rows
from ...models.sampling import seeded_noise, trailing_timesteps
from ...models.transformers import Transformer
from ...models.unknown_family import UnknownFamily
from ...patches.patch import ForgetPatch
from ...patches.task import Task
from ..shared_settings import rank_in_all
from .regression_data import SentencePairs, no_difference
from .settings import Settings

TOKENS_AT_ONCE = 2304  # of pictures in a forward: 4 pictures of 384 pixels
SIDE = 384  # pixels at which models of a higher resolution are recorded
SEEDS = 2  # of noise for each sentence with a concept
KEPT_POSITIONS = 4  # of each kept sentence

RowsByLayer = dict[str, Rows]


def known(family: UnknownFamily) -> Transformer:
    """What is known of a family that ``methods.forget`` let through."""
    assert family.entry is not None
    return family.entry


class Batch(NamedTuple):
    """Encoded prompts, each with its noise and the positions in the picture to record."""

    texts: list[Text]
    x_t: Tensor  # [B, C, h, w]
    positions: Tensor  # [B, P]
    t: int = -1  # time step; -1 is pure noise


class Prompts:
    """Encodes all prompts, before the model is loaded: text encoders may be as large."""

    def __init__(self, model: TransformerModel, texts: Sequence[str], settings: Settings) -> None:
        family = model.family
        self.channels = family.latent_channels
        self.side = (settings.size or min(SIDE, family.resolution)) // family.latent_factor
        self.tokens = (self.side // known(family).patch) ** 2
        self.at_once = max(1, TOKENS_AT_ONCE // self.tokens)
        self.seed = settings.seed
        self.generator = torch.Generator().manual_seed(self.seed)
        self.texts = {text: model.encode(Prompt(text, "")) for text in dict.fromkeys(texts)}

    def length(self, text: str) -> int:
        """Tokens: encoded prompts of the same number follow each other to share forwards."""
        return self.texts[text].context.shape[1]

    def batch(self, texts: Sequence[str], positions: int) -> Batch:
        """Each text with noise of its own, and so many positions at random."""
        seeds = range(self.seed, self.seed + len(texts))
        chosen = [torch.randperm(self.tokens, generator=self.generator)[:positions] for _ in texts]
        return Batch(
            [self.texts[text] for text in texts],
            seeded_noise(seeds, self.side, self.channels),
            torch.stack(chosen),
        )

    def pair(self, sentences: SentencePairs, positions: int) -> tuple[Batch, Batch]:
        """Sentences with a concept and those without it, at the same noise and positions.

        Raises:
            ForgetError: both are encoded alike.
        """
        if all(_equal(self.texts[text], self.texts[other]) for text, other in sentences):
            raise no_difference(*sentences[0])
        repeated = [pair for pair in sentences for _ in range(SEEDS)]
        with_concept = self.batch([text for text, _ in repeated], positions)
        return with_concept, with_concept._replace(texts=[self.texts[t] for _, t in repeated])

    def forwards(self, batch: Batch) -> int:
        return -(-len(batch.texts) // self.at_once)


class RowSampler:
    """Runs a watched model on prompts at pure noise and gives the rows of its readers."""

    def __init__(
        self, family: UnknownFamily, watched: Watched, prompts: Prompts, progress: PartProgress
    ) -> None:
        self.entry, self.readers = known(family), family.readers()
        self.watched, self.prompts, self.progress = watched, prompts, progress
        self.modules = {name: watched.module(name) for name in self.readers}

    def rows(self, batches: Sequence[Batch], edits: Changes) -> RowsByLayer:
        """Rows by layer while the edits are in place; a layer's outputs are without its own."""
        positions = torch.cat([batch.positions for batch in batches])
        recorder = Recorder(self.entry, positions, self.prompts.tokens)
        adapters = fixed_adapters(edits, self.watched.device)
        with (
            recorder.attached(self.readers, self.modules),
            attached(adapters, self.modules.__getitem__),
        ):
            for batch in batches:
                self._predict(batch)
        return recorder.taken()

    def widened(self, changes: Changes) -> Changes:
        """Changes of what attention gives as those of all that the layers get: zeros elsewhere."""
        widths = {
            name: cast(nn.Linear, module).in_features for name, module in self.modules.items()
        }
        return {
            name: (up, pad(down, (0, widths[name] - down.shape[1])))
            for name, (up, down) in changes.items()
        }

    def along_drawing(self, batch: Batch, levels: int) -> list[Batch]:
        """The batch at each noise level of a drawing of its texts in so many steps."""
        schedule, x_t, batches = self.watched.schedule, batch.x_t, []

        def predict(x: Tensor, t: int) -> Tensor:
            return self._predict(batch._replace(x_t=x, t=t))

        for i, t in enumerate(trailing_timesteps(len(schedule), levels)):
            if i:
                x_t = schedule.sample(predict, x_t, levels, first=i - 1, last=i)
            batches.append(batch._replace(x_t=x_t, t=t))
        return batches

    def _predict(self, batch: Batch) -> Tensor:
        t, found = batch.t % len(self.watched.schedule), []
        for first in range(0, len(batch.texts), self.prompts.at_once):
            part = slice(first, first + self.prompts.at_once)
            found.append(self.watched.predict_each(batch.x_t[part], t, batch.texts[part]))
            self.progress(1.0)
        return torch.cat(found)


def recorded_patch(task: Task, kept: Sequence[str]) -> ForgetPatch:
    """Solve for all readers of a transformer; its losses are 1 and what is left, see ``solve``.

    Args:
        kept: sentences.

    Raises:
        ForgetError: a setting is not for transformers; a concept's sentences are encoded as those
            without it; the model gives numbers that are not finite.
    """
    model, settings = cast(TransformerModel, task.model), task.settings
    if settings.robust_steps or settings.stop_at:
        raise ForgetError(
            f"robust_steps and stop_at are for U-Nets, and {model.family.title} is none: set both "
            "to 0."
        )
    pairs = [sentences(concept, settings.transformer_prompts) for concept in task.concepts]
    texts = [text for some in pairs for pair in some for text in pair]
    prompts = Prompts(model, [*texts, *kept], settings)
    concepts = [prompts.pair(some, settings.query_positions) for some in pairs]
    kept_batch = prompts.batch(sorted(kept, key=prompts.length), KEPT_POSITIONS)
    levels, of_kept = settings.transformer_levels, prompts.forwards(kept_batch)
    of_concepts = sum(prompts.forwards(batch) for batch, _ in concepts)
    forwards = levels * (of_kept + (1 + settings.passes) * of_concepts)
    forwards += (levels - 1) * (of_kept + of_concepts)  # the drawings
    with model.watch(prompts.at_once, prompts.side) as watched:
        progress = PartProgress(task.on_step, forwards)
        sampler = RowSampler(model.family, watched, prompts, progress)
        batches = [sampler.along_drawing(batch, levels) for batch, _ in concepts]
        targets = [
            sampler.rows([each._replace(texts=without.texts) for each in some], {})
            for some, (_, without) in zip(batches, concepts)
        ]
        # All rows are in memory at once: without the outputs of kept prompts, which stay, and
        # without what the pass before saw.
        kept_rows = sampler.rows(sampler.along_drawing(kept_batch, levels), {})
        kept_inputs = {name: rows.inputs for name, rows in kept_rows.items()}
        del kept_rows
        changes: Changes = {}
        for _ in range(settings.passes):
            seen = [sampler.rows(some, changes) for some in batches]
            solved, left = solve(seen, targets, kept_inputs, settings)
            changes = sampler.widened(solved)
            del seen
    return task.patch(changes, [1.0, left])


def solve(
    seen: Sequence[RowsByLayer],
    targets: Sequence[RowsByLayer],
    kept_inputs: Mapping[str, Tensor],
    settings: Settings,
) -> tuple[Changes, float]:
    """The change of each layer that moves its outputs y to y + (1 + overshoot) (y* - y).

    Rows of kept prompts and those without the concepts stay.

    Args:
        seen, targets: rows (o, y) with each concept and (o*, y*) without it.
        kept_inputs: rows k of kept prompts, [B, P, in] of each layer.

    Returns:
        changes, and the mean over layers and concepts of |dW o - (y* - y)|^2 / |y* - y|^2.
    """
    changes, shares = {}, []
    further = 1 + settings.transformer_overshoot
    for name, others in kept_inputs.items():
        with_concept, without = ([_flat(rows[name]) for rows in some] for some in (seen, targets))
        kept = to_float64(others).flatten(0, 1)
        moves = [star - y for (_, y), (_, star) in zip(with_concept, without)]
        if not all(move.isfinite().all() for move in (*moves, kept)):
            raise ForgetError(
                f"'{name}' gave numbers that are not finite: load the model in bfloat16 or float32."
            )
        up, down = reduced_rank_ridge(
            [(o, further * move) for (o, _), move in zip(with_concept, moves)],
            torch.cat([kept, *(o for o, _ in without)]),
            settings.preserve,
            settings.transformer_damping,
            rank_in_all(settings.rank, len(seen)),
        )
        changes[name] = up.float(), down.float()
        for (o, _), move in zip(with_concept, moves):
            after = o @ down.mT @ up.mT - move
            shares.append(float(after.square().sum() / move.square().sum()))
    return changes, sum(shares) / len(shares)


def _equal(text: Text, other: Text) -> bool:
    """Whether two prompts are encoded alike."""
    return torch.equal(text.context, other.context) and all(
        torch.equal(value, other.vectors[name])
        for name, value in text.vectors.items()
        if isinstance(value, Tensor)
    )


def _flat(rows: Rows) -> tuple[Tensor, Tensor]:
    return to_float64(rows.inputs).flatten(0, 1), to_float64(rows.outputs).flatten(0, 1)
