"""The order of files, which ``--dist loadfile --no-loadscope-reorder`` keeps.

ComfyUI's come first, so that no process keeps a server, a browser and ComfyUI's modules for longer
than it needs them; within each half those that take long, so that all processes end together.
"""

from pathlib import Path

import pytest

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
