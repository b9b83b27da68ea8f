"""The order of files, which ``--dist loadfile --no-loadscope-reorder`` keeps.

ComfyUI's come first, so that no process keeps a server, a browser and ComfyUI's modules for longer
than it needs them; within each half those that take long, so that all processes end together. Of
three processes or more the last takes none of ComfyUI's: it works while the others wait for a page.
"""

from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

TESTS = Path(__file__).parent
LONG = (
    "comfyui/test_full_size.py", "comfyui/test_templates.py", "comfyui/test_every_method.py",
    "comfyui/test_training_options.py", "comfyui/test_variants.py", "comfyui/test_shelf_looks.py",
    "comfyui/test_training_view.py", "comfyui/test_training_page.py", "comfyui/test_server.py",
    "comfyui/test_training_live.py", "comfyui/test_bench_node.py", "comfyui/test_batch.py",
    "comfyui/test_measure.py", "comfyui/test_attack.py", "comfyui/test_quantised.py",
    "comfyui/test_shelf_page.py", "comfyui/test_merge.py", "comfyui/test_examples.py",
    "cli/test_second_device.py", "cli/test_bench.py", "cli/test_cli.py", "cli/test_eval_unlearn.py",
    "integration/test_batch.py", "cli/test_docs.py", "cli/test_signals.py", "cli/test_ray.py",
    "integration/test_families.py", "integration/test_revisions.py", "integration/test_resume.py",
)  # fmt: skip


def _place(item):
    file = item.path.relative_to(TESTS).as_posix()
    rank = LONG.index(file) if file in LONG else len(LONG)
    return not file.startswith("comfyui/"), rank


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=_place)


class Sharing(LoadFileScheduling):
    def _assign_work_unit(self, node):
        if file := self._without_comfyui(node):
            self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node):
        if not self._is_last(node) or not self.workqueue or self._without_comfyui(node):
            super()._reschedule(node)
        elif not node.shutting_down:
            node.shutdown()

    def _is_last(self, node):
        return self.numnodes > 2 and node.gateway.id == f"gw{self.numnodes - 1}"

    def _without_comfyui(self, node):
        """The next file for the last process, if any is left."""
        files = (file for file in self.workqueue if not file.startswith("comfyui/"))
        return next(files, None) if self._is_last(node) else None


def pytest_xdist_make_scheduler(config, log):
    return Sharing(config, log) if config.option.dist == "loadfile" else None
