"""Patches on a model of full size, in ComfyUI: loaded, applied, removed, ten at once; seconds.

    COMFYUI_PATH=... python benchmarks/apply.py [sdxl] [--rank 8] [--checkpoint FILE] [--cpu]

A checkpoint of random weights is loaded as the stock loader does; a patch of random factors for all
keys and values is saved and read again. On a GPU times end when it is done.

    read          the file: read, checked
    applied       a clone of the MODEL with it (no weight is touched)
    merged        ComfyUI loads that model: the change is added to the weights
    strength      the same file at another strength: applied and merged again; no checkpoint is read
    off           back to the bare model
    ten           ten patches at once: applied and merged
    a step        one forward of 512 px (256 on a CPU) without and with ten patches, in turn
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from random_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROUNDS = 3


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=["sd15", "sdxl"], default="sdxl")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, help="of random_checkpoint.py; else one is made")
    parser.add_argument("--cpu", action="store_true", help="do not use the GPU")
    parser.add_argument("--no-step", action="store_true", help="leave the forwards out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint(options.model, options.checkpoint) as path,
    ):
        run(options, path, Path(folder))


def run(options, path, folder):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = options.cpu or not torch.cuda.is_available()
    import comfy.model_management as management
    import comfy.sd

    from fmn.hosts.comfyui.model import ComfyModel
    from fmn.patches.patch import load_patch, save_patch

    with torch.inference_mode():  # as the executor runs a loader
        loaded = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False)
    host = ComfyModel(loaded[0])
    device = management.get_torch_device()
    print(f"{options.model} on {device}, {torch.get_num_threads()} threads, rank {options.rank}\n")

    def timed(title, work):
        start = time.perf_counter()
        with torch.inference_mode():
            found = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
        print(f"{title:<12}{time.perf_counter() - start:8.2f} s", flush=True)
        return found

    def merged(patcher):
        management.load_models_gpu([patcher], force_full_load=True)
        return patcher

    def forward(patcher):
        side = (256 if device.type == "cpu" else 512) // 8
        merged(patcher)
        model = patcher.model
        x, sigma = (torch.ones(1, *shape, device=device) for shape in ((4, side, side), ()))
        given = {"cross_attn": torch.zeros(1, 77, host.family.context_dim, device=device)}
        if host.family.vector_dim:
            given |= {"pooled_output": torch.zeros(1, 1280, device=device)}
        given |= {"noise": x, "device": device, "latent_image": x}
        made = {
            name: value.process_cond(batch_size=1, device=device, area=None).cond
            for name, value in model.extra_conds(**given).items()
        }
        return model.apply_model(x, sigma, **made)

    files = [save_patch(made_up(host.family, options.rank, i), folder / f"{i}.safetensors")
             for i in range(10)]  # fmt: skip
    timed("load", lambda: merged(host.patcher))
    patch = timed("read", lambda: load_patch(files[0]))
    patched = timed("applied", lambda: host.patched(patch, 1.0))
    timed("merged", lambda: merged(patched))
    timed("strength", lambda: merged(host.patched(patch, 0.5)))
    timed("off", lambda: merged(host.patcher))
    patches = timed("read ten", lambda: [load_patch(file) for file in files])

    def ten():
        patcher = host.patcher
        for each in patches:
            patcher = ComfyModel(patcher).patched(each, 0.1)
        return merged(patcher)

    applying = timed("ten", ten)
    if not options.no_step:
        for _ in range(ROUNDS):
            for title, patcher in (("bare step", host.patcher), ("ten's step", applying)):
                with torch.inference_mode():
                    forward(patcher)  # merges, and touches new memory
                timed(title, partial(forward, patcher))


def made_up(family, rank, seed):
    """A patch of random factors for all keys and values."""
    import torch

    from fmn.concepts.concept import Concept
    from fmn.models.families import layers
    from fmn.patches.metadata import new_info
    from fmn.patches.patch import ForgetPatch

    generator = torch.Generator().manual_seed(seed)
    changes = {
        layer.name: (
            torch.randn(layer.shape[0], rank, generator=generator) * 1e-3,
            torch.randn(rank, layer.shape[1], generator=generator),
        )
        for layer in layers(family)
        if layer.is_key_or_value
    }
    base = SimpleNamespace(prediction="epsilon")
    info = new_info(base, "f" * 32, "uce", {}, [Concept(f"thing {seed}")], [1.0, 0.0], 0)
    return ForgetPatch(family, changes, info)


if __name__ == "__main__":
    main()
