"""Hooks, frozen weights and replaced forwards of loaded modules, for a while."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


@contextmanager
def autograd() -> Iterator[None]:
    """Leave inference mode, in which ComfyUI runs nodes and whose tensors autograd refuses."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def pre_hooked(
    modules: Iterable[nn.Module], hook: Callable[..., Any], with_kwargs: bool = False
) -> Iterator[None]:
    """A forward pre-hook on each module; see ``torch.nn.Module.register_forward_pre_hook``."""
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
            hooks.enter_context(handle)
        yield


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Weights without gradient, in a context where autograd works."""
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for module in modules:
                module.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


@contextmanager
def replaced(
    modules: Iterable[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
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


def checkpointed(
    modules: Iterable[nn.Module], in_place: bool = False
) -> AbstractContextManager[None]:
    """Recompute these modules in backward instead of storing what is inside them.

    Args:
        in_place: they may write into their inputs and into what their backward needs, for which
            torch's own checkpoint silently gives wrong gradients. The caller is inside
            ``saved_tensors.copied_before_writing``.
    """
    if in_place:
        return replaced(modules, lambda module: partial(_recomputed, module.forward))
    return replaced(
        modules,
        lambda module: partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        ),
    )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    leaves, input_spec = tree_flatten((args, kwargs))
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in indices]
    for i in indices:
        leaves[i] = None
    output_specs = []

    def run(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        inputs = list(leaves)
        for i, tensor in zip(indices, tensors):
            inputs[i] = tensor.clone()
        args, kwargs = tree_unflatten(inputs, input_spec)
        outputs, spec = tree_flatten(forward(*args, **kwargs))
        output_specs.append(spec)
        return tuple(outputs)

    # Only outputs of inputs with gradient get one, and the first block's inputs have none.
    anchor = torch.zeros((), requires_grad=True)
    outputs = _Recompute.apply(run, anchor, *tensors)
    return tree_unflatten(list(outputs), output_specs[0])


class _Recompute(torch.autograd.Function):
    """``run(tensors)``, which is called again in backward; it has parameters of its own."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], anchor: Tensor, *tensors: Tensor) -> Any:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = [
            tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors
        ]
        with torch.enable_grad():
            outputs = ctx.run(tensors)
        needed = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients)
            if isinstance(output, Tensor) and output.requires_grad
        ]
        if needed:
            outputs, gradients = zip(*needed)
            torch.autograd.backward(outputs, gradients)
        return None, None, *(tensor.grad for tensor in tensors)
