"""A run of training: the loop over adapters, its best step, and the patch it ends in."""

from dataclasses import asdict, replace

import torch

from ..errors import ForgetError, NonFiniteLoss
from ..patches.metadata import new_info
from ..patches.patch import ForgetPatch
from .loop import train
from .resume import record_of, state_of

SMOOTHED = 10  # losses whose mean says which step was best


class Training:
    """A run of a method that trains. Step callbacks get it as ``Step.training``.

    Attributes:
        switch: turns the adapters off.
        borrowed: the U-Net in training, which draws as it is now; None if text is trained.
    """

    def __init__(self, model, concepts, settings, on_step=None):
        self.model, self.concepts, self.settings = model, concepts, settings
        self.base = model.fingerprint()
        self.record = record_of(model, self.base, settings, concepts)
        supervisor = on_step if isinstance(on_step, Supervisor) else Supervisor()
        self.begun, self.keeps_best = supervisor.resume, supervisor.keep_best
        self.tries, self.loop, self.best, self.error = 0, None, None, None

    def put_on(self, adapters, switch, borrowed=None, make=None):
        """Say what is trained; sets it as it was, if a run is resumed.

        Args:
            make: function from the losses to the patch; None: the adapters are all of it.
        """
        self.adapters, self.switch, self.borrowed = adapters, switch, borrowed
        self.make, self.beside = make, None
        self.tries, self.loop, self.best = 0, None, None  # memory may have run out in a first try
        self.parameters = {
            f"{name}.{part}": parameter
            for name, adapter in adapters.items()
            for part, parameter in adapter.named_parameters()
        }
        if self.begun:
            self.loop = self.begun.put_on(self.parameters)
            self.tries, self.best = self.loop.tries, self.begun.best() if self.keeps_best else None

    def check_steps(self, steps):
        """Refuse to go on where no step is left."""
        if self.begun and len(self.begun.losses) >= steps:
            raise ForgetError(
                f"'{self.begun.name}' has {len(self.begun.losses)} steps behind it and {steps} are "
                "asked for: set more steps."
            )

    def put_beside(self, learned_of):
        """Say what else learns, which is no part of the patch, and set it as it was.

        Args:
            learned_of: function without arguments that gives, as it is now, name -> (tensor, its
                moments or None).

        Returns:
            name -> moments to go on with; none if no run is resumed.
        """
        self.beside = learned_of
        if not self.begun:
            return {}
        return self.begun.put_beside({name: both[0] for name, both in learned_of().items()})

    def run(self, loss_at, steps, optimiser, on_step, scale):
        """Train; see ``fit``."""
        self.check_steps(steps)

        def told(step):
            self.loop = step.loop
            if self.keeps_best:
                self._keep_best(step.losses)
            on_step(replace(step, training=self))

        found = fit(self.adapters, loss_at, steps, optimiser, told, scale, self.loop)
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
        beside = self.beside() if self.beside else {}
        return state_of(self.record, self.parameters, self.loop, self.best, beside)

    def patch(self):
        """The patch that the adapters make as they are."""
        return self._patch(self.loop.losses)

    def _patch(self, losses):
        if self.make:
            return self.make(list(losses))
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


def parameters_of(adapters):
    return [p for adapter in adapters.values() for p in adapter.parameters()]


def fit(adapters, loss_at, steps, optimiser, on_step, scale, begun=None):
    """Train adapters in place; arguments as of ``train``.

    Returns:
        the losses, and the NonFiniteLoss that ended them early or None.
    """
    parameters = parameters_of(adapters)
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
    told = settings.method, asdict(settings)
    info = new_info(model, base, *told, concepts, losses, worst)
    return ForgetPatch(model.family, changes, info)


class Supervisor:
    """A step callback that also says where training begins and which step it ends with.

    Methods pass it on as any other callback; only ``fitting`` reads the rest.

    Args:
        on_step: called with each ``train.Step``; may raise to cancel.
        resume: ``resume.State`` of an earlier run to go on with.
        keep_best: the patch is that of the step with the lowest mean of the last
            ``fitting.SMOOTHED`` losses; False: of the last step.
    """

    def __init__(self, on_step=lambda step: None, resume=None, keep_best=False):
        self.on_step, self.resume, self.keep_best = on_step, resume, keep_best

    def __call__(self, step):
        self.on_step(step)
