"""Files of ours read by other programs' own LoRA code, imported by path from a checkout of theirs.

    python benchmarks/other_loaders.py PROGRAM PATH_TO_CHECKOUT

PROGRAM is one of a1111, forge, invokeai. Fetch the program first (git clone --depth 1); nothing of
it is installed or copied. For each family and scope, a patch of ranks 1 or 4 on random factors is
saved, and each changed layer's difference by the program's code is compared with ours. Printed:
layers in the patch, layers that the program matched, and the largest relative difference.

    a1111     network_lora.py and convert_diffusers_name_to_compvis of networks.py; also of forks
              with the same extension folder
    forge     packages_3rdparty/comfyui_lora_collection: load_lora on all names of the model
    invokeai  the base that it recognises and its names; up @ down is computed here
"""

import argparse
import ast
import importlib.util
import re
import sys
import tempfile
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

from fmn.models.families import SD1, SD2, SDXL, layers, text_layers  # noqa: E402
from fmn.patches.lora_keys import file_name  # noqa: E402
from fmn.patches.patch import ForgetPatch, load_patch, save_patch  # noqa: E402

SCOPES = {
    "keys and values": lambda layer: layer.is_key_or_value,
    "attn1 (esd-u)": lambda layer: ".attn1." in layer.name,
    "text out_proj": lambda layer: layer.name.endswith("layers.0.self_attn.out_proj"),
    "text fc1": lambda layer: layer.name.endswith("layers.0.mlp.fc1"),
    "time embedding, convolutions in and out": lambda layer: layer.name.startswith(
        ("time_embedding", "conv_in", "conv_out")
    ),
}


def make(family, scope, rank, folder):
    """A patch on disk, and as it loads again."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for layer in (*layers(family), *text_layers(family)):
        if SCOPES[scope](layer):
            out, *rest = layer.shape
            kernel = (1,) * (len(rest) - 1)
            changes[layer.name] = (
                torch.randn(out, rank, *kernel, generator=generator),
                torch.randn(rank, *rest, generator=generator),
            )
    path = save_patch(ForgetPatch(family, changes, {"concepts": []}), folder / "p.safetensors")
    return path, load_patch(path)


def load_module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def functions_of(path, names, scope):
    """Some functions and assignments of a file, without running the rest of it."""
    body = [
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if getattr(node, "name", "") in names
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names)
    ]
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)  # noqa: S102
    return scope


class Stub(types.ModuleType):
    """A module that the code imports and that loading a LoRA does not use."""

    def __getattr__(self, name):
        return Stub(name) if name[0].islower() else type(name, (), {})


class A1111:
    """The web UI's Lora extension, with modules of the layers' shapes by its own names."""

    def __init__(self, checkout):
        folder = checkout / "extensions-builtin" / "Lora"
        for name in ("modules", "modules.models", "modules.models.sd3", "modules.models.sd3.mmdit"):
            sys.modules[name] = Stub(name)
        sys.modules["modules"].devices = types.SimpleNamespace(cpu="cpu", dtype=torch.float32)
        sys.path.insert(0, str(folder))
        self.network = load_module("network", folder / "network.py")
        self.lora = load_module("network_lora", folder / "network_lora.py")
        names = (
            "convert_diffusers_name_to_compvis",
            "suffix_conversion",
            "re_compiled",
            "re_digits",
        )
        scope = functions_of(folder / "networks.py", names, {"re": re})
        self.convert = scope["convert_diffusers_name_to_compvis"]

    def names(self, family):
        """The web UI's name of each layer -> layer. OpenCLIP's attention has q, k, v in one."""
        open_clip = {"clip_h": "model_transformer_resblocks_", "clip_g": "1_model_transformer_"}
        result = {}
        for layer in (*layers(family), *text_layers(family)):
            encoder, _, path = layer.compvis.partition(".")
            name = "diffusion_model_" + layer.compvis.replace(".", "_")
            if layer.is_text and encoder in open_clip:
                block, _, part = path.partition("layers.")[2].partition(".")
                part = part.replace(".", "_").replace("self_attn", "attn")
                part = part.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
                prefix = open_clip[encoder] + ("resblocks_" if encoder == "clip_g" else "")
                name = f"{prefix}{block}_{part}"
            elif layer.is_text:
                name = ("0_" if len(family.texts) == 2 else "") + path.replace(".", "_")
            result[name] = layer
        return result

    def read(self, family, path):
        names, found = self.names(family), {}
        for key, weight in load_file(path).items():
            stem, _, part = key.partition(".")
            name = self.convert(stem, family is SD2)
            te1 = "lora_te1_text_model", "0_transformer_text_model"
            for old, new in (("lora_unet", "diffusion_model"), te1):
                name = name if name in names else stem.replace(old, new)
                if name in names:
                    break
            if name in names:
                found.setdefault(name, {})[part] = weight
        # An OpenCLIP attention layer is changed only with all four (network_apply_weights).
        groups = {}
        for name in found:
            if re.search(r"resblocks_\d+_attn_(q|k|v|out)_proj$", name):
                groups.setdefault(name.rpartition("_attn_")[0], []).append(name)
        for group in groups.values():
            for name in group if len(group) < 4 else ():
                del found[name]
        return {names[name].name: self.change(names[name], found[name]) for name in found}

    def change(self, layer, weights):
        module = torch.nn.Linear(1, 1) if len(layer.shape) == 2 else None
        if module is None:
            out, inputs, *kernel = layer.shape
            module = torch.nn.Conv2d(inputs, out, kernel, padding=kernel[0] // 2)
        module.weight = torch.nn.Parameter(torch.zeros(layer.shape))
        net = types.SimpleNamespace(te_multiplier=1.0, unet_multiplier=1.0, dyn_dim=None)
        given = self.network.NetworkWeights("", "", weights, module)
        return self.lora.NetworkModuleLora(net, given).calc_updown(module.weight)[0].detach()


class Forge:
    """Forge's copy of ComfyUI's loader, given every name of the family."""

    def __init__(self, checkout):
        sys.path.insert(0, str(checkout))
        sys.modules["backend"] = Stub("backend")
        sys.modules["packages_3rdparty.comfyui_lora_collection.utils"] = Stub("utils")
        path = checkout / "packages_3rdparty" / "comfyui_lora_collection" / "lora.py"
        self.load = functions_of(path, ("load_lora",), {"torch": torch})["load_lora"]

    def read(self, family, path):
        names = {
            file_name(family, layer): layer for layer in (*layers(family), *text_layers(family))
        }
        patches, left = self.load(load_file(path), {name: name for name in names})
        result = {}
        for name, (kind, (up, down, alpha, *_)) in patches.items():
            assert kind == "lora" and len(left) <= 12
            scale = 1.0 if alpha is None else alpha / len(down)
            change = scale * up.float().flatten(1) @ down.float().flatten(1)
            result[names[name].name] = change.reshape(names[name].shape)
        return result


class InvokeAI:
    """Its LoRA layers and the width that tells it the base."""

    def __init__(self, checkout):
        sys.path.insert(0, str(checkout))
        backend = checkout / "invokeai" / "backend"
        scope = functions_of(
            backend / "model_manager" / "util" / "model_util.py", ("lora_token_vector_length",),
            {"torch": torch, "Optional": __import__("typing").Optional},
        )  # fmt: skip
        self.width = scope["lora_token_vector_length"]
        path = backend / "patches" / "lora_conversions" / "sdxl_lora_conversion_utils.py"
        self.convert = load_module("sdxl_utils", path).convert_sdxl_keys_to_diffusers_format

    def read(self, family, path):
        tensors = dict(sorted(load_file(path).items()))
        width = self.width(tensors)
        known = {768: SD1, 1024: SD2, 1280: SDXL, 2048: SDXL}
        if known.get(width) is not family:
            print(f"    base not recognised: width {width}")
            return {}
        if family is SDXL:
            tensors = self.convert(tensors)
        names = {}
        for layer in (*layers(family), *text_layers(family)):
            name = file_name(family, layer)
            if not layer.is_text:
                name = "lora_unet_" + layer.name.replace(".", "_")
            names[name] = layer
        result = {}
        for key, down in tensors.items():
            stem, _, part = key.partition(".")
            if part == "lora_down.weight" and stem in names:
                alpha = tensors.get(f"{stem}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(down)
                up = tensors[f"{stem}.lora_up.weight"].float().flatten(1)
                change = scale * up @ down.float().flatten(1)
                result[names[stem].name] = change.reshape(names[stem].shape)
        return result


PROGRAMS = {"a1111": A1111, "forge": Forge, "invokeai": InvokeAI}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("checkout", type=Path)
    options = parser.parse_args()
    program = PROGRAMS[options.program](options.checkout.resolve())
    print(f"{'family':7}{'scope':42}{'rank':>5}{'layers':>8}{'matched':>9}{'difference':>12}")
    for family in (SD1, SD2, SDXL):
        for scope in SCOPES:
            for rank in (1, 4):
                with tempfile.TemporaryDirectory() as folder:
                    path, patch = make(family, scope, rank, Path(folder))
                    changes = program.read(family, path)
                matched = [name for name in patch.changes if name in changes]
                errors = [
                    float(
                        (changes[name] - patch.change_of(name)).norm()
                        / patch.change_of(name).norm()
                    )
                    for name in matched
                ]
                print(
                    f"{family.key:7}{scope:42}{rank:5}{len(patch.changes):8}{len(matched):9}"
                    f"{max(errors, default=0.0):12.1e}"
                )


if __name__ == "__main__":
    main()
