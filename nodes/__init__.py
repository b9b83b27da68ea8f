"""The nodes: each parses its widgets, calls ``fmn`` and wraps the result."""

from comfy_api.latest import ComfyExtension, io

from . import (
    attack,
    batch,
    bench,
    compare,
    concept,
    demo,
    guidance,
    import_eraser,
    live_training,
    measure,
    merge,
    methods,
    patch,
    shelf,
    textual_inversion,
    train,
)
from .page import running_server

MODULES = (
    concept, methods, train, batch, merge, patch, import_eraser, measure, textual_inversion, attack,
    guidance, bench, compare, demo,
)  # fmt: skip


class ForgetMeNot(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        server = running_server()
        if server is not None:
            # Not in on_load, which ComfyUI 0.3.75 never calls.
            for module in (live_training, shelf, batch):
                module.start(server)
        return [node for module in MODULES for node in module.NODES]
