"""Adversarial training of the tiny model, against edited weights and plain loops."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept, Prompt
from fmn.methods.reread import adversarial_training, adversaries, method, training_images
from fmn.methods.reread.adversarial_training import (
    ADVERSARIES,
    HALF,
    MAX_GAIN,
    AdversarialLoss,
    away,
    trained_layers,
)
from fmn.methods.reread.adversaries import FREE
from fmn.methods.reread.training_images import Scene
from fmn.models.adapters import LowRankAdapter, attached, fixed_adapters
from fmn.models.families import CLIP_G, CLIP_L
from fmn.models.interface import Text
from fmn.patches.lora_keys import PARTS
from fmn.patches.patch import save_patch
from fmn.patches.task import Task
from fmn.training.run import TrainingOptions

from ..literal import near
from ..tiny import TINY, TinyDenoiser, TinyModel, TinyTextEncoder, random_changes
from .test_reread_run import FEW, STEPS

SETTINGS = replace(
    FEW, overshoot=0.7, rank=3, robust_steps=2, robust_pictures=2, robust_rank=2,
    robust_overshoot=1.5, robust_preserve=2.0, robust_lr=0.01,
)  # fmt: skip
DOG, CAR = Concept("dog", anchor="cat", prompts=("my dog on grass",)), Concept("car")
NAMES = trained_layers(TINY)
BLANKS = ("a photo of <*>", "my <*> on grass", "<*> in a forest")
ALPHAS = TinyDenoiser(TinyModel()).alphas_cumprod.tolist()
CHANGES = random_changes(TINY, 3, lambda layer: layer.name.endswith("attn2.to_out.0"), size=0.2)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(training_images, "DRAWING_STEPS", 3)
    return TinyModel()


def text_of(model, *prompts):
    return Text.cat([model.encode(Prompt(prompt, prompt)) for prompt in prompts])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scenes_of(model):
    """Of two concepts, and of what is kept; the pictures are noise."""
    dog, bare, car, red = ("my dog", "a dog by day"), ("my", "a by day"), ("red car",), ("red",)
    pairs = [[text_of(model, *side) for side in sides] for sides in ((dog, bare), (car, red))]
    kept = text_of(model, "", "blue house", "a man on a horse")
    found = [Scene(random(len(one[0].context), 4, 8, 8, seed=7), *one, BLANKS) for one in pairs]
    return found, Scene(random(3, 4, 8, 8, seed=5), kept)


@contextmanager
def opened(model, settings=SETTINGS, concepts=2, scale=1.0):
    """(loss, adapters) with a patch and adapters that both change the model."""
    (own, kept), generator = scenes_of(model), torch.Generator().manual_seed(3)
    with model.borrow_denoiser() as denoiser:
        adapters = {
            name: LowRankAdapter(denoiser.module(name), 2, generator, "cpu") for name in NAMES
        }
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.up, std=0.05, generator=generator)
        with (
            attached(fixed_adapters(CHANGES, "cpu"), denoiser.module) as switch,
            attached(adapters, denoiser.module, switch),
            adversaries.adversaries(model, denoiser) as new_adversary,
        ):
            given = own[:concepts], kept, text_of(model, ""), new_adversary, settings, scale
            yield AdversarialLoss(denoiser, adapters, switch, *given), adapters


def test_away_is_the_formula_and_its_clamps():
    concept, step = random(5, 4, 2, 2), random(5, 4, 2, 2, seed=1)
    lengths = [0.1, 1.0, 0.5, 0.01, 0.0]  # of e(concept) - e(without); that to e(empty) is 0.8
    without = torch.stack([c - length * s for c, s, length in zip(concept, step, lengths)])
    found = away(concept, without, concept - 0.8 * step, 1.5)
    torch.testing.assert_close(found, literal_away(concept, without, concept - 0.8 * step, 1.5))
    for i, scale in enumerate([min(8.0, MAX_GAIN), 1.0, 1.6, min(80.0, MAX_GAIN), 1.0]):
        wanted = without[i] - 1.5 * scale * lengths[i] * step[i]
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(away(concept, concept, concept, 1.5), concept)


def literal_away(concept, without, empty, push):
    found = []
    for c, w, e in zip(concept, without, empty):
        whole, own = (math.sqrt(float(((c - other) ** 2).sum())) for other in (e, w))
        found.append(w - push * min(max(whole / max(own, 1e-12), 1.0), MAX_GAIN) * (c - w))
    return torch.stack(found)


@pytest.mark.parametrize("rank", [5, 3, 1])
def test_joined_is_the_best_cut_of_both(model, rank):
    with opened(model) as (_, adapters):
        made = adversarial_training.joined(CHANGES, adapters, rank)
    assert list(made) == NAMES and set(CHANGES) < set(NAMES)
    for name, (up, down) in made.items():
        own = adapters[name]
        assert up.dtype == down.dtype == torch.float32 and not up.requires_grad
        if name not in CHANGES:
            assert torch.equal(up, own.up) and torch.equal(down, own.down)
            continue
        both = (CHANGES[name][0] @ CHANGES[name][1] + own.up @ own.down).detach()
        u, s, vh = torch.linalg.svd(both.double())
        assert up.shape[1] == len(down) == rank
        near((up @ down).double(), u[:, :rank] * s[:rank] @ vh[:rank], 1e-5)  # 5: all there is


@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_scenes_are_drawn_by_ddim(model, monkeypatch, at_once):
    """How many are drawn at once does not matter."""
    monkeypatch.setattr(training_images, "AT_ONCE", at_once)
    text, empty = text_of(model, *(f"word{i}" for i in range(6))), text_of(model, "")
    settings, told = replace(SETTINGS, guidance=2.5, seed=4), []
    with model.borrow_denoiser() as denoiser:
        given = denoiser, text, empty, settings, 8, lambda: told.append(len(model.seen))
        scene = training_images.draw_scene(*given, text, BLANKS)
    assert told == [3 * (i + 1) for i in range(-(-6 // at_once))]
    assert scene.text is scene.other is text and scene.blanks == BLANKS and len(scene.latents) == 6
    for i, x in enumerate(random(6, 4, 8, 8, seed=4)):
        x = x[None]
        for now, following in ((999, 666), (666, 332), (332, None)):
            both = text.context[i][None], empty.context
            with torch.no_grad():
                found, other = (model.unet(x, now, context).sample for context in both)
            noise = other + 2.5 * (found - other)
            alpha, later = ALPHAS[now], 1.0 if following is None else ALPHAS[following]
            clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
            x = math.sqrt(later) * clean + math.sqrt(1 - later) * noise
        near(scene.latents[i], x[0], 1e-4)


def stepped(loss_at):
    return loss_at(loss_at.pick())


class Literal:
    """The same losses from two U-Nets, picture by picture, without hooks."""

    def __init__(self, model, adapters, concepts, settings):
        self.model, self.settings = model, settings
        self.scenes, self.kept = scenes_of(model)
        self.frozen, self.unet = (TinyModel().unet.requires_grad_(False) for _ in range(2))
        trained = {name: (each.up, each.down) for name, each in adapters.items()}
        for name, (up, down) in (*CHANGES.items(), *trained.items()):
            self.unet.get_submodule(name).weight += (up @ down).detach()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.adversaries = [[None] * adversarial_training.ADVERSARIES for _ in range(concepts)]

    def pick(self, high, count=1):
        return torch.randint(high, (count,), generator=self.generator).tolist()

    def noised(self, latents):
        index = self.pick(len(latents), HALF)
        share = torch.rand(HALF, generator=self.generator).tolist()
        noise = torch.randn(HALF, *latents.shape[1:], generator=self.generator)
        for i in range(HALF):
            t = int((i + share[i]) * len(ALPHAS) / HALF)
            x_t = math.sqrt(ALPHAS[t]) * latents[index[i]] + math.sqrt(1 - ALPHAS[t]) * noise[i]
            yield index[i], x_t[None], t, noise[i][None]

    def words(self, prompt, learned):
        return TinyTextEncoder(self.model).encode(prompt, learned)[0].context

    def fresh(self):
        """Two random directions, as long as words are; age, vectors, optimiser."""
        directions = random(2, TINY.context_dim, seed=self.pick(1 << 30)[0])
        known = TinyTextEncoder(self.model).vectors("a photo of")
        length = sum(float(v.norm()) for v in known) / len(known)
        learned = torch.stack([length * v / v.norm() for v in directions]).requires_grad_()
        return [0, learned, torch.optim.Adam([learned], lr=adversaries.WORD_LR)]

    def __call__(self, step):
        number, turn = step % len(self.adversaries), step // len(self.adversaries)
        scene, own = self.scenes[number], self.adversaries[number]
        slot = turn % len(own)
        if own[slot] is None or own[slot][0] == adversarial_training.LIFETIME:
            own[slot] = self.fresh()
        own[slot][0] += 1
        _, learned, adam = own[slot]
        context, loss = self.words(BLANKS[0], learned), 0.0
        for _, x_t, t, noise in self.noised(scene.latents):
            loss += ((self.unet(x_t, t, context).sample - noise) ** 2).mean() / HALF
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            forget = self.forget(scene, [each[1] for each in own if each])
            return float(forget + self.settings.robust_preserve * self.keep())

    def forget(self, scene, met):
        empty, drawn, loss = text_of(self.model, "").context, list(self.noised(scene.latents)), 0.0
        for kind, (i, x_t, t, _) in zip(self.pick(4, HALF), drawn):
            own, other = scene.text.context[i][None], scene.other.context[i][None]
            if kind == 0:
                text = own
            elif kind < 3:
                learned = met[self.pick(len(met))[0]]
                text = self.words(BLANKS[self.pick(len(BLANKS))[0]], learned)
            else:
                kept = self.kept.text.context[self.pick(len(self.kept.text.context))[0]]
                text = (empty, kept[None], other)[self.pick(3)[0]]
            found = [self.frozen(x_t, t, context).sample for context in (own, other, empty)]
            target = literal_away(*found, self.settings.robust_overshoot)
            loss += ((self.unet(x_t, t, text).sample - target) ** 2).mean() / HALF
        return loss

    def keep(self):
        drawn, loss = list(self.noised(self.kept.latents)), 0.0
        text = (
            text_of(self.model, "").context
            if self.pick(adversarial_training.EMPTY)[0] == 0
            else None
        )
        for i, x_t, t, _ in drawn:
            told = self.kept.text.context[i][None] if text is None else text
            found, wanted = (unet(x_t, t, told).sample for unet in (self.unet, self.frozen))
            loss += ((found - wanted) ** 2).mean() / HALF
        return loss


@pytest.mark.parametrize("seed, concepts, steps", [(0, 1, 3), (1, 2, 11), (2, 2, 4)])
def test_losses_are_the_equations(model, monkeypatch, seed, concepts, steps):
    """With two adversaries of each concept, each of which lives for two of its steps."""
    for name in ("ADVERSARIES", "LIFETIME", "EMPTY"):
        monkeypatch.setattr(adversarial_training, name, 2)
    settings = replace(SETTINGS, seed=seed)
    with opened(model, settings, concepts) as (loss_at, adapters):
        literal = Literal(model, adapters, concepts, settings)
        for step in range(steps):
            assert math.isclose(stepped(loss_at).item(), literal(step), rel_tol=1e-4)
        for own, theirs in zip(sum(loss_at.adversaries, []), sum(literal.adversaries, [])):
            assert own.age == theirs[0]
            near(own.learned.detach(), theirs[1].detach(), 1e-3)


def test_adversaries_grow_old(model, monkeypatch):
    monkeypatch.setattr(adversarial_training, "LIFETIME", 2)
    with opened(model) as (loss_at, _):
        first, second = loss_at.adversaries  # of each concept
        stepped(loss_at)
        assert first[0].age == 1 and {*first[1:], *second} == {None}
        for _ in range(1, 2 * 2 * ADVERSARIES):
            stepped(loss_at)
        olds = [*first, *second]
        assert [each.age for each in olds] == [2] * len(set(olds)) == [2] * 2 * ADVERSARIES
        stepped(loss_at)
        assert first[0].age == 1 and [*first[1:], *second] == olds[1:]


def test_overflow_halves_the_scale_and_leaves_the_words(model, monkeypatch):
    with opened(model, scale=1024.0) as (loss_at, _):
        stepped(loss_at)  # its scale is 1024
        adversary, plain = loss_at.adversaries[0][0], loss_at.denoiser.predict_noise
        picked = loss_at.pick()._replace(scene=loss_at.scenes[0], adversary=adversary)
        before = adversary.learned.detach().clone()
        with monkeypatch.context() as patched:
            patched.setattr(
                loss_at.denoiser, "predict_noise", lambda *given: plain(*given) * math.inf
            )
            loss_at._attack(picked)
        assert loss_at.scale == 512 and torch.equal(adversary.learned, before)
        assert all(p.requires_grad for p in loss_at.parameters)
        loss_at._attack(picked)
        assert loss_at.scale == 512 and not torch.equal(adversary.learned, before)


def test_with_two_text_encoders_contexts_are_learned(model):
    model.family = replace(TINY, texts=(CLIP_L, CLIP_G))
    with opened(model) as (loss_at, _):
        for _ in range(3):
            stepped(loss_at)
    for each in loss_at.adversaries[0][:2]:
        starts = loss_at.scenes[0].other.context
        (start,) = [one for one in starts if torch.equal(one, each.start.context[0])]
        shifts = each.text(0).context[0].detach() - start
        assert float(shifts[0].abs().max()) == 0 and shifts.shape == (77, TINY.context_dim)
        for i, shift in enumerate(shifts[1:]):
            near(shift, each.learned[min(i, FREE)].detach(), 1e-4)
        # Adam's first step moves all that has a gradient by its rate.
        rate = adversaries.CONTEXT_LR * float(start.std())
        near(each.learned.detach().abs(), torch.full((FREE + 1, TINY.context_dim), rate), 0.1)


@pytest.mark.parametrize("concepts", [1, 2])
def test_steps_and_what_is_trained(model, concepts):
    settings, told = replace(SETTINGS, robust_steps=3, robust_pictures=5, robust_rank=1), []
    drawn, made = [], []
    before = {name: (up.clone(), down.clone()) for name, (up, down) in CHANGES.items()}
    own, kept = scenes_of(model)
    spoken = [(scene.text, scene.other, scene.blanks) for scene in own[:concepts]]
    task, empty = Task(model, [DOG, CAR][:concepts], settings, told.append), text_of(model, "")
    with model.borrow_denoiser() as denoiser:
        found = training_images.draw_scenes(
            denoiser, spoken, kept.text, [], empty, settings, 8, lambda: drawn.append(1)
        )
        given = CHANGES, *found, empty, lambda *both: made.append(both)
        training = adversarial_training.train_adversarially(
            task, TrainingOptions(), denoiser, *given
        )
    training.finish()
    ((changes, losses),) = made
    assert len(drawn) == concepts * -(-5 // training_images.AT_ONCE) - (
        -10 // training_images.AT_ONCE
    )
    assert len(drawn) == training_images.batch_count(settings, concepts)
    assert training_images.batch_count(replace(settings, robust_steps=0), concepts) == 0
    assert told[-1].losses == losses and len(losses) == len(told) == 3 * concepts
    assert {step.total for step in told} == {3 * concepts}
    for name, (up, down) in changes.items():
        assert len(down) == (3 if name in CHANGES else 1) and float(up.abs().max()) > 1e-4
    for name, pair in before.items():
        assert all(map(torch.equal, CHANGES[name], pair))
        assert not torch.allclose(torch.matmul(*changes[name]), torch.matmul(*pair), atol=1e-4)


def test_a_run_makes_a_plain_lora(model, tmp_path, monkeypatch):
    steps, settings, plain = [], replace(SETTINGS, rank=2, robust_rank=3), Task.patch
    monkeypatch.setattr(Task, "patch", lambda *given: (plain(*given), given[-1]))
    patch, losses = method.run(model, [DOG, CAR], settings, steps.append)
    total = STEPS + 1 + training_images.batch_count(settings, 2)
    assert [(step.index, step.total) for step in steps] == [
        *((i, total) for i in range(1, total + 1)), *((i, 4) for i in range(1, 5)),
    ]  # fmt: skip
    kinds = {"attn1.to_out.0", "attn2.to_out.0", "ff.net.2"}
    assert {name.rpartition("blocks.0.")[2] for name in patch.changes} == kinds
    ranks = {name: len(down) for name, (_, down) in patch.changes.items()}
    assert ranks == {name: 4 if "attn2" in name else 3 for name in NAMES}
    file = load_file(save_patch(patch, tmp_path / "patch.safetensors"))
    assert sorted(key.partition(".")[2] for key in file) == sorted((*PARTS, "alpha") * len(NAMES))
    assert losses == [1.0, steps[STEPS].losses[-1], *steps[-1].losses]
    again, _ = method.run(model, [DOG, CAR], replace(settings, checkpointing=True))
    for name in NAMES:
        torch.testing.assert_close(again.change_of(name), patch.change_of(name))
