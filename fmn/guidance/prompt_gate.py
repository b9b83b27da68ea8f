"""A patch that acts only on prompts near its concepts.

The semi-permeable membrane (SPM, Lyu et al. 2024, arXiv 2312.16145) multiplies an eraser by how
close a prompt is to what it erases. Here the gate multiplies the patch's own output once, so the
change is linear in the gate, and several patches do not mix.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..concepts.concept import TEMPLATES, Concept, Prompt
from ..errors import ForgetError
from ..models.interface import UNetModel
from ..models.token_positions import CHUNK, flagged_positions

OTHER_TEMPLATE = "a photo of {}"  # for kinds without a template of their own
LOW, HIGH = 0.85, 0.95  # chosen on the demo model; benchmarks/guidance.py gate prints why
NOISE = 1e-2  # part of a token's length below which it counts as the empty prompt's


class HasInfo(Protocol):
    """``patches.patch.ForgetPatch``, of which a gate needs the record alone."""

    info: dict[str, Any]


class Gate:
    """From the encoded prompt of each sample to the weight of a patch, 0 to 1.

    Args:
        probes: [k, D] for each phrase: its tokens' vectors less the empty prompt's.
        empty: the encoded empty prompt, [77, D].
        low, high: closeness at which the gate starts to open, and at which it is open.
    """

    def __init__(
        self, probes: Sequence[Tensor], empty: Tensor, low: float = LOW, high: float = HIGH
    ) -> None:
        if not -1 <= low < high <= 1:
            raise ForgetError(
                f"The gate opens from {low} to {high}: use -1 to 1, and low below high."
            )
        self.low, self.high, self.empty = low, high, empty
        self.tokens = normalize(torch.cat(list(probes)), dim=-1)  # [K, D], of all phrases
        lengths = torch.tensor([len(probe) for probe in probes])
        phrase = torch.arange(len(probes)).repeat_interleave(lengths)  # [K]
        self.average = (phrase == torch.arange(len(probes))[:, None]) / lengths[:, None]

    def closeness(self, context: Tensor) -> Tensor:
        """How clearly each prompt names a concept: 1 for a phrase itself, 0 if empty.

        For each token of a phrase, the best cosine with any token of the prompt; their mean; the
        best of all phrases. That is the recall of BERTScore (Zhang et al. 2020), the soft
        form of SPM's token overlap. Vectors are taken less the empty prompt's at the same place,
        so a prompt's weights, which ComfyUI counts from there, do not change it.

        Args:
            context: encoded prompts [B, T, D]; the result is [B].
        """
        context = context.float()
        empty = self.empty[torch.arange(context.shape[1]) % CHUNK].to(context)
        shortest = NOISE * empty.norm(dim=-1).mean()
        tokens = context - empty
        tokens = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(shortest)
        best = torch.einsum("kd,btd->bkt", self.tokens.to(context), tokens).amax(-1)
        return (best @ self.average.to(context).T).amax(-1)

    def __call__(self, context: Tensor) -> Tensor:
        return ((self.closeness(context) - self.low) / (self.high - self.low)).clamp(0, 1)


class Gated:
    """An adapter of ``fmn.models.adapters`` times each sample's gate [B]."""

    def __init__(
        self, adapter: Callable[[torch.nn.Module, Tensor], Tensor], amount: Tensor
    ) -> None:
        self.adapter, self.amount = adapter, amount

    def __call__(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        added = self.adapter(module, x)
        # Tiled attention splits a sample into several rows, next to each other.
        amount = self.amount.repeat_interleave(len(added) // len(self.amount))
        return added * amount.view(-1, *[1] * (added.dim() - 1)).to(added)


def subjects_of(patch: HasInfo) -> list[tuple[str, str]]:
    """(name or alias, kind) of what a patch forgets, by its untrusted record.

    Raises:
        ForgetError: the record names nothing, or is damaged.
    """
    subjects = []
    for concept in patch.info.get("concepts", []):
        aliases = concept.get("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
            raise ForgetError("The patch's list of aliases is damaged: get the file again.")
        name, kind = concept["name"], concept["kind"]
        # A category of unsafe content stands for all of its terms.
        names = Concept(name, kind).subjects if kind == "unsafe" else (name,)
        subjects += [(word, kind) for word in (*names, *aliases)]
    if not subjects:
        raise ForgetError(
            "This patch does not say what it forgets, so no prompt can open it: use Apply Forget "
            "Patch."
        )
    return subjects


def patch_gate(model: UNetModel, patch: HasInfo, low: float = LOW, high: float = HIGH) -> Gate:
    """The gate that a patch's concepts open: each name and alias alone, and in its kind's template.

    Prompts must be encoded by the same text encoder as the model's.
    """
    texts, positions = [], []
    for name, kind in subjects_of(patch):
        for template in ("{}", TEMPLATES.get(kind, OTHER_TEMPLATE)):
            prompt = Prompt(template.replace("{}", name), name)
            texts.append(prompt.text)
            positions.append(flagged_positions(model.tokenize, prompt, "none"))
    empty, *contexts = model.encode_all(["", *texts])
    probes = [(context - empty)[at] for context, at in zip(contexts, positions)]
    return Gate(probes, empty, low, high)
