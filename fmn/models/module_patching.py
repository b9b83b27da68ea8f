"""Swapping the forward of modules for a while, and what we use it for."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


@contextmanager
def autograd():
    """Leave inference mode, in which ComfyUI runs nodes and whose tensors autograd refuses."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def replaced(modules, make):
    """Set ``module.forward = make(module)`` on each; puts back what was there, also on error."""
    before = []
    try:
        for module in modules:
            before.append((module, module.__dict__.get("forward")))
            module.forward = make(module)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def checkpointed(modules, in_place=False):
    """Recompute these modules in backward instead of storing what is inside them.

    Args:
        in_place: they may write into what they get and into what their backward needs, for which
            torch's own checkpoint gives wrong gradients in silence. The caller is inside
            ``torch.autograd.graph.allow_mutation_on_saved_tensors``.
    """
    if in_place:
        return replaced(modules, lambda module: partial(_twice, module.forward))
    return replaced(
        modules,
        lambda module: partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        ),
    )


def _twice(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    leaves, form = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None
    forms = []  # of what comes out

    def run(tensors):
        given = list(leaves)
        for i, tensor in zip(places, tensors):
            given[i] = tensor.clone()
        args, kwargs = tree_unflatten(given, form)
        made, made_form = tree_flatten(forward(*args, **kwargs))
        forms.append(made_form)
        return tuple(made)

    # Only outputs of inputs with gradient get one, and the first block's inputs have none.
    anchor = torch.zeros((), requires_grad=True)
    made = _Twice.apply(run, anchor, *tensors)
    return tree_unflatten(list(made), forms[0])


class _Twice(torch.autograd.Function):
    """``run(tensors)``, which is called again in backward; it has parameters of its own."""

    @staticmethod
    def forward(context, run, anchor, *tensors):
        context.run = run
        context.save_for_backward(*tensors)
        return run(tensors)

    @staticmethod
    def backward(context, *gradients):
        tensors = [
            tensor.detach().requires_grad_(tensor.requires_grad) for tensor in context.saved_tensors
        ]
        with torch.enable_grad():
            made = context.run(tensors)
        pairs = [
            (value, gradient)
            for value, gradient in zip(made, gradients)
            if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        return None, None, *(tensor.grad for tensor in tensors)
