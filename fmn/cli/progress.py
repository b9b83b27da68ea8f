"""Progress bars in a terminal."""

from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:  # these load torch, and a bar is made before that
    from ..bench.running.cells import CellProgress
    from ..jobs.batch import BatchProgress
    from ..progress import StepProgress


AnyBar = TypeVar("AnyBar", bound="Bar")


class Bar:
    """A bar on standard error, drawn when it is first updated."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self: AnyBar) -> AnyBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar:
            self.bar.close()
        self.bar = None

    def show(self, done: float, total: float, unit: str, text: str, **more: Any) -> None:
        """Move the bar to ``done`` of ``total``; another total begins a new bar."""
        if self.bar and self.bar.total != total:
            self.close()
        self.bar = self.bar or tqdm(total=total, unit=unit, **more)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)


class StepBar(Bar):
    """A method's step callback: one unit is a step."""

    def __call__(self, step: "StepProgress") -> None:
        text = f"loss {step.losses[-1]:.4g}"
        before, now = step.attention_before, step.attention_now
        if before and now:
            text += f", attention {before.share:.2%} -> {now.share:.2%}"
        self.show(step.index, step.total, "step", text)


class BatchBar(Bar):
    """A batch's progress callback: one unit is a concept."""

    def __call__(self, progress: "BatchProgress") -> None:
        text = f"{progress.name:.40} {progress.index}/{progress.count}"
        self.show(progress.done, progress.count, "concept", text)


class CellBar(Bar):
    """A bench's progress callback: one unit is a cell. Cells of an earlier run count as done."""

    def __call__(self, progress: "CellProgress") -> None:
        cell, done = progress.cell, progress.done
        text = f"{cell.work}, {cell.method}, {cell.targets[0]}"
        self.show(done, progress.total, "cell", text, initial=done - 1)
