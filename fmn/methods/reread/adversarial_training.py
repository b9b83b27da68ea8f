"""Adversarial training of a patch, on words learned to summon the concept and on pictures of it.

Editing how text is read leaves the concept in the model: words learned from its pictures get around
the edit, and the model still completes a picture that another model began. So a low-rank change of
the layers that write into the picture is trained, on noised pictures of the concept, away from what
the frozen model predicts, whatever the text: the concept's prompts, other prompts, none, and words
that adversaries learn at the same time (as in AdvUnlearn and STEREO). Kept prompts hold it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...linalg import truncate_product
from ...models.adapters import LowRankAdapter, Switch, attached, fixed_adapters
from ...models.families import Family, layers
from ...models.interface import Text, UNet
from ...models.module_patching import checkpointed
from ...models.sampling import expand, q_sample
from ...patches.patch import ForgetPatch
from ...patches.task import Task
from ...training.loop import AdamWConfig, Moments, initial_loss_scale, load_moments
from ...training.run import Adapters, TrainingOptions, TrainingRun, adapter_parameters
from ...training.textual_inversion import draw_noise
from .adversaries import Adversary, NewAdversary, adversaries
from .training_images import Scene

# The layers with which attention and feed-forward write into the picture.
ENDINGS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
ADVERSARIES = 4  # a concept, each with words of its own
LIFETIME = 60  # steps of an adversary until it starts anew
MAX_GAIN = 10.0  # that a small difference is multiplied by
EMPTY = 6  # one step in so many keeps the predictions for the empty prompt
HALF = 4  # pictures of the concept a step, and as many kept ones
Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer name -> (up, down)


def trained_layers(family: Family) -> list[str]:
    return [layer.name for layer in layers(family) if layer.name.endswith(ENDINGS)]


def train_adversarially(
    task: Task,
    options: TrainingOptions,
    denoiser: UNet,
    changes: Changes,
    scenes: Sequence[Scene],
    kept: Scene,
    empty: Text,
    make_patch: Callable[[Changes, Sequence[float]], ForgetPatch],
) -> TrainingRun:
    """Train a patch further; the ``finish`` of the run gives it. See the module.

    Args:
        task: with settings of ``reread``.
        changes: of the patch to begin with.
        scenes: one for each concept.

    Raises:
        NonFiniteLoss: at once, so that nothing was learned.
    """
    model, settings = task.model, task.settings
    names = trained_layers(model.family)
    given = settings.robust_rank, torch.Generator().manual_seed(settings.seed), denoiser.device
    adapters = {name: LowRankAdapter(denoiser.module(name), *given) for name in names}
    # The patch itself stays as it is: trained along, it would be given up for what is kept.
    applied = fixed_adapters(changes, denoiser.device)
    blocks = denoiser.checkpoint_blocks() if settings.checkpointing else []
    rank = max(up.shape[1] for up, _ in changes.values())
    scale = initial_loss_scale(denoiser.module(names[0]))
    config = AdamWConfig(settings.robust_lr, weight_decay=0.0, linear_decay=True)

    def finished(losses: Sequence[float]) -> ForgetPatch:
        return make_patch(joined(changes, adapters, rank), losses)

    with (
        attached(applied, denoiser.module) as switch,
        attached(adapters, denoiser.module, switch),
        checkpointed(blocks),
        adversaries(model, denoiser) as new_adversary,
    ):
        loss = AdversarialLoss(
            denoiser, adapters, switch, scenes, kept, empty, new_adversary, settings, scale
        )
        for _ in range(options.batches_drawn):
            loss.pick()
        steps, module = settings.robust_steps * len(scenes), denoiser.module(names[0])
        run = TrainingRun(
            task, adapters, switch, options, config, steps, module, denoiser, finished,
            loss.extra_state,
        )  # fmt: skip
        loss.load_moments(run.extra_moments)
        run.train(lambda index: loss(loss.pick()), task.on_step)
    return run


def joined(changes: Changes, adapters: Adapters, rank: int) -> Changes:
    """Both changes in one, on the CPU.

    Args:
        rank: of layers that both change; the rest is cut off.
    """
    result = {}
    for name, adapter in adapters.items():
        up, down = (factor.cpu() for factor in adapter.factors(0)[:2])
        if name in changes:
            first = changes[name]
            up, down = torch.cat([first[0], up], 1), torch.cat([first[1], down])
            up, down, _ = truncate_product(up.double(), down.double(), rank)
            up, down = up.float(), down.float()
        result[name] = up, down
    return result


def away(
    concept: torch.Tensor, without: torch.Tensor, empty: torch.Tensor, push: float
) -> torch.Tensor:
    """e(without) - push g (e(concept) - e(without)), all [B, 4, h, w].

    ESD's target, with g = |e(concept) - e(empty)| / |e(concept) - e(without)| and at least 1: a
    style that is drawn anyway makes little difference, and is moved away from as far as others.
    """
    from_empty, from_without = (
        (concept - other).flatten(1).norm(dim=1) for other in (empty, without)
    )
    gain = (from_empty / from_without.clamp_min(1e-12)).clamp(1.0, MAX_GAIN).view(-1, 1, 1, 1)
    return without - push * gain * (concept - without)


class Noising(NamedTuple):
    """Which pictures of a scene are noised and how, at time steps spread over the schedule; all on
    the CPU."""

    rows: torch.Tensor  # [HALF]
    t: torch.Tensor  # [HALF]
    noise: torch.Tensor  # [HALF, 4, h, w]


class Pick(NamedTuple):
    """All that is random in a step."""

    scene: Scene  # of the concept whose turn it is
    adversary: Adversary
    attacked: Noising
    forgotten: Noising
    texts: list[Callable[[], Text]]  # each gives a text for one of the pictures ``forgotten``
    kept: Noising
    blank: bool  # whether the pictures ``kept`` have the empty prompt


class AdversarialLoss:
    """The loss of each step; use while ``adapters`` are attached.

    Args:
        scenes: one for each concept.
        switch: of the patch and of the attached adapters.
        settings: of ``reread``.
        scale: of the adversaries' losses; see ``loop.Trainer``.
    """

    def __init__(
        self,
        denoiser: UNet,
        adapters: Adapters,
        switch: Switch,
        scenes: Sequence[Scene],
        kept: Scene,
        empty: Text,
        new_adversary: NewAdversary,
        settings: Any,
        scale: float,
    ):
        self.denoiser, self.switch, self.settings = denoiser, switch, settings
        self.new_adversary, self.picks = new_adversary, 0
        self.scale = torch.tensor(scale)
        self.parameters = adapter_parameters(adapters)
        self.scenes, self.kept, self.empty = scenes, kept, empty
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.alphas = denoiser.alphas_cumprod.cpu()
        self.adversaries: list[list[Adversary | None]] = [[None] * ADVERSARIES for _ in scenes]

    def extra_state(self) -> dict[str, tuple[torch.Tensor, Moments | None]]:
        """What learns beside the patch; see ``TrainingRun``."""
        state: dict[str, tuple[torch.Tensor, Moments | None]] = {"scale": (self.scale, None)}
        for name, adversary in self._adversaries():
            moments = adversary.optimizer.state.get(adversary.learned)
            state[name] = adversary.learned, moments
        return state

    def load_moments(self, moments: Mapping[str, Moments | None]) -> None:
        for name, adversary in self._adversaries():
            if moments.get(name):
                load_moments(adversary.optimizer, [moments[name]])

    def _adversaries(self) -> Iterator[tuple[str, Adversary]]:
        """All that exist, with names for a training state."""
        for number, slots in enumerate(self.adversaries):
            for slot, adversary in enumerate(slots):
                if adversary is not None:
                    yield f"{number}.{slot}", adversary

    def pick(self) -> Pick:
        """Pick what the next step trains on; costs next to nothing."""
        turn, number = divmod(self.picks, len(self.scenes))
        self.picks += 1
        scene, slots, slot = self.scenes[number], self.adversaries[number], turn % ADVERSARIES
        adversary = slots[slot]
        if adversary is None or adversary.age >= LIFETIME:
            slots[slot] = adversary = self.new_adversary(scene, self.generator)
        adversary.age += 1
        attacked, forgotten = self._noising(scene), self._noising(scene)
        texts = self._pick_texts(scene, forgotten.rows, [a for a in slots if a is not None])
        kept, blank = self._noising(self.kept), int(self._random(EMPTY, 1)) == 0
        return Pick(scene, adversary, attacked, forgotten, texts, kept, blank)

    def _pick_texts(
        self, scene: Scene, index: torch.Tensor, met: Sequence[Adversary]
    ) -> list[Callable[[], Text]]:
        """For each picture a text: a quarter its own, half an adversary's, the rest any other."""
        texts: list[Callable[[], Text]] = []
        for i, kind in zip(index.split(1), self._random(4, HALF).tolist()):
            if kind == 0:
                texts.append(partial(Text.__getitem__, scene.text, i))
            elif kind < 3:
                adversary = met[int(self._random(len(met), 1))]
                texts.append(partial(adversary.text, adversary.pick()))
            else:
                j = self._random(len(self.kept.text.context), 1)
                others = (self.empty, slice(0, 1)), (self.kept.text, j), (scene.other, i)
                texts.append(partial(Text.__getitem__, *others[int(self._random(3, 1))]))
        return texts

    def __call__(self, pick: Pick) -> torch.Tensor:
        self._attack(pick)
        return self._forget(pick) + self.settings.robust_preserve * self._keep(pick)

    def _attack(self, pick: Pick) -> None:
        """One step of an adversary, towards words that predict the noise on the pictures."""
        adversary = pick.adversary
        x_t, t, noise = self._noised(pick.scene, pick.attacked)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        predicted = self.denoiser.predict_noise(x_t, t, expand(adversary.shortest_text(), HALF))
        loss = F.mse_loss(predicted.float(), noise)
        (gradient,) = torch.autograd.grad(loss * self.scale, [adversary.learned])
        if torch.isfinite(gradient).all():
            adversary.learned.grad = gradient
            adversary.optimizer.step()
        else:
            self.scale = (self.scale / 2).clamp(min=1.0)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _forget(self, pick: Pick) -> torch.Tensor:
        """|e'(x_t, text) - away(...)|^2"""
        scene, index = pick.scene, pick.forgotten.rows
        x_t, t, _ = self._noised(scene, pick.forgotten)
        with torch.no_grad(), self.switch.off():
            concept, without = scene.text[index], scene.other[index]
            texts = Text.cat([concept, without, expand(self.empty, HALF)])
            frozen = self.denoiser.predict_noise(x_t.repeat(3, 1, 1, 1), t.repeat(3), texts).float()
        with torch.no_grad():
            texts = Text.cat([text() for text in pick.texts])
        predicted = self.denoiser.predict_noise(x_t, t, texts)
        e_concept, e_without, e_empty = frozen.chunk(3)
        target = away(e_concept, e_without, e_empty, self.settings.robust_overshoot)
        return F.mse_loss(predicted.float(), target)

    def _keep(self, pick: Pick) -> torch.Tensor:
        """|e'(x_t, kept) - e(x_t, kept)|^2"""
        x_t, t, _ = self._noised(self.kept, pick.kept)
        text = self.kept.text[pick.kept.rows]
        if pick.blank:  # guidance needs it
            text = expand(self.empty, HALF)
        with torch.no_grad(), self.switch.off():
            frozen = self.denoiser.predict_noise(x_t, t, text)
        return F.mse_loss(self.denoiser.predict_noise(x_t, t, text).float(), frozen.float())

    def _noising(self, scene: Scene) -> Noising:
        return Noising(*draw_noise(scene.latents, HALF, len(self.alphas), self.generator))

    def _noised(
        self, scene: Scene, noising: Noising
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_t, t and the noise, on the model's device."""
        index, t, noise = noising
        x_t, device = q_sample(scene.latents[index], noise, self.alphas[t]), self.denoiser.device
        return x_t.to(device), t.to(device), noise.to(device)

    def _random(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=self.generator)
