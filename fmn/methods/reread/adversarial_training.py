"""A patch trained to stand attacks: words learned to summon the concept, and pictures of it.

Editing how text is read leaves the concept in the model: words learned from its pictures go around
the edit, and a picture begun by another model is finished. So a low-rank change of the layers that
write into the picture is trained, on noised pictures of the concept, away from what the frozen
model predicts, whatever the text: the concept's prompts, other prompts, none, and words that
adversaries learn at the same time (as in AdvUnlearn and STEREO). Kept prompts hold it.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...linalg import cut
from ...models.adapters import FixedAdapter, LowRankAdapter, attached
from ...models.families import layers
from ...models.interface import Text, rows
from ...models.module_patching import checkpointed
from ...models.sampling import expand, q_sample
from ...training.loop import Optimiser, scale_for, set_moments
from ...training.run import parameters_of
from .adversaries import adversaries
from .training_images import Scene

# What attention and feed-forward write into the picture.
ENDINGS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
ADVERSARIES = 4  # a concept, each with words of its own
LIFE = 60  # steps of an adversary until it starts anew
MOST = 10.0  # that a small difference is enlarged
EMPTY = 6  # one in so many steps keeps what the empty prompt gives
HALF = 4  # pictures of the concept a step, and as many kept ones


def hardened_layers(family):
    """The layers that are trained, by name."""
    return [layer.name for layer in layers(family) if layer.name.endswith(ENDINGS)]


def harden(training, denoiser, changes, scenes, kept, empty, made, on_step):
    """Train a patch further; see the module. ``training.finish`` gives it.

    Args:
        training: ``training.Training``, of settings of ``reread``.
        changes: layer name -> (up, down), of the patch to begin with.
        scenes: a ``Scene`` for each concept. kept: a ``Scene``. empty: the empty prompt.
        made: function from changes and losses to the patch.
        on_step: see ``methods.forget``.

    Raises:
        NonFiniteLoss: at once, so that nothing was learnt.
    """
    model, settings = training.model, training.settings
    names = hardened_layers(model.family)
    generator = torch.Generator().manual_seed(settings.seed)
    adapters = {
        name: LowRankAdapter(
            denoiser.module(name), settings.robust_rank, generator, denoiser.device
        )
        for name in names
    }
    # The patch itself stays as it is: trained along, it would be given up for what is kept.
    worn = {
        name: FixedAdapter([(*factors, 1.0)], denoiser.device) for name, factors in changes.items()
    }
    scale = scale_for(denoiser.module(names[0]))
    optimiser = Optimiser(settings.robust_lr, weight_decay=0.0, decay=True)
    blocks = denoiser.checkpoint_blocks() if settings.checkpointing else []
    rank = max(up.shape[1] for up, _ in changes.values())
    with (
        attached(worn, denoiser.module) as switch,
        attached(adapters, denoiser.module, switch),
        checkpointed(blocks),
        adversaries(model, denoiser) as adversary,
    ):
        training.put_on(
            adapters, switch, denoiser, lambda losses: made(joined(changes, adapters, rank), losses)
        )
        loss = Hardening(
            denoiser, adapters, switch, scenes, kept, empty, adversary, settings, scale
        )
        for _ in range(training.tries):
            loss.pick()
        loss.set_moments(training.put_beside(loss.learned))
        steps = settings.robust_steps * len(scenes)
        training.run(lambda index: loss(loss.pick()), steps, optimiser, on_step, scale)


def joined(changes, adapters, rank):
    """Both changes in one: layer name -> (up, down) on the CPU.

    Args:
        rank: of layers that both change; what is less is cut off.
    """
    made = {}
    for name, adapter in adapters.items():
        up, down = (factor.cpu() for factor in adapter.factors(0)[:2])
        if name in changes:
            own = changes[name]
            up, down = torch.cat([own[0], up], 1), torch.cat([own[1], down])
            up, down = (factor.float() for factor in cut(up.double(), down.double(), rank)[:2])
        made[name] = up, down
    return made


def away(concept, without, empty, push):
    """e(without) - push g (e(concept) - e(without)), all [B, 4, h, w].

    ESD's target, with g = |e(concept) - e(empty)| / |e(concept) - e(without)| and at least 1: a
    style that is drawn anyway makes little difference, and is moved away from as far as others.
    """
    whole, own = ((concept - other).flatten(1).norm(dim=1) for other in (empty, without))
    scale = (whole / own.clamp_min(1e-12)).clamp(1.0, MOST).view(-1, 1, 1, 1)
    return without - push * scale * (concept - without)


class Places(NamedTuple):
    """Pictures of a scene at time steps spread over the schedule; all on the CPU."""

    index: torch.Tensor  # [HALF]
    t: torch.Tensor  # [HALF]
    noise: torch.Tensor  # [HALF, 4, h, w]


class Picked(NamedTuple):
    """What is random in a step.

    Attributes:
        scene, adversary: whose turn it is.
        attacked, forgotten, kept: ``Places``.
        texts: functions without arguments that give a text each, for those forgotten.
        blank: whether those kept have the empty prompt.
    """

    scene: Scene
    adversary: object
    attacked: Places
    forgotten: Places
    texts: list
    kept: Places
    blank: bool


class Hardening:
    """The loss of each step; use while ``adapters`` are attached.

    Args:
        concepts: a ``Scene`` for each. kept: a ``Scene``.
        empty: the empty prompt.
        switch: of the patch and of the attached adapters.
        adversary: function from a ``Scene`` and a generator to a ``Words`` or ``Context``.
        settings: of ``reread``. scale: of the adversaries' losses; see ``train``.
    """

    def __init__(
        self, denoiser, adapters, switch, concepts, kept, empty, adversary, settings, scale
    ):
        self.denoiser, self.switch, self.settings = denoiser, switch, settings
        self.adversary, self.picks = adversary, 0
        self.scale = torch.tensor(scale)
        self.parameters = parameters_of(adapters)
        self.concepts, self.kept, self.empty = concepts, kept, empty
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.alphas = denoiser.alphas_cumprod.cpu()
        self.adversaries = [[None] * ADVERSARIES for _ in concepts]

    def learned(self):
        """What learns beside the patch; see ``Training.put_beside``."""
        found = {"scale": (self.scale, None)}
        for name, each in self._living():
            found[name] = each.learned, each.optimiser.state.get(each.learned)
        return found

    def set_moments(self, moments):
        for name, each in self._living():
            if moments.get(name):
                set_moments(each.optimiser, [moments[name]])

    def _living(self):
        """(name, adversary) of all."""
        for number, own in enumerate(self.adversaries):
            for slot, each in enumerate(own):
                if each is not None:
                    yield f"{number}.{slot}", each

    def pick(self):
        """What the next step trains on, ``Picked``; costs next to nothing."""
        turn, number = divmod(self.picks, len(self.concepts))
        self.picks += 1
        scene, own, slot = self.concepts[number], self.adversaries[number], turn % ADVERSARIES
        if own[slot] is None or own[slot].age >= LIFE:
            own[slot] = self.adversary(scene, self.generator)
        own[slot].age += 1
        attacked, forgotten = self._places(scene), self._places(scene)
        texts = self._pick_texts(scene, forgotten.index, [each for each in own if each is not None])
        kept, blank = self._places(self.kept), int(self._random(EMPTY, 1)) == 0
        return Picked(scene, own[slot], attacked, forgotten, texts, kept, blank)

    def _pick_texts(self, scene, index, met):
        """For each picture a text: a quarter its own, half an adversary's, the rest any other."""
        texts = []
        for i, kind in zip(index.split(1), self._random(4, HALF).tolist()):
            if kind == 0:
                texts.append(partial(rows, scene.text, i))
            elif kind < 3:
                adversary = met[int(self._random(len(met), 1))]
                texts.append(partial(adversary.text, adversary.pick()))
            else:
                j = self._random(len(self.kept.text.context), 1)
                others = (self.empty, slice(0, 1)), (self.kept.text, j), (scene.other, i)
                texts.append(partial(rows, *others[int(self._random(3, 1))]))
        return texts

    def __call__(self, picked):
        self._attack(picked)
        return self._forget(picked) + self.settings.robust_preserve * self._keep(picked)

    def _attack(self, picked):
        """One step of an adversary: what it learns shall predict the noise on the pictures."""
        adversary = picked.adversary
        x_t, t, noise = self._noised(picked.scene, picked.attacked)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        predicted = self.denoiser.predict_noise(x_t, t, expand(adversary.alone(), HALF))
        loss = F.mse_loss(predicted.float(), noise)
        (gradient,) = torch.autograd.grad(loss * self.scale, [adversary.learned])
        if torch.isfinite(gradient).all():
            adversary.learned.grad = gradient
            adversary.optimiser.step()
        else:
            self.scale = (self.scale / 2).clamp(min=1.0)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _forget(self, picked):
        scene, index = picked.scene, picked.forgotten.index
        x_t, t, _ = self._noised(scene, picked.forgotten)
        with torch.no_grad(), self.switch.off():
            own, other = rows(scene.text, index), rows(scene.other, index)
            texts = Text.cat([own, other, expand(self.empty, HALF)])
            found = self.denoiser.predict_noise(x_t.repeat(3, 1, 1, 1), t.repeat(3), texts).float()
        with torch.no_grad():
            texts = Text.cat([text() for text in picked.texts])
        predicted = self.denoiser.predict_noise(x_t, t, texts)
        return F.mse_loss(predicted.float(), away(*found.chunk(3), self.settings.robust_overshoot))

    def _keep(self, picked):
        x_t, t, _ = self._noised(self.kept, picked.kept)
        text = rows(self.kept.text, picked.kept.index)
        if picked.blank:  # guidance needs it
            text = expand(self.empty, HALF)
        with torch.no_grad(), self.switch.off():
            wanted = self.denoiser.predict_noise(x_t, t, text)
        return F.mse_loss(self.denoiser.predict_noise(x_t, t, text).float(), wanted.float())

    def _places(self, scene):
        index = self._random(len(scene.latents), HALF)
        share = (torch.arange(HALF) + torch.rand(HALF, generator=self.generator)) / HALF
        t = (share * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        shape = HALF, *scene.latents.shape[1:]
        return Places(index, t, torch.randn(shape, generator=self.generator))

    def _noised(self, scene, places):
        """x_t, t and the noise of some places, where the model is."""
        index, t, noise = places
        x_t = q_sample(scene.latents[index], noise, self.alphas[t])
        return (each.to(self.denoiser.device) for each in (x_t, t, noise))

    def _random(self, high, count):
        return torch.randint(high, (count,), generator=self.generator)
