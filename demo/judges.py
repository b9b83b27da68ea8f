"""The demo's judges: train them, and have them judge what a demo model draws.

    python demo/judges.py train --pictures build/demo    makes fmn-demo-judges.safetensors
    python demo/judges.py check [--model PATH]           each concept in each style, judged

``train`` needs what ``demo/pictures.py build`` makes, and the packages it fetched for the controls,
concepts of ``controls.csv`` that the judges know and the demo model was never taught. A tenth of
the pairs of concept and style is left out first, to be tested on; then training goes on with all.
"""

import argparse
import csv
import json
import math
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, one_hot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from demo import judge_pictures, pictures  # noqa: E402
from fmn.errors import ForgetError  # noqa: E402
from fmn.files import write_whole  # noqa: E402
from fmn.metrics.demo_judge import ARCHITECTURES, FILE, NOTHING, SIDE, Network  # noqa: E402

SEED, TEST_SEED = 20, 21
BATCH, NOTHINGS, STRANGE = 64, 8, 0.2  # pictures a batch, of nothing in it, share off-style
RATE, MUON_RATE, DECAY, SMOOTHING = 3e-3, 5e-3, 0.05, 0.05
ROUNDS = 4  # changed renderings of each picture in the test


class Data:
    """Pictures [N, 3, 128, 128] of bytes with what they show.

    Attributes:
        concepts, styles: an index for each picture, [N].
        labels: the names for them, by domain; the last concept is ``NOTHING``.
        held: whether a picture's pair is left out for the test, [N].
    """

    def __init__(self, images, rows):
        named = sorted({row["concept"] for row in rows})
        self.labels = {"concept": (*named, NOTHING), "style": tuple(pictures.STYLES)}
        self.images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        self.concepts = torch.tensor([named.index(row["concept"]) for row in rows])
        self.styles = torch.tensor([self.labels["style"].index(row["style"]) for row in rows])
        self.held = torch.tensor([left_out(row["concept"], row["style"]) for row in rows])

    def take(self, chosen):
        """Pictures [n, 3, 128, 128] in 0..1."""
        return self.images[chosen].float() / 255


def left_out(concept, style):
    """Whether a pair is for the test. Styles made from one drawing are left out together."""
    drawing = pictures.STYLES[style][0]
    return zlib.crc32(f"judge|{concept}|{drawing}".encode()) % 10 == 0


def read_data(folder, packages):
    """The demo's pictures and those of the controls."""
    images, rows = pictures.load(folder)
    known = pictures.Packages(pictures.fetch(packages))
    with open(HERE / "controls.csv", newline="", encoding="utf-8") as file:
        controls = [pictures.Concept(**row) for row in csv.DictReader(file)]
    drawn = [(c, s, pictures.draw_style(known, c, s)) for c in controls for s in pictures.STYLES]
    drawn = [found for found in drawn if found[2] is not None]
    rows = rows + [{"concept": concept.concept, "style": style} for concept, style, _ in drawn]
    return Data(np.concatenate([images, np.stack([found[2] for found in drawn])]), rows)


class Bank:
    """Changed pictures, made once for all training, because making them costs as much as learning.

    Attributes:
        images: bytes [N, 3, 48, 48].
        concepts: what to say [N].
        styles: shares of what to say [N, S]. A picture of nothing has no style: all are equally
            right. One in strange colours has zeros, which leave it out of the loss.
        held: as in ``Data``.
    """

    def __init__(self, data, batches):
        random = torch.Generator().manual_seed(SEED)
        parts = zip(*[make_batch(random, data) for _ in range(batches)])
        self.images, self.concepts, self.styles, self.held = (torch.cat(part) for part in parts)


def make_batch(random, data):
    rows = torch.randint(len(data.images), (BATCH - NOTHINGS,), generator=random)
    plain = data.take(rows)
    nothing = judge_pictures.of_nothing(random, judge_pictures.resized(plain, SIDE), NOTHINGS)
    strange = judge_pictures.some(random, len(rows), STRANGE)
    shown = torch.where(strange, judge_pictures.estranged(random, plain), plain)
    shown = torch.cat([judge_pictures.changed(random, shown), nothing])
    count = len(data.labels["style"])
    unknown = torch.full((NOTHINGS,), len(data.labels["concept"]) - 1)
    styles = one_hot(data.styles[rows], count).float() * ~strange.view(-1, 1)
    return (
        (shown * 255).round().byte(),
        torch.cat([data.concepts[rows], unknown]),
        torch.cat([styles, torch.full((NOTHINGS, count), 1 / count)]),
        torch.cat([data.held[rows], torch.zeros(NOTHINGS, dtype=torch.bool)]),
    )


def make_optimizers(network, steps, peak):
    """Muon (Jordan et al. 2024) for the trunk's matrices, AdamW for the rest."""
    trunk = network.trunk.named_parameters()
    matrices = [p for name, p in trunk if p.ndim == 2 and name != "places"]
    taken = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in taken]
    optimizers = [
        torch.optim.AdamW(others, lr=RATE, weight_decay=DECAY),
        torch.optim.Muon(
            matrices, lr=MUON_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    return optimizers, [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: peak * rate_at((i + 1) / steps))
        for o in optimizers
    ]


def rate_at(part):
    """Share of the learning rate: up over the first 5 %, then down along a cosine."""
    return part / 0.05 if part < 0.05 else 0.5 + 0.5 * math.cos(math.pi * (part - 0.05) / 0.95)


def train_network(network, bank, rows, steps, title, peak=1.0):
    """Train on these rows of the bank, in a new order each time they run out.

    ``peak``: the highest share of the learning rates.
    """
    random = torch.Generator().manual_seed(SEED)
    rounds = range(-(-steps * BATCH // len(rows)))
    order = torch.cat([rows[torch.randperm(len(rows), generator=random)] for _ in rounds])
    optimizers, schedules = make_optimizers(network.train(), steps, peak)
    device, began = next(network.parameters()).device, time.time()
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        said = network(bank.images[chosen].to(device).float() / 255)
        concepts, styles = bank.concepts[chosen].to(device), bank.styles[chosen].to(device)
        loss = cross_entropy(said["concept"], concepts, label_smoothing=SMOOTHING)
        loss = loss + cross_entropy(said["style"], styles, label_smoothing=SMOOTHING)
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 49:
            right = (said["concept"].argmax(-1) == concepts).float().mean()
            taken = f"{time.time() - began:.0f} s"
            print(
                f"{title}: step {step + 1}, loss {loss:.3f}, right {right:.2f}, {taken}", flush=True
            )
    network.eval()


@torch.no_grad()
def answers(network, images):
    """Indices said of pictures [N, 3, 48, 48], by domain."""
    device = next(network.parameters()).device
    parts = [network(part.to(device)) for part in images.split(BATCH)]
    return {d: torch.cat([part[d].argmax(-1) for part in parts]).cpu() for d in parts[0]}


class Test:
    """Pictures that no training sees: pairs left out, new changes of the others, and nothing."""

    def __init__(self, data):
        random = torch.Generator().manual_seed(TEST_SEED)
        held, seen = torch.nonzero(data.held).flatten(), torch.nonzero(~data.held).flatten()
        self.data, self.held, self.seen = data, held.repeat(ROUNDS), seen
        self.plain = judge_pictures.resized(data.take(held), SIDE)
        self.images = {
            "held": judge_pictures.changed(random, data.take(self.held)),
            "seen": judge_pictures.changed(random, data.take(seen)),
        }
        mixed = seen[torch.randperm(len(seen), generator=random)]
        some = judge_pictures.resized(data.take(mixed[:64]), SIDE)
        self.nothing = judge_pictures.of_nothing(random, some, 490)

    def of(self, network):
        """(facts, answers for the changed pictures of pairs left out)."""
        last = len(self.data.labels["concept"]) - 1
        facts = {"nothing": _share(answers(network, self.nothing)["concept"] == last)}
        for name, rows in (("held", self.held), ("seen", self.seen)):
            said = answers(network, self.images[name])
            facts |= {f"{name} {k}": v for k, v in self._right(said, rows).items()}
            facts[f"{name} called nothing"] = _share(said["concept"] == last)
        plain = answers(network, self.plain)
        rows = self.held[: len(self.plain)]
        facts |= {f"held, unchanged, {k}": v for k, v in self._right(plain, rows).items()}
        return facts, answers(network, self.images["held"])

    def _right(self, said, rows):
        return {
            "concept": _share(said["concept"] == self.data.concepts[rows]),
            "style": _share(said["style"] == self.data.styles[rows]),
        }


def _share(mask):
    return round(float(mask.float().mean()), 4)


def train(given):
    """Train, test and save both judges, side by side."""
    torch.manual_seed(SEED)
    data = read_data(given.pictures, given.packages or given.pictures / "packages")
    test, bank = Test(data), Bank(data, given.batches)
    networks = {name: Network(name, data.labels).to(given.device) for name in ARCHITECTURES}
    print(f"{len(data.images)} pictures, {len(bank.images)} changed", flush=True)
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(train_one, name, network, test, bank, given.steps)
            for name, network in networks.items()
        ]
        found = dict(zip(networks, (job.result() for job in jobs)))
    first, second = (said for _, said in found.values())
    record = {
        "labels": data.labels,
        "facts": {name: facts for name, (facts, _) in found.items()},
        "agreement": {domain: _share(first[domain] == second[domain]) for domain in first},
        "made": {"steps": given.steps, "batches": given.batches, "seed": SEED},
    }
    print(json.dumps({key: record[key] for key in ("facts", "agreement")}, indent=1))
    state = {
        f"{name}/{key}": value.half() if value.is_floating_point() else value
        for name, network in networks.items()
        for key, value in network.cpu().state_dict().items()
    }
    metadata = {"judges": json.dumps(record)}
    write_whole(given.out, lambda path: save_file(state, path, metadata))
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.2f} MB")


def train_one(name, network, test, bank, steps):
    """(facts, what it says of the test's pictures) of one network, which is trained in place."""
    kept, everything = torch.nonzero(~bank.held).flatten(), torch.arange(len(bank.held))
    train_network(network, bank, kept, steps, f"{name}, for the test")
    facts, said = test.of(network)
    print(f"{name} {json.dumps(facts)}", flush=True)
    train_network(network, bank, everything, steps // 2, f"{name}, all pairs", peak=0.5)
    final, _ = test.of(network)
    wanted = "seen concept", "seen style", "seen called nothing", "nothing"
    return facts | {f"final, {key}": final[key] for key in wanted}, said


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="make the judges")
    command.add_argument("--pictures", type=Path, default=Path("build/demo"), help="their folder")
    command.add_argument("--packages", type=Path, help="npm's archives (PICTURES/packages)")
    command.add_argument("--out", type=Path, default=FILE, help="the file to make")
    command.add_argument("--steps", type=int, default=1500, help="of 64 pictures, before the test")
    command.add_argument("--batches", type=int, default=700, help="of 64 changed pictures")
    command.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    command.set_defaults(run=train)
    command = commands.add_parser("check", help="judge what a demo model draws")
    command.add_argument("--model", default="demo", help="demo, or a checkpoint of its kind")
    command.add_argument("--judges", type=Path, default=FILE, help="the judges' file")
    command.add_argument("--style", action="append", choices=pictures.STYLES, help="only these")
    command.add_argument("--pairs", type=int, help="draw so many pairs only, chosen by chance")
    command.add_argument("--seeds", type=int, default=1, help="pictures a pair")
    command.add_argument("--sampling-steps", type=int, default=16)
    command.add_argument("--guidance", type=float, default=3.5)
    command.add_argument("--json", type=Path, help="write everything here too")
    command.set_defaults(run=check)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except ForgetError as error:
        sys.exit(str(error))


def check(given):
    from demo import judge_check  # needs diffusers, which training does not

    judge_check.check(given)


if __name__ == "__main__":
    main()
