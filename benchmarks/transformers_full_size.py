"""Re-read on diffusion transformers at their real width, with random weights.

    COMFYUI_PATH=... python benchmarks/transformers_full_size.py flux z-image --blocks 2
    COMFYUI_PATH=... python benchmarks/transformers_full_size.py anima --blocks 0 --form int8
    COMFYUI_PATH=... python benchmarks/transformers_full_size.py flux --blocks 0 --gpu

For each model and form of its weights a process of its own writes a file, loads it by ComfyUI's
stock loader, makes a patch of one object and applies it. Few prompts on small pictures: what counts
is what a forward takes, what comes on top of the loaded model, and what is left. On the CPU, or on
the GPU with --gpu.

    blocks    of each kind; all: the whole model. The loader is given their number
    seconds   of processors; with --gpu of the clock
    loaded    GB resident with the model loaded and run once; with --gpu what torch allocated there
    beyond    GB at the peak of making the patch, above that
    weights   whether all still have the same bits, and no hook is left
    left      share of the concept's effect on the prediction at pure noise with the patch: added to
              the outputs as it was solved (our layers), merged by Apply Forget Patch and by Load
              LoRA, and by Load LoRA (Bypass), where ComfyUI has it

Linux only. Weights repeat one block of noise.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from transformer_sizes import SIZES, Size, Words, build, config_of, start

if __name__ == "__main__":
    start(gpu="--gpu" in sys.argv)

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file

from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.prompt_templates import sentences
from fmn.hosts.comfyui.unknown_model import UnknownModel
from fmn.methods import forget, settings_of
from fmn.metrics.outcome import share_left
from fmn.models.adapters import FixedAdapter, attached
from fmn.models.interface import Text
from fmn.models.sampling import seeded_noise
from fmn.patches.patch import ForgetPatch, load_patch, save_patch
from fmn.training.memory import free_memory, peak_memory, process_memory

GB = 1e9
FORMS = {"bf16": 2, "fp8": 1, "mixed": 1, "int8": 1}  # bytes of a weight
SPARE = 3 * GB  # other programs need memory too
QUANTISED = 1 << 20  # numbers in a matrix from which it is
NOISE = 1_000_003  # a prime, so rows do not repeat
FP8 = torch.float8_e4m3fn
CONCEPT = Concept("dog", kind="object")


def written(size: Size, blocks: int, form: str, path: Path) -> None:
    """A file of random weights: bf16, fp8 as it is, or fp8 ("mixed") or int8 with scales."""
    network = build(size, blocks, torch.bfloat16, "meta").diffusion_model
    linear = {name for name, module in network.named_modules() if hasattr(module, "in_features")}
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    coded = {"fp8": noise.to(FP8), "mixed": (64 * noise).to(FP8), "bf16": noise.bfloat16()}
    coded["int8"] = (noise * 127 / 4).round().clamp(-127, 127).to(torch.int8)
    steps = {"mixed": 1 / 64, "int8": 4 / 127}
    tensors, layers = {}, {}
    for name, tensor in network.state_dict().items():
        layer, spread = (
            name.removesuffix(".weight"),
            tensor[0].numel() ** -0.5 if tensor.dim() else 1,
        )
        if tensor.dim() < 2:
            tensors[name] = torch.full(tensor.shape, float(not name.endswith("bias"))).bfloat16()
        elif layer not in linear or tensor.numel() < QUANTISED or form == "bf16":
            tensors[name] = repeated(spread * noise, tensor.shape, torch.bfloat16)
        elif form == "fp8":
            tensors[name] = repeated(spread * noise, tensor.shape, FP8)
        else:
            tensors[name] = repeated(coded[form], tensor.shape, coded[form].dtype)
            tensors[f"{layer}.weight_scale"] = torch.tensor(spread * steps[form])
            layers[layer] = {"format": "int8_tensorwise" if form == "int8" else "float8_e4m3fn"}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else None
    save_file(tensors, path, metadata=metadata)


def repeated(values: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    values = values.to(dtype)
    return values.repeat(-(-shape.numel() // len(values)))[: shape.numel()].clone().view(shape)


def loaded(size: Size, blocks: int, path: Path) -> UnknownModel:
    """By the stock loader, which is given the number of blocks."""
    config = config_of(size, blocks)
    with (
        torch.inference_mode(),
        mock.patch.object(comfy.model_detection, "detect_unet_config", lambda *a, **k: config),
    ):
        return UnknownModel(comfy.sd.load_diffusion_model(str(path)), Words(size))


def checksums(model: Any) -> dict[str, int]:
    """Name -> CRC of every weight."""
    values = {key: getattr(value, "_qdata", value) for key, value in model.state_dict().items()}
    return {
        key: zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for key, value in values.items()
    }


def predictions(host: Any, texts: Any, side: int, changes: Any = None) -> torch.Tensor:
    """At pure noise, with a patch's changes added to the outputs if there are any.

    Args:
        host: an ``UnknownModel`` of a transformer, or a ``ComfyModel``.
    """
    noise = seeded_noise(range(len(texts)), side, getattr(host.family, "latent_channels", 4))
    with host.watch(len(texts), side) as watched, ExitStack() as stack:
        if changes:
            fixed = {name: FixedAdapter([(*two, 1.0)], "cpu") for name, two in changes.items()}
            stack.enter_context(attached(fixed, watched.module))
        last = len(watched.schedule) - 1
        if host.family.known:
            t = torch.full((len(texts),), last)
            return watched.predict_noise(noise, t, Text.cat(texts)).detach().float()
        return watched.predict_each(noise, last, texts).float()


def shares_left(
    host: Any, patch: ForgetPatch, path: Path, side: int, concept: Concept, count: int
) -> list[float]:
    """Of ``left``'s ways, as many as this ComfyUI has, over so many sentences."""
    pairs = sentences(concept, count)[:count]
    with_it, without = ([host.encode(Prompt(text, "")) for text in side] for side in zip(*pairs))
    start = predictions(host, without, side)
    effect = predictions(host, with_it, side) - start
    lora = comfy.utils.load_torch_file(str(path))
    found = [predictions(host, with_it, side, patch.changes)]
    ways = [lambda: host.patched(patch, 1.0)]
    ways.append(lambda: comfy.sd.load_lora_for_models(host.patcher, None, lora, 1.0, 0.0)[0])
    bypass = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if bypass is not None:
        ways.append(lambda: bypass(host.patcher, None, lora, 1.0, 0.0)[0])
    for way in ways:
        with torch.inference_mode():
            found.append(predictions(type(host)(way(), host.clip), with_it, side))
    predictions(host, without, side)  # loads the unpatched model again
    return [share_left(now - start, effect) for now in found]


def cells(shares: Sequence[float]) -> str:
    """Four cells of a table, in per cent."""
    return " | ".join([f"{100 * share:.1f}" for share in shares] + ["-"] * (4 - len(shares)))


def measure(name: str, form: str, options: argparse.Namespace) -> None:
    """Print one row."""
    size, blocks = SIZES[name], options.blocks
    settings = settings_of("reread", {
        "size": options.size, "transformer_prompts": options.prompts, "keep_prompts": options.keep,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        written(size, blocks, form, file)
        host = loaded(size, blocks, file)
        side = options.size // host.family.latent_factor
        predictions(host, [host.encode(Prompt("", ""))], side)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        network, seen = host.patcher.model.diffusion_model, []
        clock = time.perf_counter if options.gpu else time.process_time
        resident = torch.cuda.memory_allocated() if options.gpu else process_memory()
        before, begin = checksums(network), clock()
        hook = network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        with torch.inference_mode(), peak_memory() as peak_of:
            patch = forget(host, [CONCEPT], settings)
            seconds, peak = clock() - begin, peak_of()
        hook.remove()
        path = save_patch(patch, Path(folder) / "patch.safetensors")
        left = shares_left(host, load_patch(path), path, side, CONCEPT, 1)
        hooks = any(module._forward_hooks for module in network.modules())
        same = "CHANGED" if hooks or checksums(network) != before else "the same"
        print(
            f"| {size.title} | {blocks or 'all'} | {form} | {resident / GB:.2f} | {len(seen)} | "
            f"{sum(seen)} | {seconds:.1f} | {peak / GB:.2f} | {path.stat().st_size / 1e6:.2f} | "
            f"{same} | {cells(left)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=SIZES, metavar="MODEL")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=["bf16", "mixed"])
    parser.add_argument("--blocks", type=int, default=1, help="of each kind; 0: all (1)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (64)")
    parser.add_argument("--prompts", type=int, default=1, help="sentences of the concept (1)")
    parser.add_argument("--keep", type=int, default=2, help="kept sentences (2)")
    parser.add_argument("--gpu", action="store_true", help="on the GPU")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        sys.exit("There is no GPU here: leave --gpu out.")
    if options.row:
        measure(options.models[0], options.form[0], options)
        return
    print("| | blocks | weights in | loaded GB | forwards | samples | seconds | beyond GB | "
          "file MB | weights | left: added | Apply | Load LoRA | Bypass |")  # fmt: skip
    print("|---|---|---|" + "---:|" * 6 + "---|" + "---:|" * 4, flush=True)
    for name in options.models:
        for form in options.form:
            try:
                network = build(SIZES[name], options.blocks, torch.bfloat16, "meta")
            except LookupError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                break
            # While loading, a file's tensors and the model's may both be there.
            needed = 2 * FORMS[form] * sum(p.numel() for p in network.diffusion_model.parameters())
            if free_memory(torch.device("cpu")) < needed + SPARE:
                print(f"{name} in {form} is left out: too little memory", file=sys.stderr)
                continue
            rest = [
                f"--{key}={getattr(options, key)}" for key in ("blocks", "size", "prompts", "keep")
            ]
            rest += ["--gpu"] if options.gpu else []
            command = [sys.executable, __file__, name, "--form", form, "--row", *rest]
            subprocess.run(command, env=os.environ, check=False)


if __name__ == "__main__":
    main()
