"""The training loop: a schedule in steps, a log, and a state file to go on from."""

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from demo.parallel import Alone
from fmn.files import write_whole


@dataclass
class Schedule:
    """Learning rates rise over ``warmup`` steps and fall to zero over the last ``decay`` ones."""

    steps: int
    warmup: int = 50
    decay: int = 1000

    def factor(self, step):
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        return min(rise, max(self.steps - step, 0) / max(self.decay, 1), 1.0)


class Loop:
    """Runs ``loss_of(generator) -> scalar`` with an optimiser; everything random is from one seed.

    ``folder`` gets NAME.state and NAME.jsonl, from the first process of the ``team``.
    """

    def __init__(self, name, folder, optimiser, loss_of, schedule, seed, team=None):
        self.name, self.folder, self.team = name, Path(folder), team or Alone()
        self.optimiser, self.loss_of, self.schedule = optimiser, loss_of, schedule
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.seconds = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self):
        return self.folder / f"{self.name}.state"

    def save(self):
        if self.team.rank:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "schedule": asdict(self.schedule),
            "generator": self.generator.get_state(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_whole(self.path, lambda file: torch.save(state, file))

    def resume(self):
        """Go on from the state file, if there is one; its schedule counts."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.schedule = Schedule(**state["schedule"])
        self.generator.set_state(state["generator"])
        self.optimiser.load_state_dict(state["optimiser"])
        return True

    def run(self, minutes=None, save_minutes=5, log_steps=20):
        """Train to the schedule's end; True if it was reached, False if stopped before.

        A stop by ``minutes`` or by a signal (INT, TERM) saves, and a later run goes on from there.
        """
        start = saved = time.monotonic()
        stops = []
        handlers = {
            kind: signal.signal(kind, lambda number, frame: stops.append(number))
            for kind in (signal.SIGINT, signal.SIGTERM)
        }
        losses, mark, stop = [], (self.step, start), False
        try:
            while self.step < self.schedule.steps and not stop:
                before = time.monotonic()
                late = minutes is not None and before - start > minutes * 60
                value, stop = self._one(late or bool(stops))
                losses.append(value)
                now = time.monotonic()
                self.seconds += now - before
                if self.step % log_steps == 0:
                    self._log(losses, (now - mark[1]) / (self.step - mark[0]))
                    losses, mark = [], (self.step, now)
                if now - saved > save_minutes * 60:
                    self.save()
                    saved = time.monotonic()
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
        self.save()
        return self.step >= self.schedule.steps

    def _one(self, stop):
        """A step; returns (the loss, whether any process wants to stop)."""
        loss = self.loss_of(self.generator)
        loss.backward()
        value, stop = self.team.share(self.optimiser.parameters, loss.item(), float(stop))
        self.optimiser.step(self.schedule.factor(self.step), self.step)
        self.step += 1
        if value != value:
            raise SystemExit(
                f"The loss of {self.name} is not a number at step {self.step}: delete its state "
                "and train again with lower learning rates."
            )
        return value, stop > 0

    def _log(self, losses, seconds):
        if self.team.rank:
            return
        row = {
            "stage": self.name,
            "step": self.step,
            "loss": round(sum(losses) / len(losses), 5),
            "rate": round(self.schedule.factor(self.step), 4),
            "seconds_a_step": round(seconds, 3),
            "hours": round(self.seconds / 3600, 4),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        with open(self.folder / f"{self.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
