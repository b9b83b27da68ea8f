"""Progress in a terminal."""

from tqdm import tqdm


class Bar:
    """A progress bar on standard error that is a step callback."""

    def __init__(self):
        self.bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.close()

    def __call__(self, step):
        if self.bar and self.bar.total != step.total:  # another part of the work begins
            self.bar.close()
            self.bar = None
        self.bar = self.bar or tqdm(total=step.total, unit="step")
        text = f"loss {step.losses[-1]:.4g}"
        if step.attention_before:
            before, now = step.attention_before.share, step.attention_now.share
            text += f", attention {before:.2%} -> {now:.2%}"
        self.bar.set_postfix_str(text)
        self.bar.update(step.index - self.bar.n)


class BatchBar(Bar):
    """The same for the places of a batch: one unit a concept."""

    def __call__(self, place):
        self.bar = self.bar or tqdm(total=place.count, unit="concept")
        self.bar.set_postfix_str(f"{place.name:.40} {place.index}/{place.count}", refresh=False)
        self.bar.update(place.done - self.bar.n)


class CellBar(Bar):
    """The same for a bench: one unit a cell."""

    def __call__(self, progress):
        if self.bar is None:
            self.bar = tqdm(total=progress.total, unit="cell", initial=progress.done - 1)
        cell = progress.cell
        self.bar.set_postfix_str(f"{cell.work}, {cell.method}, {cell.targets[0]}")
        self.bar.update(1)
