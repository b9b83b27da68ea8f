"""A batch in worker processes: the same patches, and what happens when something goes wrong."""

from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import Source, forget_each
from fmn.jobs.executors import Here, Processes
from fmn.methods import settings_of

QUICK = settings_of("uce", {"keep_list": "none"})
NAMES = "dog", "cat", "fox", "horse", "car", "guitar"
CONCEPTS = [Concept(name) for name in NAMES]
BAD = Concept("tree", prompts=("a bush",))


def assert_same_patches(model, files, folder):
    """Tensor by tensor what this process makes, but for a last digit of 16 bits: texts that are
    encoded with others, or by more threads, are summed in another order."""
    plain = forget_each(model, CONCEPTS, QUICK, folder).files
    assert [path.name for path in files] == [path.name for path in plain]
    for path, expected in zip(files, plain):
        tensors, wanted = load_file(path), load_file(expected)
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            error = torch.dist(tensors[name].float(), tensor.float())
            assert error <= 2e-4 * tensor.float().norm(), f"{path.name}, {name}"


@pytest.fixture(scope="module")
def model():
    return DiffusersModel.load("demo")


@pytest.fixture(scope="module")
def source(model):
    return Source("demo", model.fingerprint())


@pytest.fixture(scope="module")
def processes():
    with closing(Processes(2)) as executor:
        yield executor


def test_processes_make_the_same_and_nothing_twice(model, source, processes, tmp_path):
    events = []
    concepts, workers = [BAD, *CONCEPTS], (processes, source)
    batch = forget_each(model, concepts, QUICK, tmp_path / "a", events.append, workers=workers)
    ((concept, reason),) = batch.failed
    assert concept == BAD and "does not contain the concept 'tree'" in reason
    assert_same_patches(model, batch.files, tmp_path / "b")
    assert [event.done for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert {event.name for event in events} == {"tree", *NAMES}
    lefts = [event.seconds_left for event in events]
    assert lefts[-1] == 0 and all(left > 0 for left in lefts[:-1])
    stamps = [path.stat().st_mtime_ns for path in batch.files]
    again = forget_each(model, concepts, QUICK, tmp_path / "a", workers=workers)
    assert again.existing == again.files == batch.files and len(again.failed) == 1
    assert [path.stat().st_mtime_ns for path in again.files] == stamps


def test_a_worker_that_is_killed_is_said_and_finished_files_stay(
    model, source, processes, tmp_path
):
    """The last test of these processes."""
    events = []

    def kill(event):
        events.append(event)
        for process in processes.pool._processes.values() if event.index == 2 else ():
            process.kill()

    with pytest.raises(ForgetError, match="A worker process died") as caught:
        forget_each(model, CONCEPTS, QUICK, tmp_path, kill, workers=(processes, source))
    assert len(str(caught.value)) < 300 and "Finished work is kept" in str(caught.value)
    files = set(tmp_path.iterdir())
    assert 2 <= len(files) == events[-1].index < len(CONCEPTS)
    again = forget_each(model, CONCEPTS, QUICK, tmp_path)
    assert set(again.existing) == files and len(again.files) == len(CONCEPTS)


def test_a_worker_with_another_model_ends_it(model, tmp_path):
    with pytest.raises(ForgetError, match="has other weights than the one the run began with"):
        forget_each(model, CONCEPTS, QUICK, tmp_path, workers=(Here(), Source("demo", "0" * 32)))
    assert not list(tmp_path.iterdir())
