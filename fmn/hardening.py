"""A patch trained to stand attacks: words learned to summon the concept, and pictures of it.

Editing how text is read leaves the concept in the model: words learned from its pictures go around
the edit, and a picture begun by another model is finished. So a low-rank change of the layers that
write into the picture is trained, on noised pictures of the concept, away from what the frozen
model predicts, whatever the text: the concept's prompts, other prompts, none, and words that
adversaries learn at the same time (as in AdvUnlearn and STEREO). Kept prompts hold it.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .adversaries import adversaries
from .closed_form import cut
from .families import layers
from .forwards import checkpointed
from .lowrank import Fixed, LowRank, attached
from .model import Text, rows
from .sampling import ddim, expand, guided
from .schedule import add_noise
from .train import Optimiser
from .training import fit

# What attention and feed-forward write into the picture.
ENDINGS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
ADVERSARIES = 4  # a concept, each with words of its own
LIFE = 60  # steps of an adversary until it starts anew
DRAWING_STEPS = 12
AT_ONCE = 4  # drawings
LOOKS = 0.3, 0.5, 0.7, 0.9  # shares of the schedule at which a style shows
MOST = 10.0  # that a small difference is enlarged
EMPTY = 6  # one in so many steps keeps what the empty prompt gives
HALF = 4  # pictures of the concept a step, and as many kept ones


@dataclass(frozen=True)
class Scene:
    """Noise-free latents [n, 4, h, w], and the texts they were drawn from; [n, 77, D] each.

    Attributes:
        other: the same texts without the concept; of kept scenes None.
        blanks: its prompts with ``PLACEHOLDER`` in place of the concept.
        index: which rows of the scene that it was chosen from.
    """

    latents: torch.Tensor
    text: Text
    other: Text | None = None
    blanks: tuple[str, ...] = ()
    index: torch.Tensor | None = None


def hardened_layers(family):
    """The layers that are trained, by name."""
    return [layer.name for layer in layers(family) if layer.name.endswith(ENDINGS)]


@torch.no_grad()
def draw_scene(borrowed, text, empty, settings, side, on_batch, other=None, blanks=()):
    """Draw texts with the model as it is: a ``Scene`` whose latents are on the CPU."""
    generator, found = torch.Generator().manual_seed(settings.seed), []
    for first in range(0, len(text.context), AT_ONCE):
        some = rows(text, slice(first, first + AT_ONCE))
        noise = torch.randn(len(some.context), 4, side, side, generator=generator)
        predict = guided(borrowed, some, empty, settings.guidance)
        noise = noise.to(borrowed.device)
        latents = ddim(predict, noise, borrowed.alphas_cumprod, DRAWING_STEPS)
        found.append(latents.float().cpu())
        on_batch()
    return Scene(torch.cat(found), text, other, blanks)


def count(settings, concepts, styles=0):
    """How often ``harden`` tells how far it is; ``styles`` of the concepts are styles."""
    if not settings.robust_steps:
        return 0
    own, left = picture_counts(settings)
    total = (batches(own) + settings.robust_steps) * concepts + batches(left)
    for _ in range(styles):
        total += len(LOOKS) * batches(left)
        left = half(left)
    return total


def batches(pictures):
    return -(-pictures // AT_ONCE)


def half(pictures):
    return max(1, pictures // 2)


def picture_counts(settings):
    """Pictures drawn of each concept, and of all that is kept."""
    return settings.robust_pictures, 2 * settings.robust_pictures


def harden(model, borrowed, changes, concepts, kept, styled, empty, settings, on_step):
    """Train a patch further; see the module.

    Args:
        changes: layer name -> (up, down), of the patch to begin with.
        concepts: for each a ``Text`` [n, 77, D], the same without the concept, and its prompts
            with ``PLACEHOLDER`` in its place.
        kept: ``Text``. styled: for each style to forget the same in that style.
        settings: of ``reread``.
        on_step: gets the loss after each step, 0 after each batch that is drawn; ``count`` times.

    Returns:
        the changes, the losses, and the ``NonFiniteLoss`` that ended training early or None.
    """

    def drawn():
        on_step(0.0)

    def trained(step):
        on_step(step.losses[-1])

    side = (settings.size or model.family.resolution) // 8
    scenes, (own, others) = [], picture_counts(settings)
    for text, other, blanks in concepts:
        turns = torch.arange(own) % len(text.context)
        text, other = rows(text, turns), rows(other, turns)
        scenes.append(draw_scene(borrowed, text, empty, settings, side, drawn, other, blanks))
    turns = torch.arange(others) % len(kept.context)
    kept = draw_scene(borrowed, rows(kept, turns), empty, settings, side, drawn)
    for text in styled:
        kept = least_like(borrowed, kept, rows(text, turns), settings, drawn)
        turns = turns[kept.index]
    names = hardened_layers(model.family)
    generator = torch.Generator().manual_seed(settings.seed)
    adapters = {
        name: LowRank(borrowed.module(name), settings.robust_rank, generator, borrowed.device)
        for name in names
    }
    # The patch itself stays as it is: trained along, it would be given up for what is kept.
    worn = {name: Fixed([(*factors, 1.0)], borrowed.device) for name, factors in changes.items()}
    is_half = borrowed.module(names[0]).weight.dtype == torch.float16
    optimiser = Optimiser(settings.robust_lr, weight_decay=0.0, decay=True)
    blocks = borrowed.checkpoint_blocks() if settings.checkpointing else []
    with (
        attached(worn, borrowed.module) as patch,
        attached(adapters, borrowed.module) as switch,
        checkpointed(blocks),
        adversaries(model, borrowed) as adversary,
    ):
        switches = patch, switch
        loss_at = Hardening(
            borrowed, adapters, switches, scenes, kept, empty, adversary, settings, is_half
        )
        steps = settings.robust_steps * len(scenes)
        losses, error = fit(adapters, loss_at, steps, optimiser, trained, is_half)
    rank = max(up.shape[1] for up, _ in changes.values())
    return joined(changes, adapters, rank), losses, error


@torch.no_grad()
def least_like(borrowed, scene, styled, settings, on_batch):
    """The half of a scene that looks least like a style.

    A model draws some style where it is asked for none. If that is to be forgotten, such pictures
    would keep it. They are told by the frozen model's error on them, given the prompt as it is and
    in the style (a diffusion classifier, Li et al. 2023, arXiv 2303.16203).

    Args:
        styled: the scene's prompts with the style.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    alphas, gain = borrowed.alphas_cumprod.cpu(), torch.zeros(len(scene.latents))
    for share in LOOKS:
        t = torch.full((len(scene.latents),), int(share * len(alphas)))
        noise = torch.randn(scene.latents.shape, generator=generator)
        x_t = add_noise(scene.latents, noise, alphas[t])
        for some in torch.arange(len(t)).split(AT_ONCE):
            for text, sign in ((scene.text, 1), (styled, -1)):
                place = x_t[some].to(borrowed.device), t[some].to(borrowed.device)
                found = borrowed.denoise(*place, rows(text, some)).float().cpu()
                gain[some] += sign * (found - noise[some]).square().flatten(1).mean(1)
            on_batch()
    best = gain.argsort()[: half(len(gain))].sort().values
    return Scene(scene.latents[best], rows(scene.text, best), index=best)


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


class Hardening:
    """The loss of each step; use while ``adapters`` are attached.

    Args:
        concepts: a ``Scene`` for each. kept: a ``Scene``.
        empty: the empty prompt.
        switches: of the patch and of the attached adapters.
        adversary: function from a ``Scene`` and a generator to a ``Words`` or ``Context``.
        settings: of ``reread``. half: the model is in float16.
    """

    def __init__(
        self, borrowed, adapters, switches, concepts, kept, empty, adversary, settings, half
    ):
        self.borrowed, self.switches, self.settings = borrowed, switches, settings
        self.adversary = adversary
        self.scale = 1024.0 if half else 1.0  # float16 loses small gradients; see ``train``
        self.parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
        self.concepts, self.kept, self.empty = concepts, kept, empty
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.alphas = borrowed.alphas_cumprod.cpu()
        self.adversaries = [[None] * ADVERSARIES for _ in concepts]

    def __call__(self, step):
        number = step % len(self.concepts)
        scene, turn = self.concepts[number], step // len(self.concepts)
        own = self.adversaries[number]
        slot = turn % ADVERSARIES
        if own[slot] is None or own[slot].age >= LIFE:
            own[slot] = self.adversary(scene, self.generator)
        self._attack(scene, own[slot])
        forget, keep = self._forget(scene, own), self._keep()
        return forget + self.settings.robust_preserve * keep

    def _attack(self, scene, adversary):
        """One step of an adversary: what it learns shall predict the noise on the pictures."""
        _, x_t, t, noise = self._noised(scene)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        predicted = self.borrowed.denoise(x_t, t, expand(adversary.alone(), HALF))
        loss = F.mse_loss(predicted.float(), noise)
        (gradient,) = torch.autograd.grad(loss * self.scale, [adversary.learned])
        if torch.isfinite(gradient).all():
            adversary.learned.grad = gradient
            adversary.optimiser.step()
        else:
            self.scale = max(1.0, self.scale / 2)
        adversary.age += 1
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _forget(self, scene, adversaries):
        index, x_t, t, _ = self._noised(scene)
        own, other = rows(scene.text, index), rows(scene.other, index)
        with torch.no_grad(), self._frozen():
            texts = Text.cat([own, other, expand(self.empty, HALF)])
            found = self.borrowed.denoise(x_t.repeat(3, 1, 1, 1), t.repeat(3), texts).float()
        predicted = self.borrowed.denoise(x_t, t, self._any_text(own, other, adversaries))
        return F.mse_loss(predicted.float(), away(*found.chunk(3), self.settings.robust_push))

    def _any_text(self, own, other, adversaries):
        """For each picture a text: a quarter its own, half an adversary's, the rest any other."""
        met = [each for each in adversaries if each is not None]
        texts = []
        for i, kind in enumerate(self._random(4, HALF).tolist()):
            if kind == 0:
                texts.append(rows(own, slice(i, i + 1)))
            elif kind < 3:
                with torch.no_grad():
                    texts.append(met[int(self._random(len(met), 1))].text())
            else:
                j = int(self._random(len(self.kept.text.context), 1))
                kept = rows(self.kept.text, slice(j, j + 1))
                others = self.empty, kept, rows(other, slice(i, i + 1))
                texts.append(others[int(self._random(3, 1))])
        return Text.cat(texts)

    def _keep(self):
        index, x_t, t, _ = self._noised(self.kept)
        text = rows(self.kept.text, index)
        if self._random(EMPTY, 1) == 0:  # guidance needs it
            text = expand(self.empty, HALF)
        with torch.no_grad(), self._frozen():
            wanted = self.borrowed.denoise(x_t, t, text)
        return F.mse_loss(self.borrowed.denoise(x_t, t, text).float(), wanted.float())

    @contextmanager
    def _frozen(self):
        """The model without any change."""
        patch, trained = self.switches
        with patch.off(), trained.off():
            yield

    def _noised(self, scene):
        """Pictures at time steps spread over the schedule: index, x_t, t, noise."""
        index = self._random(len(scene.latents), HALF)
        share = (torch.arange(HALF) + torch.rand(HALF, generator=self.generator)) / HALF
        t = (share * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        clean = scene.latents[index]
        noise = torch.randn(clean.shape, generator=self.generator)
        x_t = add_noise(clean, noise, self.alphas[t])
        device = self.borrowed.device
        return index, x_t.to(device), t.to(device), noise.to(device)

    def _random(self, high, count):
        return torch.randint(high, (count,), generator=self.generator)
