"""A patch that acts only on prompts near its concepts.

The semi-permeable membrane (SPM, Lyu et al. 2024, arXiv 2312.16145) multiplies an eraser by how
close a prompt is to what it erases. Here the gate multiplies the patch's own output once, so the
change is linear in the gate, and several patches do not mix.
"""

import torch
from torch.nn.functional import normalize

from ..concepts.concept import TEMPLATES, Concept, Prompt
from ..errors import ForgetError
from ..models.token_positions import CHUNK, flagged_positions

TEMPLATE_OTHERS = "a photo of {}"  # for kinds without a template of their own
LOW, HIGH = 0.85, 0.95  # chosen on the demo model; benchmarks/guidance.py gate prints why
NOISE = 1e-2  # part of a token's length below which it counts as the empty prompt's


class Gate:
    """From the encoded prompt of each sample to how far a patch is let through, 0 to 1.

    Args:
        probes: [k, D] a naming of a concept: its tokens' vectors, less the empty prompt's.
        empty: the encoded empty prompt, [77, D].
        low, high: closeness at which the gate starts to open, and at which it is open.
    """

    def __init__(self, probes, empty, low=LOW, high=HIGH):
        if not -1 <= low < high <= 1:
            raise ForgetError(
                f"The gate opens from {low} to {high}: use -1 to 1, and low below high."
            )
        self.low, self.high, self.empty = low, high, empty
        self.tokens = normalize(torch.cat(probes), dim=-1)
        lengths = torch.tensor([len(probe) for probe in probes])
        owner = torch.arange(len(probes)).repeat_interleave(lengths)
        self.average = (owner == torch.arange(len(probes))[:, None]) / lengths[:, None]

    def closeness(self, context):
        """How clearly each prompt names a concept: 1 in the probe's own words, 0 if empty.

        For each token of a naming, the best cosine with any token of the prompt; their mean; the
        best of all namings. That is the recall of BERTScore (Zhang et al. 2020), the soft
        form of SPM's token overlap. Vectors are taken less the empty prompt's at the same place,
        so a prompt's weights, which ComfyUI counts from there, do not change it.

        Args:
            context: encoded prompts [B, T, D].

        Returns:
            [B].
        """
        context = context.float()
        place = torch.arange(context.shape[1]) % CHUNK
        empty = self.empty[place].to(context)
        least = NOISE * empty.norm(dim=-1).mean()
        tokens = context - empty
        tokens = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(least)
        best = torch.einsum("kd,btd->bkt", self.tokens.to(context), tokens).amax(-1)
        return (best @ self.average.to(context).T).amax(-1)

    def __call__(self, context):
        return ((self.closeness(context) - self.low) / (self.high - self.low)).clamp(0, 1)


class Gated:
    """An adapter of ``fmn.models.adapters`` whose output is multiplied by each sample's gate.

    Args:
        amount: [B].
    """

    def __init__(self, adapter, amount):
        self.adapter, self.amount = adapter, amount

    def __call__(self, module, x):
        added = self.adapter(module, x)
        # Tiled attention splits a sample into several rows, next to each other.
        amount = self.amount.repeat_interleave(len(added) // len(self.amount))
        return added * amount.view(-1, *[1] * (added.dim() - 1)).to(added)


def subjects_of(patch):
    """Names and aliases with their kinds, from a patch's record; they are a stranger's text.

    Raises:
        ForgetError: it names nothing, or not in words.
    """
    found = []
    for concept in patch.info.get("concepts", []):
        aliases = concept.get("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
            raise ForgetError("The patch's list of aliases is damaged: get the file again.")
        name, kind = concept["name"], concept["kind"]
        # A category of unsafe content stands for all of its terms.
        names = Concept(name, kind).subjects if kind == "unsafe" else (name,)
        found += [(word, kind) for word in (*names, *aliases)]
    if not found:
        raise ForgetError(
            "This patch does not say what it forgets, so no prompt can open it: use Apply Forget "
            "Patch."
        )
    return found


def patch_gate(model, patch, low=LOW, high=HIGH):
    """The gate that a patch's own concepts open.

    Each name and alias is looked for as it reads alone and as it reads in its kind's template.

    Args:
        model: ``fmn.models.interface.Model``; prompts must be encoded by the same text encoder.
    """
    places = []
    for name, kind in subjects_of(patch):
        for template in ("{}", TEMPLATES.get(kind, TEMPLATE_OTHERS)):
            prompt = Prompt(template.replace("{}", name), name)
            ids = model.tokenize(prompt)
            subject = model.tokenize(prompt._replace(text=name))
            places.append((prompt.text, flagged_positions(prompt, ids, subject, "none")))
    empty, *contexts = model.encode_all(["", *(text for text, _ in places)])
    probes = [(context - empty)[at] for context, (_, at) in zip(contexts, places)]
    return Gate(probes, empty, low, high)
