"""The demo model's three networks: making them, and writing them as one checkpoint."""

import json

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from fmn.files import write_whole
from fmn.hosts.diffusers.load import ASSETS, load_pipeline, make_tokenizer
from fmn.hosts.diffusers.parts import SD_SCALE
from fmn.models.families import DEMO, layers

# Norms have no weights that a patch could change, so the family's table of layers leaves them out.
# Beside a layer with the first ending lies a norm with the second: (diffusers, checkpoint).
NORMS = (
    (("conv1", "in_layers.2"), ("norm1", "in_layers.0")),
    (("conv2", "out_layers.3"), ("norm2", "out_layers.0")),
    (("proj_in", "proj_in"), ("norm", "norm")),
    (("attn1.to_q", "attn1.to_q"), ("norm1", "norm1")),
    (("attn2.to_q", "attn2.to_q"), ("norm2", "norm2")),
    (("ff.net.2", "ff.net.2"), ("norm3", "norm3")),
    (("conv_out", "out.2"), ("conv_norm_out", "out.0")),
)


class Networks:
    """U-Net, text encoder, autoencoder, tokenizer and the latents' scale.

    Latents times ``scale`` have unit variance.
    """

    def __init__(self, unet, text, vae, tokenizer, scale):
        self.unet, self.text, self.vae = unet, text, vae
        self.tokenizer, self.scale = tokenizer, scale

    @classmethod
    def load(cls, path):
        """From a checkpoint of the demo's layout, in float32."""
        pipe = load_pipeline(path)
        scale = pipe.vae.config.scaling_factor
        return cls(pipe.unet, pipe.text_encoder, pipe.vae, pipe.tokenizer, scale)

    @classmethod
    def fresh(cls, seed):
        torch.manual_seed(seed)
        config = json.loads((ASSETS / "pipelines.json").read_text("utf-8"))[DEMO.key]
        unet = UNet2DConditionModel.from_config(config["unet/config.json"])
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder/config.json"]))
        return cls(unet, text, AutoencoderTiny(), make_tokenizer(), 1.0)

    def to(self, device):
        for module in (self.unet, self.text, self.vae):
            module.to(device)
        return self

    def for_training(self):
        """Memory layout and attention that are fastest on a CPU: SDPA's backward is slow there."""
        self.unet.train().to(memory_format=torch.channels_last)
        self.text.train()
        if self.unet.device.type == "cpu":
            self.unet.set_attn_processor(AttnProcessor())
        return self

    def tokens(self, captions):
        """Token ids [N, 77] of captions."""
        return self.tokenizer(
            list(captions), padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids

    def context(self, ids):
        """The text encoder's last hidden state [N, 77, width]."""
        return self.text(ids.to(self.unet.device))[0]


class UsedRows(nn.Module):
    """A token embedding of which only the rows that captions use are trained."""

    def __init__(self, embedding, used):
        super().__init__()
        self.embedding = embedding.requires_grad_(False)
        self.register_buffer("used", torch.as_tensor(used))
        place = torch.full((embedding.num_embeddings,), -1)
        place[self.used] = torch.arange(len(self.used))
        self.register_buffer("place", place)
        self.rows = nn.Parameter(embedding.weight[self.used].clone())

    def forward(self, ids):
        return nn.functional.embedding(self.place[ids], self.rows)

    @torch.no_grad()
    def whole(self):
        """An ordinary embedding with the trained rows in it."""
        self.embedding.weight[self.used] = self.rows
        return self.embedding


def unet_names():
    """diffusers' name of every layer and norm of the U-Net -> its name in a checkpoint."""
    names = {}
    for layer in layers(DEMO):
        names[layer.name] = layer.compvis
        for (name, compvis), (norm, compvis_norm) in NORMS:
            if layer.name.endswith(name) and layer.compvis.endswith(compvis):
                other = layer.name.removesuffix(name) + norm
                names[other] = layer.compvis.removesuffix(compvis) + compvis_norm
    return names


def checkpoint(networks):
    """Tensors of a checkpoint of Stable Diffusion 1.x layout, float16, by name."""
    found, names = {}, unet_names()
    for key, value in networks.unet.state_dict().items():
        name, _, kind = key.rpartition(".")
        found[f"model.diffusion_model.{names[name]}.{kind}"] = value
    for key, value in networks.text.state_dict().items():
        name = key.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{name}"] = value
    for key, value in networks.vae.state_dict().items():
        part, _, rest = key.partition(".layers.")
        index, _, rest = rest.partition(".")
        # a checkpoint counts the clamp that the decoder starts with
        index = int(index) + (part == "decoder")
        found[f"first_stage_model.taesd_{part}.{index}.{rest}"] = value
    found["first_stage_model.vae_scale"] = torch.tensor(SD_SCALE / networks.scale)
    found["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return {key: value.detach().half().contiguous().cpu() for key, value in found.items()}


def export(networks, path):
    weights = checkpoint(networks)
    write_whole(path, lambda file: save_file(weights, file, metadata={"format": "pt"}))
