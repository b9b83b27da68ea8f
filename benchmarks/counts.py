"""The work that methods ask for: forwards, FLOPs and bytes, and the least time that these take.

    python benchmarks/counts.py [--tflops 0.1] [--gbytes 20] [--size PIXELS]

Nothing is computed: U-Nets and text encoders are gone through on tensors without numbers. A product
and a sum are two FLOPs. The floor is the FLOPs at the given rate, or the bytes of the weights read
once a pass at the given bandwidth, whichever takes longer; give those of your machine.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from fmn.hosts.diffusers.load import ASSETS
from fmn.methods import settings_of
from fmn.models.families import SD1, SDXL

TERA, GIGA = 1e12, 1e9
CONFIGS = json.loads((ASSETS / "pipelines.json").read_text("utf-8"))


def counted(make, forward):
    """FLOPs of a forward pass, of one that also goes back to its input, and bytes in float32."""
    with FakeTensorMode():
        module = make().requires_grad_(False)
        size = sum(parameter.numel() for parameter in module.parameters()) * 4
        found = []
        for back in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(back):
                output = forward(module, back)
                if back:
                    output.sum().backward()
            found.append(counter.get_total_flops())
    return *found, size


def unet(family, pixels):
    config = CONFIGS[family.key]
    side = pixels // 8

    def forward(module, back):
        text = torch.zeros(1, 77, family.context_dim, requires_grad=back)
        extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        added = extra if family is SDXL else None
        x, t = torch.zeros(1, 4, side, side), torch.zeros(1)
        return module(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample

    return counted(lambda: UNet2DConditionModel.from_config(config["unet/config.json"]), forward)


def clip(tokens):
    made = CLIPTextConfig(**CONFIGS[SD1.key]["text_encoder/config.json"])
    with FakeTensorMode():
        module = CLIPTextModel(made).requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, tokens).long())
        size = sum(parameter.numel() for parameter in module.parameters()) * 4
    return counter.get_total_flops(), size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=0.1, help="of the machine, float32 (0.1)")
    parser.add_argument("--gbytes", type=float, default=20.0, help="a second, from memory (20)")
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512, 1024], help="pixels")
    options = parser.parse_args()

    def floor(flops, size, passes):
        slowest = max(flops / options.tflops / TERA, passes * size / options.gbytes / GIGA)
        return f"{slowest:.1f} s"

    print("| one pass, batch 1 | TFLOP | with backward to the text | weights GB |")
    print("|---|---:|---:|---:|")
    passes = {}
    for family in (SD1, SDXL):
        for pixels in options.size:
            passes[family.key, pixels] = forward, both, size = unet(family, pixels)
            print(f"| {family.title}, {pixels} px | {forward / TERA:.2f} | {both / TERA:.2f} | "
                  f"{size / GIGA:.2f} |", flush=True)  # fmt: skip
    texts = {tokens: clip(tokens) for tokens in (8, 77)}
    for tokens, (flops, size) in texts.items():
        print(f"| CLIP-L, {tokens} tokens | {flops / TERA:.4f} | - | {size / GIGA:.2f} |")

    print(f"\nFloors at {options.tflops:g} TFLOPS and {options.gbytes:g} GB/s\n")
    print("| a run | passes | TFLOP | floor |")
    print("|---|---|---:|---:|")
    reread = settings_of("reread", {})
    samples = 3 * reread.images_per_concept * (2 * reread.sampling_steps - 1)
    sentences = 2 * reread.prompts + reread.keep_prompts
    for (key, pixels), (forward, both, size) in passes.items():
        flops = 35 * both
        print(f"| re-steer K/V, {key} {pixels} px | 35 with backward | {flops / TERA:.1f} | "
              f"{floor(flops, size, 70)} |")  # fmt: skip
        flops = 35 * 3 * forward
        print(f"| released loop, {key} {pixels} px | 35 with backward to all weights | "
              f"{flops / TERA:.1f} | {floor(flops, size, 35 * 10)} |")  # fmt: skip
        flops = samples * forward
        print(f"| Re-read's drawings, {key} {pixels} px | {samples} samples in batches of 8 | "
              f"{flops / TERA:.1f} | {floor(flops, size, samples / 8)} |")  # fmt: skip
    flops = sentences * texts[77][0]
    print(f"| Re-read's sentences, CLIP-L | {sentences} of 77 tokens | {flops / TERA:.2f} | "
          f"{floor(flops, texts[77][1], sentences / 32)} |")  # fmt: skip
    for tokens, name in ((77, "whole"), (8, "as far as they are read")):
        flops = 1000 * texts[tokens][0]
        print(f"| 1000 kept prompts, {name} | 1000 of {tokens} tokens | {flops / TERA:.2f} | "
              f"{floor(flops, texts[tokens][1], 1000 * tokens / 2464)} |")  # fmt: skip


if __name__ == "__main__":
    main()
