"""What the methods that train share: adapters on the layers of a scope, and how they are fitted."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from ..errors import ForgetError
from ..models.adapters import FullAdapter, LowRankAdapter, attached
from ..models.attention_maps import AttentionProbe
from ..models.families import layers, layers_by_name
from ..models.module_patching import checkpointed
from ..models.sampling import expand, step_count
from .loop import Optimiser, scale_for
from .memory import estimate, planned, plans
from .run import Training, parameters_of

SCOPES = ("kv", "attention", "not-attention", "unet")
ESTIMATES = {}  # of memory, by all that decides them: each takes a second or two
MOST_ESTIMATES = 100
# How often a run looks at the first concept's attention, each time for a forward: so many times, or
LOOKS, STEPS_A_LOOK = 7, 25  # every so many steps, if that is more.


def in_scope(family, scope):
    """The U-Net layers a scope trains, in forward order.

    ``kv``: keys and values of cross-attention. ``attention``: all of cross-attention.
    ``not-attention``: all but cross-attention. ``unet``: every Linear and Conv2d.

    Raises:
        ForgetError: it is a model of which we do not know these layers.
    """
    wanted = {
        "kv": lambda layer: layer.is_key_or_value,
        "attention": lambda layer: layer.is_cross_attention,
        "not-attention": lambda layer: not layer.is_cross_attention,
        "unet": lambda layer: True,
    }[scope]
    chosen = [layer for layer in layers(family) if wanted(layer)]
    if not chosen or (scope == "not-attention" and len(chosen) == len(layers(family))):
        raise ForgetError(
            f"{family.title} has no layers that are known to do this part alone: set layers to all."
        )
    return chosen


@contextmanager
def autograd():
    """Decorator of a method's ``run``: ComfyUI runs nodes in inference mode, whose tensors
    autograd refuses."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def reference_latents(model, concept, side):
    """Latents [N, 4, h, w] of a concept's pictures, ``side`` pixels wide (0: the family's).

    Raises:
        ForgetError: the VAE is another model's.
    """
    latents = model.encode_images(concept.images, side or model.family.resolution)
    if latents.shape[1] != 4:
        raise ForgetError(
            f"This VAE gives {latents.shape[1]} channels, but {model.family.title} reads 4: "
            "use the VAE of the same checkpoint."
        )
    return latents


def make_adapters(module_of, names, settings, device, downs=None):
    """Fresh adapters: layer name -> ``LowRankAdapter``, or ``FullAdapter`` if the settings say so.

    Args:
        settings: has ``rank``, ``seed``, and may have ``full_weights``.
        downs: layer name -> [r, in], fixed lora_down matrices.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    full = getattr(settings, "full_weights", False)
    adapters = {}
    for name in names:
        module, down = module_of(name), (downs or {}).get(name)
        adapters[name] = (
            FullAdapter(module, device)
            if full
            else LowRankAdapter(module, settings.rank, generator, device, down)
        )
    return adapters


def shuffled_cycle(values, generator):
    """The values in a shuffled order, then in another one, without end."""
    while True:
        for index in torch.randperm(len(values), generator=generator).tolist():
            yield values[index]


def learn(
    model, concepts, settings, scope, open_loss, optimiser=None, probe_inputs=(), on_step=None,
    downs=None, rehearsed=None,
):  # fmt: skip
    """Train adapters on a U-Net and make the patch.

    Args:
        settings: a method's, with ``steps`` (a concept), ``lr``, ``rank``, ``seed`` and
            ``checkpointing``.
        scope: of ``SCOPES``.
        open_loss: (denoiser, switch, apart) -> context manager that gives two functions: one picks
            at random what the next step trains on, which costs little, the other makes a loss of
            it, or its parts; see ``train.train``. The switch turns the adapters off; ``apart``
            asks for one part a prompt.
        optimiser: ``Optimiser``; None takes AdamW as released with ``settings.lr``.
        probe_inputs: what ``AttentionProbe`` takes; its first entry is shown as training goes on.
        on_step: see ``methods.forget``.
        downs: see ``make_adapters``.
        rehearsed: (denoiser, batch) -> context manager that gives ``plan.estimate`` the loss of
            so many prompts; None takes a forward and backward pass of ``probe_inputs[0]``.

    Raises:
        ForgetError: memory ran out.
        NonFiniteLoss: training blew up; it carries the patch of the last good step.
    """
    names = [layer.name for layer in in_scope(model.family, scope)]
    total, batch = settings.steps * len(concepts), getattr(settings, "batch", 1)
    training = Training(model, concepts, settings, on_step)
    with model.borrow_denoiser() as denoiser:
        # The first layer of inpainting and editing variants has another shape: it stays.
        names = [name for name in names if _as_expected(model.family, denoiser, name)]
        report = _Report(model, denoiser, probe_inputs, on_step, total)
        in_place = not model.family.known

        @contextmanager
        def adapted(plan):
            adapters = make_adapters(denoiser.module, names, settings, denoiser.device, downs)
            blocks = denoiser.checkpoint_blocks() if plan.checkpointing else []
            with attached(adapters, denoiser.module) as switch, checkpointed(blocks, in_place):
                yield adapters, switch

        def estimate_of(plan):
            if not (probe_inputs and model.family.known):
                return None
            step, rows = (
                rehearsed or partial(_plain_step, probe_inputs[0]),
                1 if plan.apart else batch,
            )
            text, _, latent = probe_inputs[0]
            alike = (
                type(model), model.family.key, denoiser.device, type(settings), *names,
                settings.rank, getattr(settings, "full_weights", False), rows, latent.shape,
                text.context.shape, plan.checkpointing, downs is None,
                denoiser.module(names[0]).weight.dtype, bool(getattr(settings, "prior", 0)),
            )  # fmt: skip
            if alike not in ESTIMATES:
                if len(ESTIMATES) == MOST_ESTIMATES:
                    ESTIMATES.clear()
                with adapted(plan) as (adapters, _), step(denoiser, rows) as loss_of:
                    parameters = parameters_of(adapters)
                    ESTIMATES[alike] = estimate(denoiser, model.family, parameters, loss_of)
            return ESTIMATES[alike]

        def trained(plan, note):
            report.note = note
            with (
                adapted(plan) as (adapters, switch),
                open_loss(denoiser, switch, plan.apart) as (draw, loss),
            ):
                training.put_on(adapters, switch, denoiser)
                training.check_steps(total)  # before many draws
                for _ in range(training.tries):
                    draw()
                scale = scale_for(denoiser.module(names[0]))
                how = optimiser or Optimiser(settings.lr)
                training.run(lambda index: loss(draw()), total, how, report, scale)
                return training

        ways = plans(settings.checkpointing, batch)
        planned(trained, ways, estimate_of, denoiser.device)
    return training.finish()


def _as_expected(family, denoiser, name):
    shape = layers_by_name(family)[name].shape
    return tuple(denoiser.module(name).weight.shape) == tuple(shape)


@contextmanager
def _plain_step(probe_inputs, denoiser, batch):
    """A forward and backward pass of a batch of one prompt."""
    text, _, latent = probe_inputs
    x = latent[:1].expand(batch, -1, -1, -1)
    t = torch.full((batch,), step_count(denoiser) // 2)
    yield lambda: denoiser.predict_noise(x, t, expand(text, batch)).square().sum()


class _Report:
    """Adds the first concept's attention, looked at now and then, to what a step tells."""

    def __init__(self, model, denoiser, probe_inputs, on_step, total):
        self.on_step, self.total, self.denoiser = on_step or (lambda step: None), total, denoiser
        self.probe, self.now, self.note = None, None, ""
        if probe_inputs:
            self.probe = AttentionProbe(
                model.family, probe_inputs[:1], denoiser.alphas_cumprod, steps=(0.5,)
            )
            self.now = self.probe.measure(denoiser)[0]
        self.before = self.now

    def __call__(self, step):
        often = max(1, min(self.total // LOOKS, STEPS_A_LOOK))
        if self.probe and (step.index % often == 0 or step.index == step.total):
            self.now = self.probe.measure(self.denoiser)[0]
        self.on_step(replace(step, before=self.before, now=self.now, note=self.note))
