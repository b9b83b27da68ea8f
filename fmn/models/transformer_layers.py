"""The layers of the known transformers by all the names that LoRA files give them.

A row is ComfyUI's path and, where that is another, diffusers'; it stands behind the heading above
it, which ends with a colon. ``#`` is a number, and ``{a,b}`` stands for a row each. Several paths
of diffusers for one of ComfyUI are parts of one matrix there. diffusers' names are those that
ComfyUI's ``comfy.utils.flux_to_diffusers`` and its like know, or diffusers' conversions of LoRAs.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

from .transformers import Transformer

# What stands before a path: PEFT's, then kohya's, OneTrainer's, LyCORIS', ComfyUI's or diffusers'.
START = re.compile(
    r"(base_model\.model\.)?((lora_unet|lora_transformer|lycoris)_|(model\.)?diffusion_model\.|"
    r"transformer\.)?_?"
)
NUMBER = re.compile(r"(?<=_)[0-9]{1,4}(?=_|$)")  # of a block, or of a layer of a sequence
SHARES = 1, 1, 1, 4  # of the rows of a joined matrix: query, key, value, feed-forward
FLUX = """
    {img,txt}_in = {x,context}_embedder
    final_layer.linear = proj_out
double_blocks.# = transformer_blocks.#:
    {img,txt}_attn.qkv = attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}
    {img,txt}_attn.proj = attn.to_{out.0,add_out}
    {img,txt}_mlp.{0,2} = {ff,ff_context}.linear_{in,out}
"""
FLUX_1 = FLUX + """
    {img,txt}_mlp.{0,2} = {ff,ff_context}.net.{0.proj,2}
single_blocks.# = single_transformer_blocks.#:
    linear1 = {attn.to_q,attn.to_k,attn.to_v,proj_mlp}
    linear2 = proj_out
"""  # fmt: skip
LAYERS = {
    "flux": """
    {time,vector,guidance}_in.in_layer = time_text_embed.{timestep,text,guidance}_embedder.linear_1
    {time,vector,guidance}_in.out_layer = time_text_embed.{timestep,text,guidance}_embedder.linear_2
    final_layer.adaLN_modulation.1
""" + FLUX_1 + """
    modulation.lin = norm.linear
double_blocks.# = transformer_blocks.#:
    {img,txt}_mod.lin = {norm1,norm1_context}.linear
""",
    "chroma": """
    distilled_guidance_layer.{in,out}_proj
    distilled_guidance_layer.layers.#.{in,out}_layer
""" + FLUX_1,
    "flux2": """
    {time,guidance}_in.in_layer = time_guidance_embed.{timestep,guidance}_embedder.linear_1
    {time,guidance}_in.out_layer = time_guidance_embed.{timestep,guidance}_embedder.linear_2
    double_stream_modulation_{img,txt}.lin = double_stream_modulation_{img,txt}.linear
    single_stream_modulation.lin = single_stream_modulation.linear
    final_layer.adaLN_modulation.1
""" + FLUX + """
single_blocks.# = single_transformer_blocks.#:
    linear{1,2} = attn.to_{qkv_mlp_proj,out}
""",
    "sd3": """
    {t,y}_embedder.mlp.{0,2} = time_text_embed.{timestep,text}_embedder.linear_{1,2}
    x_embedder.proj = pos_embed.proj
    context_embedder
    final_layer.linear = proj_out
    final_layer.adaLN_modulation.1
    joint_blocks.#.context_block.adaLN_modulation.1
joint_blocks.# = transformer_blocks.#:
    {x,context}_block.attn.qkv = attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}
    {x,context}_block.attn.proj = attn.to_{out.0,add_out}
    x_block.attn2.qkv = attn2.to_{q,k,v}
    x_block.attn2.proj = attn2.to_out.0
    {x,context}_block.mlp.fc{1,2} = {ff,ff_context}.net.{0.proj,2}
    x_block.adaLN_modulation.1 = norm1.linear
""",
    "z_image": """
    cap_embedder.1
    x_embedder = all_x_embedder.2-1
    t_embedder.mlp.{0,2}
    final_layer.{linear,adaLN_modulation.1} = all_final_layer.2-1.{linear,adaLN_modulation.1}
{layers,noise_refiner,context_refiner}.#:
    attention.qkv = attention.to_{q,k,v}
    attention.out = attention.to_out.0
    feed_forward.w{1,2,3}
    adaLN_modulation.0
""",
    "lumina2": """
    cap_embedder.1 = time_caption_embed.caption_embedder.1
    x_embedder
    t_embedder.mlp.{0,2}
    final_layer.{linear,adaLN_modulation.1}
{layers,noise_refiner,context_refiner}.#:
    attention.qkv
    attention.out = attn.to_out.0
    feed_forward.w{1,2,3} = feed_forward.linear_{1,2,3}
    adaLN_modulation.1 = norm1.linear
""",
    "qwen_image": """
    time_text_embed.timestep_embedder.linear_{1,2}
    {img,txt}_in
    norm_out.linear
    proj_out
transformer_blocks.#:
    attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
    {img,txt}_mod.1
    {img,txt}_mlp.net.{0.proj,2}
""",
    "krea2": """
    {tmlp.0,tmlp.2,tproj.1} = {time_embed.linear_1,time_embed.linear_2,time_mod_proj}
    {first,txtmlp.1,txtmlp.3} = {img_in,txt_in.linear_1,txt_in.linear_2}
    txtfusion.projector = text_fusion.projector
    last.linear = final_layer.linear
blocks.# = transformer_blocks.#:
    attn.{wq,wk,wv,gate,wo} = attn.to_{q,k,v,gate,out.0}
    mlp.{gate,up,down} = ff.{gate,up,down}
txtfusion.{layerwise,refiner}_blocks.# = text_fusion.{layerwise,refiner}_blocks.#:
    attn.{wq,wk,wv,gate,wo} = attn.to_{q,k,v,gate,out.0}
    mlp.{gate,up,down} = ff.{gate,up,down}
""",
    "anima": """
    t_embedder.1.linear_{1,2} = time_embed.t_embedder.linear_{1,2}
    x_embedder.proj.1 = patch_embed.proj
    final_layer.linear = proj_out
    final_layer.adaln_modulation.{1,2} = norm_out.linear_{1,2}
    llm_adapter.{in,out}_proj
    llm_adapter.blocks.#.{self,cross}_attn.{q,k,v,o}_proj
    llm_adapter.blocks.#.mlp.{0,2}
blocks.# = transformer_blocks.#:
    {self,cross}_attn.{q,k,v,output}_proj = {attn1,attn2}.to_{q,k,v,out.0}
    mlp.layer{1,2} = ff.net.{0.proj,2}
    adaln_modulation_{self_attn,cross_attn,mlp}.{1,2} = {norm1,norm2,norm3}.linear_{1,2}
""",
    "hidream": """
    {t_embedder.timestep,p_embedder.pooled}_embedder.linear_{1,2}
    caption_projection.#.linear
    x_embedder.proj
    final_layer.{linear,adaLN_modulation.1}
{double,single}_stream_blocks.#.block:
    attn1.to_{q,k,v,out,q_t,k_t,v_t,out_t}
    ff_i.shared_experts.w{1,2,3}
    ff_i.experts.#.w{1,2,3}
    ff_t.w{1,2,3}
    adaLN_modulation.1
""",
    "ernie": """
    time_embedding.linear_{1,2}
    {text_proj,x_embedder.proj,adaLN_modulation.1,final_norm.linear,final_linear}
layers.#:
    self_attention.to_{q,k,v,out.0}
    mlp.{gate_proj,up_proj,linear_fc2}
""",
    "wan": """
    {text,time}_embedding.{0,2} = condition_embedder.{text,time}_embedder.linear_{1,2}
    time_projection.1 = condition_embedder.time_proj
    head.head = proj_out
blocks.#:
    {self,cross}_attn.{q,k,v,o} = {attn1,attn2}.to_{q,k,v,out.0}
    ffn.{0,2} = ffn.net.{0.proj,2}
""",
}  # fmt: skip


class Place(NamedTuple):
    """A layer by ComfyUI's path, or of one that is joined there the ``part`` of so many
    ``parts``; see ``SHARES``."""

    path: str
    part: int = 0
    parts: int = 1


def place_of(entry: Transformer, name: str) -> Place | None:
    """The layer that a LoRA file calls so; None: the family has none of that name."""
    name = _underscored(START.sub("", name, count=1).replace(".processor.", "."))
    for path in (name, f"{name}_0"):  # some leave out the number of "to_out.0"
        for pattern, place in _patterns(entry.key).get(NUMBER.sub("#", path), ()):
            if match := pattern.fullmatch(path):
                return place._replace(path=place.path.replace("#", "{}").format(*match.groups()))
    return None


@cache
def _patterns(key: str) -> dict[str, list[tuple[re.Pattern[str], Place]]]:
    """(pattern, what it means) of names, by these without their numbers."""
    found: dict[str, list[tuple[re.Pattern[str], Place]]] = {}
    for name, place in _names(LAYERS[key]):
        path = _underscored(name)
        pattern = re.compile("([0-9]+)".join(map(re.escape, path.split("#"))))
        found.setdefault(NUMBER.sub("#", path), []).append((pattern, place))
    return found


def _underscored(path: str) -> str:
    return path.replace(".", "_")


def _names(rows: str) -> Iterator[tuple[str, Place]]:
    """(name, what it means) of all rows: ComfyUI's names and diffusers'."""
    head = ""
    for row in filter(None, map(str.strip, rows.splitlines())):
        if row.endswith(":"):
            head = row[:-1]
            continue
        # A row a = b below a heading c = d is c.a = d.b.
        sides = [text.split(" = ") for text in (head, row) if text]
        own, other = (_expanded(".".join(side[i] for side in sides)) for i in (0, -1))
        parts = len(other) // len(own)
        for i, path in enumerate(own):
            yield path, Place(path)
            for part, name in enumerate(other[i * parts : (i + 1) * parts]):
                yield name, Place(path, part, parts)


def _expanded(text: str) -> list[str]:
    pieces = (piece.split(",") for piece in re.split("[{}]", text))
    return ["".join(chosen) for chosen in product(*pieces)]
