"""What cross-attention reads out of a text, for any text, without running the U-Net again.

The queries of cross-attention come from the picture, and editing what is read changes them little.
So they are recorded in a few drawings. What a layer would read out of another text is then a small
softmax: with queries q, the contexts c_t of its 77 tokens and a head's W_k, W_v,

    x = sum_t softmax_t(q . W_k c_t / sqrt(d)) c_t,    o = W_v x,

and the o of all heads side by side is the input of the layer's ``to_out``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ...models.families import UNetFamily, cross_attention_names
from ...models.interface import Text, UNet
from ...models.sampling import ddim, guided, seeded_noise, trailing_timesteps

TEXTS_AT_ONCE = 32

Queries = dict[str, Tensor]  # layer name -> [N, S, C], S queries of each of N drawings


class CrossAttention(NamedTuple):
    """One cross-attention layer; ``key`` and ``value`` are [H, d, D], float32."""

    name: str
    key: Tensor
    value: Tensor


def cross_attention_layers(denoiser: UNet, family: UNetFamily) -> list[CrossAttention]:
    """Every attn2 module, in forward order, on the model's device."""
    layers = []
    modules: list[Any] = denoiser.cross_attention_modules()
    for name, module in zip(cross_attention_names(family), modules):
        weights = (denoiser.weight(f"{name}.{part}").float() for part in ("to_k", "to_v"))
        key, value = (rearrange(w, "(h d) c -> h d c", h=module.heads) for w in weights)
        layers.append(CrossAttention(name, key, value))
    return layers


@torch.no_grad()
def read_out(layer: CrossAttention, queries: Tensor, contexts: Tensor) -> Tensor:
    """What a layer reads out of texts: the input o of its ``to_out``, [N, S, H d].

    W_k is multiplied into the queries, as there are fewer of them than tokens.

    Args:
        queries: [N, S, H d], S positions in the picture for each text.
        contexts: [N, T, D].
    """
    heads, width, _ = layer.key.shape
    outputs = []
    for part, texts in zip(queries.split(TEXTS_AT_ONCE), contexts.split(TEXTS_AT_ONCE)):
        texts = texts.to(layer.key)
        q = rearrange(part.to(layer.key), "n s (h d) -> n h s d", h=heads) * width**-0.5
        scores = torch.einsum("nhsd,hdc,ntc->nhst", q, layer.key, texts)  # q . W_k c_t / sqrt(d)
        read = torch.einsum("nhst,ntc->nhsc", scores.softmax(-1), texts)  # x
        out = torch.einsum("nhsc,hdc->nhsd", read, layer.value)  # o = W_v x
        outputs.append(rearrange(out, "n h s d -> n s (h d)"))
    return torch.cat(outputs)


@contextmanager
def recorded(
    denoiser: UNet, family: UNetFamily, positions: int, seed: int
) -> Iterator[Callable[[int], Queries]]:
    """Yields a function from a batch size B to the queries recorded since its last call.

    They are layer name -> [B, S, C]: the queries at random positions of each of the first B
    samples, of all forwards since, S = forwards x positions.
    """
    generator = torch.Generator().manual_seed(seed)
    queries: dict[str, list[Tensor]] = {name: [] for name in cross_attention_names(family)}

    def hook_of(name: str) -> Callable[[object, object, Tensor], None]:
        def hook(module: object, args: object, output: Tensor) -> None:
            count = output.shape[1]
            chosen = torch.randperm(count, generator=generator)[: min(positions, count)]
            queries[name].append(output[:, chosen.to(output.device)].detach().float())

        return hook

    def take(batch: int) -> Queries:
        taken = {name: torch.cat([q[:batch] for q in some], 1) for name, some in queries.items()}
        for some in queries.values():
            some.clear()
        return taken

    with ExitStack() as hooks:
        for name in queries:
            module = denoiser.module(f"{name}.to_q")
            hooks.enter_context(module.register_forward_hook(hook_of(name)))
        yield take


@torch.no_grad()
def record_queries(
    denoiser: UNet,
    family: UNetFamily,
    texts: Sequence[Text],
    empty: Text,
    settings: Any,
    side: int,
    batch: int = 4,
    on_batch: Callable[[], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> Queries:
    """Draw texts, and record queries on the way.

    Args:
        texts: encoded prompts, [1, 77, D] each.
        settings: has ``sampling_steps``, ``guidance``, ``query_positions`` and ``seed``.
        side: latents' height and width.
        on_batch: called after each batch, may raise.
        seeds: of the texts' noise; by default text i has the settings' seed + i.
    """
    parts = []
    seeds = seeds or range(settings.seed, settings.seed + len(texts))
    with recorded(denoiser, family, settings.query_positions, settings.seed) as take:
        for first in range(0, len(texts), batch):
            some = Text.cat(texts[first : first + batch])
            count = len(some.context)
            noise = seeded_noise(seeds[first : first + count], side).to(denoiser.device)
            predict = guided(denoiser, some, empty, settings.guidance)
            steps, alphas = settings.sampling_steps, denoiser.alphas_cumprod
            x = ddim(predict, noise, alphas, steps, last=steps - 1)
            # Nothing is drawn from the last step, so it needs no guidance.
            t = torch.full((count,), trailing_timesteps(len(alphas), steps)[-1])
            denoiser.predict_noise(x, t, some)
            parts.append(take(count))
            if on_batch:
                on_batch()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
