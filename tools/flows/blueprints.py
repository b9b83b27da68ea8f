"""Blueprints of subgraphs: what ComfyUI lists under Subgraph Blueprints, as one node each.

The nodes around a blueprint give it its inputs and outputs, and are not saved.
"""

from .workflow import Workflow

# As inputs and outputs are made of links, each one has to have a link that crosses the border.


def forget_blueprint():
    flow = Workflow(
        "Forgets a concept: names it, makes a patch, and puts that on the model. Save the patch "
        "with Save Forget Patch. Without a method it is Re-read."
    )
    load = flow.demo()
    method = flow.add("FMN_MethodReread")
    flow.column()
    concept = flow.concept(anchor="", aliases="")
    flow.column()
    train = flow.train(load, concept, method)
    flow.column()
    patched = flow.apply(load, train, clip=[load, 1])
    flow.enclose(
        [concept, train, patched],
        [(concept, "name"), (concept, "kind"), (concept, "anchor"), (concept, "aliases"),
         (patched, "strength")],
    )  # fmt: skip
    _around(flow, load, patched, train)
    return flow


def apply_blueprint():
    flow = Workflow("Loads a patch file, and puts it on the model and its CLIP.")
    load = flow.demo()
    flow.column()
    patch = flow.add("FMN_LoadForgetPatch", file="demo/santa_claus.safetensors")
    flow.column()
    patched = flow.apply(load, patch, clip=[load, 1])
    flow.enclose([patch, patched], [(patch, "file"), (patched, "strength")])
    _around(flow, load, patched, patch)
    return flow


def _around(flow, load, patched, patch):
    """Readers of the model, the CLIP and the patch that come out."""
    flow.column()
    text = flow.add("CLIPTextEncode", clip=[patched, 1], text="a photo of a dog")
    flow.save(patch, "patch")
    flow.column()
    flow.sample("", patched, text, text, flow.latent())
