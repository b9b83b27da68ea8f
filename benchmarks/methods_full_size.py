"""Every method at the size that users have: time, memory and file, on random weights.

    COMFYUI_PATH=... python benchmarks/methods_full_size.py sd15
    COMFYUI_PATH=... python benchmarks/methods_full_size.py sdxl --method uce oce-projection
    COMFYUI_PATH=... python benchmarks/methods_full_size.py sd15 --weights fp8 --method uce reread
    COMFYUI_PATH=... python benchmarks/methods_full_size.py sd15 --gpu --size 512 --method reread

Makes a float16 checkpoint with random weights, loads it as ComfyUI's stock loader does, and makes
one patch of one identity by each method, one after the other in this process, on the CPU. Closed
forms run at their defaults. What draws or trains runs for few steps on small pictures, which the
table's last column says; it tells seconds a step, and nothing of quality. With --gpu all run on the
GPU, at their defaults.

    seconds      all of the method's run, of which: encoding of prompts and kept words
    s/step       median time between two steps, for what trains (casteer: pairs; reread: layers);
                 each of so few steps of esd, ablation and resteer also looks at the attention once
    GB           highest resident memory above that of the loaded model (Linux only); on a GPU
                 what torch allocated there
    MB           the saved file
    weights      whether every weight of U-Net and text encoder still has the same bits
"""

import argparse
import ctypes
import logging
import os
import sys
import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path
from statistics import median

from random_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
# Resident once loaded: ComfyUI computes in float32 on a CPU.
LOADED = {"sd15": 5 * GB, "sdxl": 14 * GB}
SPARE = 4 * GB  # other programs need memory too
CLOSED = [
    "uce", "rece", "speed", "double-projections", "trce", "oce", "oce-projection", "quickfix",
]  # fmt: skip
# Few steps: what counts here is the time of one.
SHORT = {
    "reread": {},
    "reread-many": {"steps": 4, "keep_prompts": 64},
    "reread-robust": {"robust_steps": 3, "robust_pictures": 1},
    "casteer": {"pairs": 2, "sampling_steps": 3},
    "hirm": {"steps": 10},
    "esd": {"steps": 2, "sampling_steps": 4},
    "ablation": {"steps": 2, "samples": 1, "sample_steps": 4},
    "resteer": {"steps": 2},
}
CONCEPT = "elon musk", "identity"


def trim():
    """Give freed memory back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def load(path, weights, gpu):
    """The checkpoint as a ``Model`` that counts the time it spends on encoding.

    Args:
        weights: how the U-Net's are kept, ``default`` or ``fp8``.
        gpu: whether to run there.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = not gpu
    import comfy.sd
    import torch

    from fmn.hosts.comfyui.model import ComfyModel

    class Timed(ComfyModel):
        encoding = 0.0

        def encode(self, prompt):
            with Stopwatch(self):
                return super().encode(prompt)

        def encode_all(self, texts, *length):
            with Stopwatch(self):
                return super().encode_all(texts, *length)

    kept_as = {"dtype": torch.float8_e4m3fn} if weights == "fp8" else {}
    with torch.inference_mode():  # as the executor runs a loader
        loaded = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True, model_options=kept_as
        )
    return Timed(*loaded[:3])


class Stopwatch:
    """Adds the time inside to ``model.encoding``."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *raised):
        self.model.encoding += time.perf_counter() - self.start


def checksums(model):
    """Name -> CRC of every weight of U-Net and text encoder."""
    import torch

    parts = model.patcher.model, model.clip.cond_stage_model
    return {
        (number, name): zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        for number, part in enumerate(parts)
        for name, tensor in part.state_dict().items()
        if tensor.numel() and tensor.dim()
    }


def warm_up(model):
    """Load all weights, as the first picture does."""
    import torch

    from fmn.concepts.concept import Prompt

    text = model.encode(Prompt("", ""))
    with (
        model.borrow_text_encoder(words=False),
        model.watch() as denoiser,
        torch.no_grad(),
    ):
        denoiser.predict_noise(torch.zeros(1, 4, 8, 8), torch.tensor([500]), text)


def changes_of(preset, known, options, keep):
    """The settings that differ from a preset's."""
    changes = {} if options.gpu else dict(SHORT.get(preset, {}))
    if preset not in CLOSED and "size" in known:
        changes["size"] = options.size
    if keep is not None and "keep_list" in known:
        changes["keep_list"] = "none"
    return changes


def measure(model, preset, options, keep, before):
    """Make one patch; print its row."""
    from dataclasses import fields

    import torch

    from fmn.concepts.concept import Concept
    from fmn.methods import forget, method, settings_of
    from fmn.patches.patch import save_patch
    from fmn.training.memory import peak_memory

    known = {field.name for field in fields(method(preset).Settings)}
    changes = changes_of(preset, known, options, keep)
    settings = settings_of(preset, changes)
    trim()
    model.encoding, moments = 0.0, []
    start = time.perf_counter()
    with torch.inference_mode(), peak_memory() as peak_of:  # as the executor runs a node
        patch = forget(
            model, [Concept(*CONCEPT)], settings, lambda step: moments.append(time.perf_counter()),
            keep=() if settings.keep_needs else keep or (),
        )  # fmt: skip
        seconds, peak = time.perf_counter() - start, peak_of()
    with tempfile.TemporaryDirectory() as folder:
        megabytes = save_patch(patch, Path(folder) / "patch.safetensors").stat().st_size / 1e6
    trains = preset in SHORT
    each = f"{median(b - a for a, b in pairwise(moments)):.2f}" if trains else "-"
    ranks = "-".join(map(str, sorted({patch.ranks[0], patch.ranks[-1]})))
    same = "the same" if checksums(model) == before else "CHANGED"
    changed = ", ".join(f"{name} {value}" for name, value in changes.items())
    print(
        f"| {preset} | {seconds:.1f} | {model.encoding:.1f} | {each} | {peak / GB:.2f} | "
        f"{megabytes:.2f} | {len(patch.changes)} | {ranks} | {same} | {changed or 'defaults'} |",
        flush=True,
    )
    return same == "the same"


def machine(gpu):
    """What computes, in words."""
    import torch

    if gpu:
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"


def run(name, path, options):
    """All rows; whether no weight changed."""
    import torch

    from fmn.training.memory import free_memory, process_memory

    if options.gpu and not torch.cuda.is_available():
        sys.exit("There is no GPU here: leave --gpu out.")
    free = free_memory(torch.device("cpu"))
    if free - LOADED[name] < SPARE:
        sys.exit(
            f"{name} takes about {LOADED[name] / GB:.0f} GB and {free / GB:.0f} GB are "
            f"free, of which {SPARE / GB:.0f} are to stay so: free some memory."
        )
    model = load(str(path), options.weights, options.gpu)

    from fmn.concepts.concept import Concept
    from fmn.concepts.keep_list import keep_for

    warm_up(model)
    words = keep_for([Concept(*CONCEPT)])
    keep = None if options.words is None else words[: options.words]
    trim()
    before = checksums(model)
    print(
        f"{name}, random float16 weights, kept as {options.weights}, "
        f"{process_memory() / GB:.1f} GB once loaded; "
        f"{machine(options.gpu)}; one {CONCEPT[1]}; "
        f"{len(words if keep is None else keep)} kept words where a method keeps some\n"
    )
    print("| method | seconds | encoding | s/step | GB | MB | layers | rank | weights | settings |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|---|", flush=True)
    unchanged = True
    for preset in options.method:
        if free_memory(torch.device("cpu")) < SPARE:
            sys.exit(f"Stopped before {preset}: less than {SPARE / GB:.0f} GB are free.")
        unchanged &= measure(model, preset, options, keep, before)
    return unchanged


def main():
    sys.path.insert(0, str(ROOT))
    from fmn.methods import PRESETS

    known = [*CLOSED, *SHORT]
    registered = [preset for preset in known if preset in PRESETS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(LOADED))
    parser.add_argument(
        "--method", nargs="+", choices=registered, default=registered, metavar="PRESET",
        help=f"of {', '.join(registered)}",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, default=256, help="pixels a side of what is drawn or trained on (256)"
    )
    parser.add_argument(
        "--words", type=int, help="keep only the first N words of the default keep-list"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a file of random_checkpoint.py; else one is made"
    )
    parser.add_argument(
        "--weights", choices=("default", "fp8"), default="default",
        help="how ComfyUI keeps the U-Net's; fp8 is for methods that solve (default)",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="on the GPU, at the methods' defaults")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with checkpoint(options.model, options.checkpoint) as path:
        if not run(options.model, path, options):
            sys.exit("A method changed the model's weights.")


if __name__ == "__main__":
    main()
