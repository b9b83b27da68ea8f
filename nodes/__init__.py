"""The nodes: each parses its widgets, calls ``fmn`` and wraps the result."""

from comfy_api.latest import ComfyExtension

from . import bench, concept, demo, measure, methods, patch, train


class ForgetMeNot(ComfyExtension):
    async def get_node_list(self):
        return [
            *concept.NODES,
            *methods.NODES,
            *train.NODES,
            *patch.NODES,
            *measure.NODES,
            *bench.NODES,
            *demo.NODES,
        ]
