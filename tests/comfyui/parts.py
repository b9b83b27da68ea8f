"""Small concepts and settings, made from the pack under test; what a model is and carries."""

import torch


def concept(pack, name="dog", **more):
    return pack("fmn.concepts.concept").Concept(name, **more)


def settings(pack, **more):
    """Of a short run that draws nothing to train on."""
    given = {"steps": 3, "lr": 0.002, "references": "zeros"}
    return pack("fmn.methods.resteer").Settings(**given | more)


def state(patcher):
    """Weights as bytes: some that no checkpoint holds are NaN."""
    return {
        key: value.to("cpu", copy=True).flatten().view(torch.uint8)
        for key, value in patcher.model.state_dict().items()
    }


def same_bits(first, second):
    """The demo has no text projection: that weight is whatever the memory held, NaN included."""
    return first.keys() == second.keys() and all(
        first[key].numpy().tobytes() == second[key].numpy().tobytes() for key in first
    )


def gradient_flags(patcher):
    return {name: parameter.requires_grad for name, parameter in patcher.model.named_parameters()}


def leftovers(module):
    """Names of modules with hooks or a replaced forward."""
    return [
        name
        for name, part in module.named_modules()
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    ]
