"""LoRAs and edited weights of the demo model, as other tools write them."""

import torch
from safetensors.torch import load_file, save_file

from fmn.models.families import DEMO, layers

KV = [layer for layer in layers(DEMO) if layer.is_key_or_value]


def factors(layer, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(layer.shape[0], rank, generator=generator)
    return up, torch.randn(rank, *layer.shape[1:], generator=generator)


def kohya(layer, up, down):
    name = "lora_unet_" + layer.name.replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


def kohya_compvis(layer, up, down):
    name = "lora_unet_" + layer.compvis.replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


def peft(layer, up, down):
    return {f"unet.{layer.name}.lora_B.weight": up, f"unet.{layer.name}.lora_A.weight": down}


def peft_raw(layer, up, down):
    name = f"base_model.model.{layer.name}"
    return {f"{name}.lora_B.default.weight": up, f"{name}.lora_A.default.weight": down}


def processors(layer, up, down):
    block, _, part = layer.name.rpartition(".attn2.")
    name = f"unet.{block}.attn2.processor.{part.removesuffix('.0')}_lora"
    return {f"{name}.up.weight": up, f"{name}.down.weight": down}


def old_diffusers(layer, up, down):
    name = f"unet.{layer.name}.lora_linear_layer"
    return {f"{name}.up.weight": up, f"{name}.down.weight": down}


def comfyui(layer, up, down):
    name = f"diffusion_model.{layer.compvis}"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


LAYOUTS = [kohya, kohya_compvis, peft, peft_raw, processors, old_diffusers, comfyui]


def write(path, tensors, metadata=None):
    if path.suffix == ".safetensors":
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


def demo_weights(prefix="", names="name"):
    base = load_file("../demo/fmn-demo.safetensors")
    return {
        f"{prefix}{getattr(layer, names)}.weight": base[
            f"model.diffusion_model.{layer.compvis}.weight"
        ].float()
        for layer in KV
    }
