"""What the methods that train share: adapters on layers, the loop, and the patch they end in."""

from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from .errors import ForgetError, NonFiniteLoss
from .families import layers
from .forwards import checkpointed
from .lowrank import Full, LowRank, attached
from .patch import ForgetPatch, new_info
from .probe import Probe
from .resume import record_of, state_of
from .supervisor import Supervisor
from .train import Optimiser, train

SCOPES = ("kv", "attention", "not-attention", "unet")
SMOOTHED = 10  # losses whose mean says which step was best
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
    """Fresh adapters: layer name -> ``LowRank``, or ``Full`` if the settings say so.

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
            Full(module, device)
            if full
            else LowRank(module, settings.rank, generator, device, down)
        )
    return adapters


def learn(
    model, concepts, settings, scope, open_loss, optimiser=None, looked_at=(), on_step=None,
    downs=None,
):  # fmt: skip
    """Train adapters on a U-Net and make the patch.

    Args:
        settings: a method's, with ``steps`` (a concept), ``lr``, ``rank``, ``seed`` and
            ``checkpointing``.
        scope: of ``SCOPES``.
        open_loss: (borrowed, switch) -> context manager that gives two functions: one picks at
            random what the next step trains on, which costs little, the other makes a loss of it.
            The switch turns the adapters off.
        optimiser: ``Optimiser``; None takes AdamW as released with ``settings.lr``.
        looked_at: what ``Probe`` takes; its first entry is shown as training goes on.
        on_step: see ``methods.forget``.
        downs: see ``make_adapters``.

    Raises:
        NonFiniteLoss: training blew up; it carries the patch of the last good step.
    """
    names = [layer.name for layer in in_scope(model.family, scope)]
    total = settings.steps * len(concepts)
    training = Training(model, concepts, settings, on_step)
    with model.borrow() as borrowed:
        adapters = make_adapters(borrowed.module, names, settings, borrowed.device, downs)
        blocks = borrowed.checkpoint_blocks() if settings.checkpointing else []
        report = _Report(model, borrowed, looked_at, on_step, total)
        with (
            attached(adapters, borrowed.module) as switch,
            open_loss(borrowed, switch) as (draw, loss),
            checkpointed(blocks, in_place=not model.family.known),
        ):
            training.put_on(adapters, switch, borrowed)
            for _ in range(training.tries):
                draw()
            half = borrowed.module(names[0]).weight.dtype == torch.float16
            optimiser = optimiser or Optimiser(settings.lr)
            training.run(lambda index: loss(draw()), total, optimiser, report, half)
    return training.finish()


class Training:
    """A run of a method that trains. Step callbacks get it as ``Step.training``.

    Attributes:
        switch: turns the adapters off.
        borrowed: the U-Net in training, which draws as it is now; None if text is trained.
    """

    def __init__(self, model, concepts, settings, on_step=None):
        self.model, self.concepts, self.settings = model, concepts, settings
        self.base, self.method = model.fingerprint(), type(settings).__module__.rpartition(".")[2]
        self.record = record_of(model, self.base, self.method, asdict(settings), concepts)
        supervisor = on_step if isinstance(on_step, Supervisor) else Supervisor()
        self.begun, self.keeps_best = supervisor.resume, supervisor.keep_best
        self.tries, self.loop, self.best, self.error = 0, None, None, None

    def put_on(self, adapters, switch, borrowed=None):
        """Say what is trained; sets it as it was, if a run is resumed."""
        self.adapters, self.switch, self.borrowed = adapters, switch, borrowed
        self.parameters = {
            f"{name}.{part}": parameter
            for name, adapter in adapters.items()
            for part, parameter in adapter.named_parameters()
        }
        if self.begun:
            self.loop = self.begun.put_on(self.parameters)
            self.tries, self.best = self.loop.tries, self.begun.best() if self.keeps_best else None

    def run(self, loss_at, steps, optimiser, on_step, half):
        """Train; see ``fit``."""
        if self.loop and len(self.loop.losses) >= steps:
            raise ForgetError(
                f"'{self.begun.name}' has {len(self.loop.losses)} steps behind it and {steps} are "
                "asked for: set more steps."
            )

        def told(step):
            self.loop = step.loop
            if self.keeps_best:
                self._keep_best(step.losses)
            on_step(replace(step, training=self))

        found = fit(self.adapters, loss_at, steps, optimiser, told, half, self.loop)
        self.losses, self.error = found

    def _keep_best(self, losses):
        if len(losses) < SMOOTHED:
            return
        mean = sum(losses[-SMOOTHED:]) / SMOOTHED
        if self.best is None or mean < self.best[0]:
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.best = mean, len(losses), kept

    def state(self):
        """The ``resume.State`` after the last step."""
        return state_of(self.record, self.parameters, self.loop, self.best)

    def patch(self):
        """The patch that the adapters make as they are."""
        return self._patch(self.loop.losses)

    def _patch(self, losses):
        return patch_of(
            self.model, self.base, self.concepts, self.settings, self.adapters, list(losses)
        )

    def finish(self):
        """The patch that the run ends in.

        Raises:
            NonFiniteLoss: training blew up; it carries the patch of the last good step.
        """
        if self.error:
            self.error.patch = self._patch(self.losses)
            raise self.error
        if self.best is None:
            return self._patch(self.losses)
        _, step, kept = self.best
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
        return self._patch(self.losses[:step])


def fit(adapters, loss_at, steps, optimiser, on_step, half, begun=None):
    """Train adapters in place.

    Args:
        half: the model is in float16, which loses small gradients; see ``train``.
        begun: ``train.Loop`` to go on with.

    Returns:
        the losses, and the NonFiniteLoss that ended them early or None.
    """
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    scale = 1024.0 if half else 1.0
    try:
        return train(parameters, loss_at, steps, optimiser, on_step, scale, begun), None
    except NonFiniteLoss as caught:
        if len(caught.losses) < 2:  # nothing learnt that could be kept
            raise
        return caught.losses, caught


def patch_of(model, base, concepts, settings, adapters, losses):
    """The patch that trained adapters make."""
    changes, worst = {}, 0.0
    for name, adapter in adapters.items():
        up, down, error = adapter.factors(settings.rank)
        changes[name] = up.cpu().clone(), down.cpu().clone()
        worst = max(worst, error)
    method = type(settings).__module__.rpartition(".")[2]
    info = new_info(model, base, method, asdict(settings), concepts, losses, worst)
    return ForgetPatch(model.family, changes, info)


class _Report:
    """Adds the first concept's attention, looked at now and then, to what a step tells."""

    def __init__(self, model, borrowed, looked_at, on_step, total):
        self.on_step, self.total, self.borrowed = on_step or (lambda step: None), total, borrowed
        self.probe = self.now = None
        if looked_at:
            self.probe = Probe(model.family, looked_at[:1], borrowed.alphas_cumprod, steps=(0.5,))
            self.now = self.probe.look(borrowed)[0]
        self.before = self.now

    def __call__(self, step):
        often = max(1, min(self.total // LOOKS, STEPS_A_LOOK))
        if self.probe and (step.index % often == 0 or step.index == step.total):
            self.now = self.probe.look(self.borrowed)[0]
        self.on_step(replace(step, before=self.before, now=self.now))
