"""Workflows in ComfyUI's API form, put together from a few parts."""


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def demo_loader():
    return {"demo": node("FMN_LoadDemoCheckpoint")}


def checkpoint_loader(name):
    return {"demo": node("CheckpointLoaderSimple", ckpt_name=name)}


def training(concept="dog", kind="object", **method):
    """Concept, method and training on the nodes of a loader; the patch is ["train", 0]."""
    settings = {
        "steps": 4, "lr": 0.002, "rank": 4, "layers": "kv", "full_weights": False,
        "end_tokens": "none", "references": "zeros", "samples": 1, "batch": 1, "size": 0,
        "checkpointing": False, "training_seed": 0,
    } | method  # fmt: skip
    return {
        "concept": node("FMN_Concept", name=concept, kind=kind, aliases="", prompts=""),
        "method": node("FMN_MethodResteer", **settings),
        "train": node(
            "FMN_TrainForgetPatch",
            model=["demo", 0], clip=["demo", 1], vae=["demo", 2],
            concepts=["concept", 0], method=["method", 0],
        ),
    }  # fmt: skip


def saving(prefix="test"):
    return {"save": node("FMN_SaveForgetPatch", patch=["train", 0], filename_prefix=prefix)}


def drawing(model=("demo", 0), text="a photo of a dog", seed=1, steps=4, size=128, name="image"):
    """Sample and preview; the picture comes out of the node ``name``."""
    return {
        f"{name}_pos": node("CLIPTextEncode", clip=["demo", 1], text=text),
        f"{name}_neg": node("CLIPTextEncode", clip=["demo", 1], text=""),
        f"{name}_latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        f"{name}_sampler": node(
            "KSampler", model=list(model), seed=seed, steps=steps, cfg=3.5, sampler_name="euler",
            scheduler="normal", positive=[f"{name}_pos", 0], negative=[f"{name}_neg", 0],
            latent_image=[f"{name}_latent", 0], denoise=1.0,
        ),
        f"{name}_decode": node("VAEDecode", samples=[f"{name}_sampler", 0], vae=["demo", 2]),
        name: node("PreviewImage", images=[f"{name}_decode", 0]),
    }  # fmt: skip


def numbered(prompt):
    """The same with numbers as the names of nodes, as pages want them."""
    numbers = {key: str(i) for i, key in enumerate(prompt, 1)}

    def linked(value):
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[key]: part | {"inputs": {k: linked(v) for k, v in part["inputs"].items()}}
        for key, part in prompt.items()
    }
