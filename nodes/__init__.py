"""The nodes: each parses its widgets, calls ``fmn`` and wraps the result."""

from comfy_api.latest import ComfyExtension
from server import PromptServer

from . import (
    attack,
    batch,
    bench,
    concept,
    demo,
    guidance,
    live_training,
    measure,
    merge,
    methods,
    patch,
    shelf,
    train,
)


class ForgetMeNot(ComfyExtension):
    async def get_node_list(self):
        live_training.add_routes(PromptServer.instance.routes)
        shelf.start()  # not in on_load, which ComfyUI 0.3.75 never calls
        return [
            *concept.NODES,
            *methods.NODES,
            *train.NODES,
            *batch.NODES,
            *merge.NODES,
            *patch.NODES,
            *measure.NODES,
            *attack.NODES,
            *guidance.NODES,
            *bench.NODES,
            *demo.NODES,
        ]
