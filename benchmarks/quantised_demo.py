"""How much of a concept is left in the demo transformer with weights in 8 bits, by way of loading.

    COMFYUI_PATH=... python benchmarks/quantised_demo.py [CONCEPT ...]

Its matrices are written in 32 bits, in fp8 and in int8 (ComfyUI 0.33), each over a scale, and
loaded by ComfyUI's stock loader. Re-read makes a patch with its default settings on each, as it is
loaded. The columns are those of ``left`` in ``transformers_full_size.py``, over eight sentences.
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
    module = demo()
    with torch.inference_mode():
        patcher, clip, _ = module.load_demo_transformer()
    config, network = dict(patcher.model.model_config.unet_config), patcher.model.diffusion_model
    config = {name: value for name, value in config.items() if name != "dtype"}
    weights = {name: tensor.float() for name, tensor in network.state_dict().items()}
    print("| concept | weights in | left: added | Apply | Load LoRA | Bypass |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for name, form in FORMS.items():
        if form and form not in comfy.quant_ops.QUANT_ALGOS:
            print(f"This ComfyUI has no {name}.", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            path, patch_file = (
                Path(folder) / "model.safetensors",
                Path(folder) / "patch.safetensors",
            )
            written(weights, form, path)

            def known(*arguments: Any) -> Any:
                return module.TransformerConfig(dict(config))

            detection = comfy.model_detection
            with (
                mock.patch.object(detection, "detect_unet_config", lambda *a, **k: config),
                mock.patch.object(detection, "model_config_from_unet_config", known),
            ):
                host = UnknownModel(comfy.sd.load_diffusion_model(str(path)), clip)
            side = host.family.resolution // host.family.latent_factor
            for word in options.concepts:
                concept = Concept(word, kind="object")
                save_patch(forget(host, [concept], settings_of("reread", {})), patch_file)
                left = shares_left(
                    host, load_patch(patch_file), patch_file, side, concept, SENTENCES
                )
                print(f"| {word} | {name} | {cells(left)} |", flush=True)


if __name__ == "__main__":
    main()
