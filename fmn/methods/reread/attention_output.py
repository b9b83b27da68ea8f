"""What cross-attention reads out of a text, for any text, without running the U-Net again.

The queries of cross-attention come from the picture, and editing what is read changes them little.
So they are recorded in a few drawings. What a layer would read out of another text is then a small
softmax: with queries q, the contexts c_t of its 77 tokens and a head's W_k, W_v,

    x = sum_t softmax_t(q . W_k c_t / sqrt(d)) c_t,    o = W_v x,

and the o of all heads side by side is the input of the layer's ``to_out``.
"""

from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from einops import rearrange

from ...models.interface import Text, cross_attention_names
from ...models.sampling import ddim, guided, seeded_noise, trailing_timesteps

TEXTS_AT_ONCE = 32


class Layer(NamedTuple):
    """One cross-attention layer; ``key`` and ``value`` are [H, d, D], float32."""

    name: str
    key: torch.Tensor
    value: torch.Tensor


def cross_attention_layers(denoiser, family):
    """The ``Layer`` of every attn2 module, in forward order, on the model's device."""
    found = []
    for name in cross_attention_names(family):
        module = denoiser.module(name)
        key, value = (
            rearrange(part.weight.detach().float(), "(h d) c -> h d c", h=module.heads)
            for part in (module.to_k, module.to_v)
        )
        found.append(Layer(name, key, value))
    return found


@torch.no_grad()
def read_out(layer, queries, contexts):
    """What a layer reads out of texts: the input of its ``to_out``.

    W_k is multiplied into the queries, as there are fewer of them than tokens.

    Args:
        queries: [N, S, H d], S places of the picture for each text. contexts: [N, T, D].

    Returns:
        [N, S, H d]
    """
    heads, width, _ = layer.key.shape
    found = []
    for part, texts in zip(queries.split(TEXTS_AT_ONCE), contexts.split(TEXTS_AT_ONCE)):
        texts = texts.to(layer.key)
        q = rearrange(part.to(layer.key), "n s (h d) -> n h s d", h=heads) * width**-0.5
        scores = torch.einsum("nhsd,hdc,ntc->nhst", q, layer.key, texts)
        read = torch.einsum("nhst,ntc->nhsc", scores.softmax(-1), texts)
        out = torch.einsum("nhsc,hdc->nhsd", read, layer.value)
        found.append(rearrange(out, "n h s d -> n s (h d)"))
    return torch.cat(found)


@contextmanager
def recorded(denoiser, family, places, seed):
    """Yields a function from a batch size B to what was recorded last and is then dropped.

    That is layer name -> [B, S, C]: the queries of ``places`` random places of each of the first B
    samples, of all forwards since, S = forwards x places.
    """
    generator = torch.Generator().manual_seed(seed)
    names = cross_attention_names(family)
    seen = {name: [] for name in names}

    def hook_of(name):
        def hook(module, args, output):
            count = output.shape[1]
            chosen = torch.randperm(count, generator=generator)[: min(places, count)]
            seen[name].append(output[:, chosen.to(output.device)].detach().float())

        return hook

    def taken(batch):
        found = {name: torch.cat([each[:batch] for each in seen[name]], 1) for name in names}
        for each in seen.values():
            each.clear()
        return found

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(
                denoiser.module(f"{name}.to_q").register_forward_hook(hook_of(name))
            )
        yield taken


@torch.no_grad()
def record_queries(
    denoiser, family, texts, empty, settings, side, batch=4, on_batch=None, numbers=None
):
    """Draw texts, and record queries on the way: layer name -> [N, S, C].

    Args:
        texts: encoded prompts, [1, 77, D] each. empty: the empty one.
        settings: has ``sampling_steps``, ``guidance``, ``query_positions`` and ``seed``; text i
            starts from the noise of seed + i.
        side: latents' height and width.
        on_batch: called after each batch, may raise.
        numbers: seeds of the texts' noise, in place of those.
    """
    parts = []
    numbers = numbers or range(settings.seed, settings.seed + len(texts))
    with recorded(denoiser, family, settings.query_positions, settings.seed) as taken:
        for first in range(0, len(texts), batch):
            some = Text.cat(texts[first : first + batch])
            count = len(some.context)
            noise = seeded_noise(numbers[first : first + count], side).to(denoiser.device)
            predict = guided(denoiser, some, empty, settings.guidance)
            steps, alphas = settings.sampling_steps, denoiser.alphas_cumprod
            x = ddim(predict, noise, alphas, steps, last=steps - 1)
            # Nothing is drawn from the last step, so it needs no guidance.
            t = torch.full((count,), trailing_timesteps(len(alphas), steps)[-1])
            denoiser.predict_noise(x, t, some)
            parts.append(taken(count))
            if on_batch:
                on_batch()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
