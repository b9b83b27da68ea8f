"""What a file of weights is, by the names in it: one recogniser for whatever is given in place of
what was asked for."""

import re
from collections.abc import Iterable

# The names of a factor, behind the path of its layer.
FACTORS = {
    "down": (
        ".lora_down.weight", ".lora_down", ".lora_A.weight", ".lora_A.default.weight",
        ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_up", ".lora_B.weight", ".lora_B.default.weight",
        ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight",
    ),
    "alpha": (".alpha", ".lora.alpha"),
    "difference": (".diff",),
}  # fmt: skip
# Changes of another form than up @ down.
OTHER_FORMS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "oft_": "OFT", "boft_": "BOFT", "glora_": "GLoRA", "lora_mid": "LoCon with a middle factor",
}  # fmt: skip
LORA, WHOLE, UNET = "a LoRA", "a whole checkpoint", "a U-Net"
TRANSFORMER = re.compile(  # also in LoRA files, which may have no dots
    r"(double|single|joint)[._](blocks|layers|stream[._]blocks|transformer[._]blocks)[._]|"
    r"transformer[._]blocks[._]\d+[._]attn[._]|cross[._]attn[._](kv|q)|context[._]refiner|"
    r"(^|\.)layers\.\d+\.attention\.|^transformer\.transformer_blocks|"
    r"(^|diffusion_model\.|lora_unet_|transformer\.)("
    r"layers[._]\d+[._](self_)?attention[._]|layers[._]\d+[._]attn[._]to|"
    r"blocks[._]\d+[._](attn[._]wo|attn2[._]to_out|cross_attn))"
)
# Kind -> a part of its keys; the first that is found counts.
KINDS = {
    "an ESD file that numbers layers instead of naming them": re.compile(r"^ft_modules_list\."),
    "a diffusion transformer": TRANSFORMER,
    "a ControlNet": re.compile(r"control_model\.|controlnet|input_hint_block|zero_convs"),
    "an IP-Adapter": re.compile(r"ip_adapter\.|image_proj"),
    "a textual inversion embedding": re.compile(
        r"^(emb_params|embed|clip_[lg]|<[^<>]+>|string_to_(param|token).*)$"
    ),
    UNET: re.compile(r"(^|\.)(input|down)_blocks\.\d.*\.attn2\."),
    "a text encoder": re.compile(
        r"(^|\.)(encoder\.layers\.\d+\.(self_attn|mlp)|encoder\.block|transformer\.resblocks)\."
    ),
    "an image encoder": re.compile(r"(^|\.)(vision_model|visual)\."),
    "a VAE": re.compile(
        r"first_stage_model\.|(^|\.)((de|en)coder\.(conv_in|layers|(up|down)(_blocks)?)|post_quant_conv)\."
    ),
    "an upscaler": re.compile(r"body\.\d+\.rdb|\.RDB\d|^model\.1\.sub\."),
}


def split_lora_key(key: str) -> tuple[str, str] | None:
    """(path of a layer with underscores for dots and its prefix in front, factor) of a key."""
    for factor, endings in FACTORS.items():
        for ending in endings:
            if key.endswith(ending) and len(key) > len(ending):
                return key[: -len(ending)], factor
    return None


def other_form(key: str) -> str | None:
    """The kind of adapter that is no product of two matrices; None for a plain LoRA's key."""
    return next((form for part, form in OTHER_FORMS.items() if part in key), None)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether keys are those of a LoRA, of whatever trainer."""
    return any(split_lora_key(key) or other_form(key) for key in keys)


def kind_of(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, such as "a VAE"; None if it is nothing known."""
    keys = list(keys)
    if is_lora(keys):
        return LORA
    found = [kind for kind, part in KINDS.items() if any(map(part.search, keys))]
    return WHOLE if found[:1] == [UNET] and len(found) > 1 else next(iter(found), None)
