"""The order of tasks, what a worker keeps, and how a cluster's machines are shared."""

import pickle
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from fmn.errors import ForgetError, NonFiniteLoss
from fmn.jobs.executors import Here, Processes, Task, kept, open_executor, run_tasks, share


def test_a_task_that_becomes_ready_is_run():
    todo, log = [1], []

    def next_task():
        return Task(todo[0], divmod, (7, todo.pop())) if todo else None

    for key, future in run_tasks(Here(), next_task):
        log.append((key, future.result()))
        todo += [key + 1] * (key < 3)
    assert log == [(1, (7, 0)), (2, (3, 1)), (3, (2, 1))]
    todo = [0]
    ((key, future),) = run_tasks(Here(), next_task)
    assert isinstance(future.exception(), ZeroDivisionError)


class Dying:
    """Two workers; of the first three tasks one is finished when they die."""

    slots, asked = 2, 0

    def submit(self, function, *arguments):
        future, self.asked = Future(), self.asked + 1
        if self.asked == 3:
            future.set_result(function(*arguments))
        else:
            future.set_exception(BrokenProcessPool())
        return future


def test_what_was_finished_before_a_worker_died_comes_first():
    tasks, seen = [Task(i, str, (i,)) for i in range(9)], []
    executor = Dying()
    with pytest.raises(ForgetError, match="A worker process died"):
        for key, future in run_tasks(executor, lambda: tasks.pop(0)):
            seen.append((key, future.result()))
    assert seen == [(2, "2")] and executor.asked == 4  # two more than there are workers


def test_a_pool_that_is_broken_fails_a_task_and_not_the_caller():
    executor = Processes(1)
    executor.pool._broken = "broken"
    assert isinstance(executor.submit(str).exception(), BrokenProcessPool)
    executor.close()


def test_the_last_thing_made_is_kept():
    made = []
    assert [kept(made.append, 1), kept(made.append, 1)] == [None, None] and made == [1]
    kept(made.append, 2)
    kept(made.append, 1)
    assert made == [1, 2, 1]


@pytest.mark.parametrize(
    "machines, workers, expected",
    [
        ([{"CPU": 2.0}, {"CPU": 2.0}], 0, (4, 1, 0)),
        ([{"CPU": 2.0}, {"CPU": 2.0}], 1, (2, 2, 0)),
        ([{"CPU": 64.0}, {"CPU": 16.0}, {}], 0, (20, 4, 0)),  # a head without cores
        ([{"CPU": 2.0}], 8, (2, 1, 0)),
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 1.0}], 1, (1, 16, 1)),
        ([{"CPU": 16.0, "GPU": 1.0}], 4, (4, 4, 0.25)),
        ([{"CPU": 64.0, "GPU": 8.0}], 8, (8, 8, 1)),
    ],
)
def test_machines_are_shared(machines, workers, expected):
    assert share(machines, workers) == expected


def test_a_cluster_without_cores_is_refused():
    with pytest.raises(ForgetError, match="no machine with cores"):
        share([{"memory": 1.0}], 1)


def test_workers_are_counted():
    assert isinstance(open_executor(1), Here)
    with open_executor(3).pool as pool:
        assert pool._max_workers == 3
    for wrong in (-1, 257):
        with pytest.raises(ForgetError, match=f"--workers is {wrong}"):
            open_executor(wrong)


def test_an_error_of_a_diverged_training_comes_back_from_a_worker():
    """What a process pool cannot unpickle would end all its workers."""
    error = NonFiniteLoss("not finite at step 3", [1.0, 2.0])
    error.patch = "the last good one"
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.losses, found.patch) == (str(error), error.losses, error.patch)
