"""What a patch by Re-read asks for on a diffusion transformer, before anything is computed.

    COMFYUI_PATH=... python benchmarks/transformer_plan.py [MODEL ...] [--method reread:passes=1]

Models are built of ComfyUI's classes without memory for their weights, and a forward pass is gone
through on tensors without numbers, which gives its FLOPs (a product and a sum are two). The method
itself runs at its settings on a stand-in with the model's layers and a few numbers a layer, which
counts its forwards, the rows that it keeps, and what it solves. One concept, an object.

    samples   prompts that go through the network, in so many forwards of it
    TFLOP     of these, without the text encoder
    rows      highest sum of what is recorded and kept in main memory, in 16 bits
    solving   TFLOP in float64, on the CPU
    file      the patch

Times are computed: FLOPs at --utilisation of a card's peak (bf16 with float32 sums, of Nvidia's
data sheets), and solving at --solver TFLOPS, one after the other. Reading weights that do not fit
on the card, and encoding the prompts, come on top. Models that this ComfyUI lacks are left out.
"""

import argparse
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from unittest import mock

from transformer_sizes import SIZES, Size, Words, build, start

if __name__ == "__main__":
    start()

import comfy.model_patcher
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils.flop_counter import FlopCounterMode

from fmn.bench.running.cells import parse_method
from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.hosts.comfyui.unknown_model import UnknownModel, WatchedModel
from fmn.methods import forget, settings_of
from fmn.methods.reread import recorded
from fmn.models.families import layers
from fmn.models.interface import Fingerprint, Text
from fmn.models.recording import Recorder
from fmn.models.sampling import SigmaSchedule
from fmn.models.transformers import POOLED, Reader
from fmn.models.unknown_family import UnknownFamily
from fmn.patches.patch import ForgetPatch, file_size

TERA, GIGA, MEGA = 1e12, 1e9, 1e6
ROW_BYTES = 2  # of a number, as the model computes it
LEVELS = torch.linspace(0.001, 1, 1000)
EIGEN = 9  # times n^3: FLOPs of all eigenvectors
CARDS = {"RTX 3060": 25.5, "RTX 4070": 58.3, "RTX 4090": 165.2}  # TFLOPS


@dataclass
class StandIn:
    """``fmn.models.interface.TransformerModel`` that computes nothing, and counts."""

    family: UnknownFamily
    length: Callable[[str], int]
    width: int
    prediction: str = "flow"
    forwards: list[tuple[int, int]] = field(default_factory=list)  # (samples, tokens of text)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    schedule: SigmaSchedule = SigmaSchedule(LEVELS, torch.ones(len(LEVELS)), 1 - LEVELS)

    def __post_init__(self) -> None:
        self.modules = {name: nn.Linear(self.width, self.width) for name in self.family.readers()}

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("0" * 32)

    def encode(self, prompt: Prompt) -> Text:
        return Text(torch.randn(1, self.length(prompt.text), 1))

    @contextmanager
    def watch(self, batch: int, side: int) -> Iterator["StandIn"]:
        yield self

    def module(self, name: str) -> nn.Module:
        return self.modules[name]

    @torch.no_grad()
    def predict_each(self, x_t: Tensor, t: int, texts: Sequence[Text]) -> Tensor:
        entry = recorded.known(self.family)
        count = math.prod(x_t.shape[2:]) // entry.patch**2
        for length, some in groupby(text.context.shape[1] for text in texts):
            samples = len(list(some))
            self.forwards.append((samples, length))
            for name, reader in self.family.readers().items():
                tokens = () if reader.tokens == POOLED else (-(-count // entry.pad) * entry.pad,)
                self.modules[name](torch.randn(samples, *tokens, self.width))
        return torch.zeros_like(x_t)


class Ledger:
    """What the method keeps and solves, in numbers of the real model's layers."""

    def __init__(self, family: UnknownFamily) -> None:
        self.shapes = {layer.name: layer.shape for layer in layers(family)}
        self.read = {
            name: self.of_attention(name, reader) for name, reader in family.readers().items()
        }
        self.kept: list[tuple[weakref.ref, int]] = []
        self.rows, self.solving, self.solved = 0, 0.0, 0

    def of_attention(self, name: str, reader: Reader) -> tuple[int, int]:
        """Outputs of a layer, and those of its inputs that are recorded."""
        outputs, inputs = self.shapes[name]
        return outputs, outputs if reader.fused else inputs

    @contextmanager
    def open(self) -> Iterator[None]:
        taken, solve = Recorder.taken, recorded.reduced_rank_ridge

        def watched(recorder: Recorder) -> Any:
            rows = taken(recorder)
            for name, pair in rows.items():
                for tensor, width in zip(pair, reversed(self.read[name])):
                    count = math.prod(tensor.shape[:2])
                    self.kept.append((weakref.ref(tensor), count * width * ROW_BYTES))
            self.rows = max(
                self.rows, sum(size for alive, size in self.kept if alive() is not None)
            )
            return rows

        def counted(concepts: Any, kept: Tensor, *options: Any) -> Any:
            rows = sum(len(o) for o, _ in concepts)
            shape = list(self.read.values())[self.solved % len(self.read)]
            self.solving += solving(rows, rows + len(kept), *reversed(shape))
            self.solved += 1
            return solve(concepts, kept, *options)

        with (
            mock.patch.object(Recorder, "taken", watched),
            mock.patch.object(recorded, "reduced_rank_ridge", counted),
        ):
            yield


def solving(concept: int, rows: int, inputs: int, outputs: int) -> float:
    """FLOPs of ``reduced_rank_ridge`` with so many rows, of which so many of concepts."""
    if rows < inputs:
        flops = 2 * rows**2 * inputs + rows**3
    else:
        flops = 2 * rows * inputs**2 + inputs**3 / 3 + 4 * concept * inputs**2
        flops += 2 * concept**2 * inputs
    if concept > outputs:
        flops += 2 * concept * outputs * (concept + outputs) + EIGEN * outputs**3
    else:
        flops += 2 * EIGEN * concept**3 + 8 * concept**3 + 6 * concept**2 * outputs
    return flops


@dataclass(frozen=True)
class Plan:
    """What a run asks for; ``length`` is the mean of its texts."""

    forwards: int
    samples: int
    length: int
    rows: int
    solving: float
    file: int


def plan(family: UnknownFamily, length: Callable[[str], int], settings: Any) -> Plan:
    """Of a patch for one object with the settings of Re-read.

    Args:
        length: function from a text to its tokens, as many as the network reads.
    """
    stand_in, ledger = StandIn(family, length, 2 * settings.rank), Ledger(family)
    with ledger.open():
        patch = forget(stand_in, [Concept("dog", kind="object")], settings)
    samples = sum(count for count, _ in stand_in.forwards)
    tokens = sum(count * tokens for count, tokens in stand_in.forwards)
    changes = {}
    for name, (_, down) in patch.changes.items():
        outputs, inputs = ledger.shapes[name]
        changes[name] = torch.zeros(outputs, len(down)), torch.zeros(len(down), inputs)
    file = file_size(ForgetPatch(family, changes, patch.info))
    mean = round(tokens / samples)
    return Plan(len(stand_in.forwards), samples, mean, ledger.rows, ledger.solving, file)


def forward_flops(host: UnknownModel, settings: Any, length: int) -> float:
    """Of one forward of one prompt with so many tokens of text."""
    family = host.family
    words = " ".join(["a"] * max(1, length - host.clip.size.extra))
    text = host.encode(Prompt(words, ""))
    prompts = recorded.Prompts(host, [words], settings)
    noise = torch.empty(1, family.latent_channels, prompts.side, prompts.side, device="meta")
    watched = WatchedModel(family, host.patcher)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *a, **k: nullcontext()))
        # Each token of HiDream goes through some of the experts; here all of these are the first.
        stack.enter_context(mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True))
        for module in host.patcher.model.diffusion_model.modules():
            if hasattr(module, "num_activated_experts"):
                module.experts = module.experts[:1]
        counter = stack.enter_context(FlopCounterMode(display=False))
        watched.predict_each(noise, len(watched.schedule) - 1, [text])
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--method", default="reread", help="as fmn bench takes it (reread)")
    parser.add_argument("--utilisation", type=float, default=0.5, help="of a card's peak (0.5)")
    parser.add_argument("--solver", type=float, default=0.2, help="TFLOPS in float64 (0.2)")
    options = parser.parse_args()
    unknown = set(options.models) - set(SIZES)
    if unknown:
        parser.error(f"no {', '.join(unknown)}: use {', '.join(SIZES)}")
    try:
        method = parse_method(options.method).settings
        settings = settings_of(method["preset"], method["settings"])
    except (ForgetError, KeyError) as error:
        sys.exit(f"--method: {error}")
    print_table(options.models or SIZES, settings, options.utilisation, options.solver)


def empty(size: Size) -> UnknownModel:
    """A model without memory for its weights."""
    model = build(size, 0, torch.bfloat16, "meta")
    model.device = meta = torch.device("meta")
    return UnknownModel(comfy.model_patcher.ModelPatcher(model, meta, meta), Words(size))


def print_table(models: Sequence[str], settings: Any, utilisation: float, solver: float) -> None:
    print("| | weights | forwards | samples | TFLOP | rows GB | solving TFLOP | file MB | "
          f"solving s | {' | '.join(f'{card} s' for card in CARDS)} |")  # fmt: skip
    print("|---|" + "---:|" * (8 + len(CARDS)))
    for name in models:
        size = SIZES[name]
        try:
            host = empty(size)
        except LookupError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        weights = sum(p.numel() for p in host.patcher.model.diffusion_model.parameters())
        found = plan(host.family, Words(size).length, settings)
        flops = found.samples * forward_flops(host, settings, found.length)
        solving = found.solving / solver / TERA
        cards = [flops / (peak * utilisation * TERA) + solving for peak in CARDS.values()]
        print(
            f"| {size.title} | {weights / GIGA:.1f} B | {found.forwards} | {found.samples} | "
            f"{flops / TERA:.0f} | {found.rows / GIGA:.2f} | {found.solving / TERA:.1f} | "
            f"{found.file / MEGA:.1f} | {solving:.0f} | "
            f"{' | '.join(f'{seconds:.0f}' for seconds in cards)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
