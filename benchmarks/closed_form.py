"""Closed forms at full size against the same on whole matrices: seconds, in one run.

    python benchmarks/closed_form.py --family sd1 --concepts 100

Weights of the family's keys and values are random, and so are the contexts, of the norm that CLIP's
have; no U-Net is needed. The whole matrices are solved for one layer of each shape, in float32 as
released codes do, and the time is multiplied by the number of such layers.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmn.closed_form.adversarial_embedding import hardest_contexts
from fmn.closed_form.input_edit import input_patch, key_value_layers, layer_patch, uce, weight_gram
from fmn.closed_form.text_embeddings import Pairs
from fmn.concepts.concept import Concept
from fmn.linalg import extend_basis, main_directions, weakest_direction
from fmn.methods import double_projections, rece, speed
from fmn.methods.uce import Settings
from fmn.models.families import FAMILIES
from fmn.patches.task import Task

NORM = 28.0  # of a token's context in Stable Diffusion 1.x


class Weights:
    """As much of a ``Model`` as closed forms need once the text is encoded."""

    prediction = "epsilon"

    def __init__(self, family):
        self.family = family
        generator = torch.Generator().manual_seed(0)
        self.modules = {
            layer.name: SimpleNamespace(
                weight=torch.randn(layer.shape, generator=generator) * layer.shape[1] ** -0.5
            )
            for layer in key_value_layers(family)
        }

    @contextmanager
    def borrow_denoiser(self):
        yield SimpleNamespace(module=self.modules.__getitem__)

    def fingerprint(self):
        return "0" * 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="sd1")
    parser.add_argument("--concepts", type=int, default=100, help="default 100")
    parser.add_argument("--kept", type=int, default=400, help="kept words (default 400)")
    parser.add_argument("--skip", nargs="*", default=[], choices=["uce", "rece", "speed", "dp"])
    options = parser.parse_args()
    model = Weights(FAMILIES[options.family])
    generator = torch.Generator().manual_seed(1)
    counts = options.concepts, options.concepts, options.kept
    width = model.family.context_dim
    c, anchors, kept = (
        NORM * width**-0.5 * torch.randn(n, width, generator=generator, dtype=torch.float64)
        for n in counts
    )
    concepts = [Concept(f"concept {i}") for i in range(options.concepts)]
    print(
        f"{options.family}: {options.concepts} concepts, {options.kept} kept words, "
        f"{torch.get_num_threads()} threads"
    )
    for name, ours, literal in methods(model, concepts, Pairs(c, anchors), kept):
        if name not in options.skip:
            report(name, ours, literal, model)


def methods(model, concepts, pairs, kept):
    """(name, function that makes our patch, function that solves one layer's whole matrix)."""
    settings = Settings()
    c, anchors, k = (rows.float() for rows in (*pairs, kept))
    identity = torch.eye(c.shape[1])

    def literal_uce(weight, old=c):
        left = weight @ (0.5 * identity + anchors.T @ old + k.T @ k)
        return left @ torch.inverse(0.5 * identity + old.T @ old + k.T @ k)

    def ours_uce():
        return input_patch(Task(model, concepts, settings), pairs, lambda _: uce(*pairs, kept))

    def ours_rece():
        weights = {}

        def edit_of(denoiser):
            weights["gram"] = weight_gram(denoiser, model.family)
            return rece.rece(weights["gram"], pairs, kept, rece.Settings())

        return input_patch(Task(model, concepts, rece.Settings()), pairs, edit_of)

    def literal_rece(weight):
        new = literal_uce(weight)
        gram, cross = new.T @ new, new.T @ weight  # of this layer; the sums are cheap
        return literal_uce(new, hardest_contexts(gram.double(), cross.double(), c, 0.1).float())

    def ours_speed():
        how = speed.Settings()
        problem = speed.Problem(pairs, kept, kept[:0])
        whole = main_directions(kept, c.shape[1])
        noise = torch.Generator().manual_seed(0)

        left = (pairs.anchors - pairs.targets).mT

        def right_of(layer, weight):
            weakest = weakest_direction(weight)
            retained = speed.retained_rows(problem, weight @ left, weakest, how.copies, noise)
            return speed.right_factor(problem, retained, extend_basis(whole, weakest), how)

        return layer_patch(Task(model, concepts, how), pairs, lambda _: (left, right_of), which="v")

    def literal_speed(weight):
        a, b = anchors.T @ c / len(c), c.T @ c / len(c)
        plain = weight @ (a - b) @ torch.inverse(identity + b)
        influence = (k @ plain.T).square().sum(1)
        retained = k[influence >= influence.mean()]
        direction = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
        copied = retained.repeat_interleave(10, 0)
        noisy = copied + torch.randn_like(copied) @ torch.outer(direction, direction)
        influence = (noisy @ plain.T).square().sum(1)
        retained = torch.cat([retained, noisy[influence >= influence.mean()]])
        u, s, _ = torch.linalg.svd(retained.T @ retained / len(retained))
        p = u[:, s < 0.1] @ u[:, s < 0.1].T
        return weight @ (identity + (a - b) @ p @ torch.inverse(b @ p + identity))

    def ours_dp():
        basis = main_directions(kept, c.shape[1] // 2)
        edit = double_projections.double_projections(*pairs, basis)
        return input_patch(Task(model, concepts, settings), pairs, lambda _: edit)

    def literal_dp(weight):
        u = torch.linalg.svd(k.T).U[:, : c.shape[1] // 2]
        outside = c - c @ u @ u.T
        inverse = torch.inverse(outside @ outside.T)
        return weight + weight @ (anchors - c).T @ inverse @ outside

    yield "uce", ours_uce, literal_uce
    yield "rece", ours_rece, literal_rece
    yield "speed", ours_speed, literal_speed
    yield "dp", ours_dp, literal_dp


def report(name, ours, literal, model):
    start = time.perf_counter()
    patch = ours()
    seconds = time.perf_counter() - start
    chosen = [layer for layer in key_value_layers(model.family) if layer.name in patch.changes]
    whole = 0.0
    for shape in sorted({layer.shape for layer in chosen}):
        alike = [layer for layer in chosen if layer.shape == shape]
        weight = model.modules[alike[0].name].weight
        start = time.perf_counter()
        literal(weight)
        whole += (time.perf_counter() - start) * len(alike)
    size = sum(tensor.numel() * 2 for pair in patch.changes.values() for tensor in pair)
    print(
        f"{name:6} ours {seconds:7.2f} s   whole matrices {whole:8.2f} s   ratio "
        f"{whole / seconds:6.1f}   rank {max(patch.ranks)}   {size / 1e6:.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
