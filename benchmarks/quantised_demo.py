"""How much of a concept is left in the demo models with weights in 8 bits, by way of loading.

    COMFYUI_PATH=... python benchmarks/quantised_demo.py [CONCEPT ...]

The matrices of the transformer's and of the U-Net's blocks are written in 32 bits, in fp8 and in
int8 (ComfyUI 0.33), each over a scale, and loaded by ComfyUI's stock loader. Re-read makes a patch
with its default settings on each, as it is loaded. The columns are those of ``left`` in
``transformers_full_size.py``, over eight sentences.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from transformer_sizes import start

if __name__ == "__main__":
    start()

import comfy.model_detection
import comfy.quant_ops
import comfy.sd
import torch
from safetensors.torch import save_file
from transformers_full_size import FP8, cells, shares_left

from fmn.concepts.concept import Concept
from fmn.hosts.comfyui.model import ComfyModel
from fmn.hosts.comfyui.unknown_model import UnknownModel
from fmn.methods import forget, settings_of
from fmn.patches.patch import load_patch, save_patch

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"float32": None, "fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}
CONCEPTS = "cat", "church", "ghost"
SENTENCES = 8


def demo() -> Any:
    """The pack's module that loads the demo model."""
    spec = importlib.util.spec_from_file_location(
        "forget_me_not", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = sys.modules["forget_me_not"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return importlib.import_module("forget_me_not.nodes.demo")


def written(weights: dict[str, torch.Tensor], form: str | None, path: Path) -> None:
    """A file for Load Diffusion Model."""
    tensors, layers = {}, {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if form is None or tensor.dim() != 2 or layer == name or "blocks" not in name:
            tensors[name] = tensor.clone()
            continue
        most, kind = (127.0, torch.int8) if "int8" in form else (torch.finfo(FP8).max, FP8)
        scale = tensor.abs().max() / most
        values = tensor / scale
        tensors[name] = (values.round() if kind is torch.int8 else values).to(kind)
        tensors[f"{layer}.weight_scale"] = scale
        layers[layer] = {"format": form}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else None
    save_file(tensors, path, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("concepts", nargs="*", default=CONCEPTS)
    options = parser.parse_args()
    print("| network | concept | weights in | left: added | Apply | Load LoRA | Bypass |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    module = demo()
    for network in ("transformer", "U-Net"):
        for form in FORMS:
            if FORMS[form] and FORMS[form] not in comfy.quant_ops.QUANT_ALGOS:
                print(f"This ComfyUI has no {form}.", file=sys.stderr)
                continue
            with tempfile.TemporaryDirectory() as folder:
                host = loaded(module, network, FORMS[form], Path(folder))
                side = host.family.resolution // 8
                for word in options.concepts:
                    concept, file = Concept(word, kind="object"), Path(folder) / "patch.safetensors"
                    with torch.inference_mode():
                        patch = forget(host, [concept], settings_of("reread", {}))
                    save_patch(patch, file)
                    left = shares_left(host, load_patch(file), file, side, concept, SENTENCES)
                    print(f"| {network} | {word} | {form} | {cells(left)} |", flush=True)


def loaded(module: Any, network: str, form: str | None, folder: Path) -> Any:
    """A demo model by ComfyUI's loader of files in that form, which is told its configuration."""
    whole = network == "transformer"
    with torch.inference_mode():
        patcher, clip, _ = (
            module.load_demo_transformer if whole else module.load_demo_checkpoint
        )()
        config = dict(patcher.model.model_config.unet_config)
        config = {name: value for name, value in config.items() if name != "dtype"}
        state = patcher.model.diffusion_model.state_dict()
        path = folder / "model.safetensors"
        written({name: tensor.float() for name, tensor in state.items()}, form, path)
        known = module.TransformerConfig if whole else module.DemoConfig
        detection = comfy.model_detection
        with (
            mock.patch.object(detection, "detect_unet_config", lambda *a, **k: config),
            mock.patch.object(
                detection, "model_config_from_unet_config", lambda *a: known(dict(config))
            ),
        ):
            patcher = comfy.sd.load_diffusion_model(str(path))
    return (UnknownModel if whole else ComfyModel)(patcher, clip)


if __name__ == "__main__":
    main()
