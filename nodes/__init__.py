"""The nodes: each parses its widgets, calls ``fmn`` and wraps the result."""

from comfy_api.latest import ComfyExtension

from . import (
    attack,
    batch,
    bench,
    concept,
    demo,
    guidance,
    keep,
    measure,
    merge,
    methods,
    patch,
    train,
)


class ForgetMeNot(ComfyExtension):
    async def get_node_list(self):
        return [
            *concept.NODES,
            *keep.NODES,
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
