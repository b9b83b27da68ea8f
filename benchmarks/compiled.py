"""What torch.compile would win in training, and whether a run is long enough for it.

    python benchmarks/compiled.py [--size 256] [--steps 4] [--mode default]

A training step of Stable Diffusion 1.5's U-Net with random weights, float32, batch 1: forward, and
backward to the keys and values of cross-attention, as it is and compiled, in turn in one process.
Nothing is trained, and the attention that re-steering looks at is not taken, which would break the
compiled graph into pieces: this is the most that could be won. On a GPU, --mode reduce-overhead
also records CUDA graphs.

    first      seconds of the first step, which compiles
    s/step     seconds that pass in a later step, and their range
    pays from  steps after which compiling has cost less time than it saved; a run of re-steering
               has 35, and Re-read draws 12 prompts of 4 steps
"""

import argparse
import time

import torch
from diffusers import UNet2DConditionModel


def stepper(unet, size, device):
    """Function that does a step and returns its seconds."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, size // 8, size // 8, generator=generator).to(device)
    context = torch.randn(1, 77, 768, generator=generator).to(device)
    t = torch.tensor([500], device=device)

    def step():
        start = time.perf_counter()
        unet(x_t, t, context).sample.square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        unet.zero_grad()
        return time.perf_counter() - start

    return step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mode", default="default", choices=("default", "reduce-overhead"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attn2.to_k" in name or "attn2.to_v" in name)
    plain = stepper(unet, options.size, device)
    compiled = stepper(torch.compile(unet, mode=options.mode), options.size, device)
    firsts = plain(), compiled()
    pairs = [(plain(), compiled()) for _ in range(options.steps)]
    means = [sum(each) / len(each) for each in zip(*pairs)]
    print(f"\n{device}, {options.size} px\n\n| | first | s/step | |\n|---|---:|---:|---|")
    for name, first, mean, each in zip(("as it is", "compiled"), firsts, means, zip(*pairs)):
        print(f"| {name} | {first:.1f} | {mean:.2f} | {min(each):.2f} to {max(each):.2f} |")
    saved = means[0] - means[1]
    pays = f"{(firsts[1] - means[1]) / saved:.0f} steps" if saved > 0 else "never"
    print(f"\ncompiled / as it is: {means[1] / means[0]:.2f}; pays from: {pays}")


if __name__ == "__main__":
    main()
