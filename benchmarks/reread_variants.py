"""What makes Re-read work: itself beside variants, on the targets that settings are chosen on.

    python benchmarks/reread_variants.py
    python benchmarks/reread_variants.py "push 0" "push 1" --count 8

draws with the demo model and lets its judge count, 8 pictures a question: UA, IRA and CRA in %, and
their harmonic mean. Rows of one run have equal noise. Variants:

    re-read           the method at its defaults
    push 0, push 1    people and things without overshoot, and with more; styles as ever
    rank 1, rank 2    narrower
    no kept           nothing but damping holds kept prompts
    values            the same regression on what goes into to_v, all heads alike
    values by head    the same, each head for itself
    attention         layer-wise re-steer: the attention that the concept's words get at the
                      recorded queries is trained away in to_k, outside the U-Net
    direction         the mean of o - o* is projected out of what is read, as CASteer does
    direction, kept   that in the oblique way that spares kept prompts' covariance, as LEACE does
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.measures.pictures import pictures
from fmn.bench.measures.trial import Trial
from fmn.bench.reporting.statistics import harmonic_mean, unlearn_canvas
from fmn.bench.suite import load_suite
from fmn.concepts.concept import Prompt
from fmn.concepts.prompt_templates import sentences
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.linalg import gram, to_float64, truncate_product
from fmn.methods import reread
from fmn.methods.reread.attention_output import cross_attention_layers
from fmn.methods.reread.method import kept_texts
from fmn.methods.reread.regression import Problem, both_sides, solve
from fmn.methods.reread.regression_data import ConceptSentences, KeptSentences, QuerySampler
from fmn.metrics.load import load_judge
from fmn.models.attention_maps import concept_flags
from fmn.models.image_sampler import open_sampler
from fmn.patches.task import Task

DEFAULTS = reread.Settings()


def by_layer(model, concept, solved):
    """A patch whose layers are solved one by one.

    Args:
        solved: (denoiser, layer, reading, kept) -> (name of a Linear, up, down).
    """
    kept = kept_texts([concept], (), DEFAULTS)
    changes = {}
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        pairs = sentences(concept, DEFAULTS.prompts)
        lists = [*both_sides([pairs]), kept]
        sampler = QuerySampler(model, denoiser, DEFAULTS, lambda step: None, lists)
        first, second, of_kept = sampler.draw(lists)
        reading = ConceptSentences(model, pairs, first, second)
        stay = KeptSentences(model.encode_all(kept), [of_kept, reading.queries], DEFAULTS)
        for layer in cross_attention_layers(denoiser, model.family):
            name, up, down = solved(denoiser, layer, reading, stay)
            changes[name] = up.float(), down.float()
    return Task(model, [concept], DEFAULTS).patch(changes, [0.0])


def solved_by_reread(weight, concepts, kept, settings):
    problem = Problem("", weight, concepts, kept)
    return solve(problem, settings, [settings.overshoot] * len(concepts))


def method(changes, model, concept):
    return reread.run(model, [concept], replace(DEFAULTS, **changes))


def weight(denoiser, name):
    return to_float64(denoiser.module(name).weight.detach())


def values(by_head, model, concept):
    def solved(denoiser, layer, reading, kept):
        heads, _, width = layer.value.shape
        # With the identity in place of W_v, what is read out are the attended contexts.
        bare = layer._replace(value=torch.eye(width).expand(heads, -1, -1))
        rows = [x.unflatten(1, (heads, width)) for x in (*reading.rows(bare), kept.rows(bare))]
        own = weight(denoiser, f"{layer.name}.to_v")
        if not by_head:
            concept_, other, stay = (x.flatten(0, 1) for x in rows)
            return f"{layer.name}.to_v", *solved_by_reread(own, [(concept_, other)], stay, DEFAULTS)
        whole = replace(DEFAULTS, rank=0)
        change = [
            torch.mm(
                *solved_by_reread(part, [(rows[0][:, i], rows[1][:, i])], rows[2][:, i], whole)
            )
            for i, part in enumerate(own.chunk(heads))
        ]
        change = torch.cat(change)
        up, down, _ = truncate_product(change, torch.eye(width).double(), DEFAULTS.rank)
        return f"{layer.name}.to_v", up, down

    return by_layer(model, concept, solved)


def direction(oblique, model, concept):
    def solved(denoiser, layer, reading, kept):
        name = f"{layer.name}.to_out.0"
        having, lacking = reading.rows(layer)
        mean = (having - lacking).mean(0)
        stay = kept.rows(layer)
        system = gram(stay) / len(stay)
        system += 1e-3 * system.trace() / len(system) * torch.eye(len(system)).double()
        test = torch.linalg.solve(system, mean) if oblique else mean
        return name, -weight(denoiser, name) @ mean[:, None] / (test @ mean), test[None]

    return by_layer(model, concept, solved)


def attention(model, concept, steps=100, rank=4, lr=3e-3, at_once=16):
    """Layer-wise re-steer: Adam on a low rank of to_k, on recorded queries."""
    pairs = sentences(concept, DEFAULTS.prompts)
    prompts = [Prompt(text, concept.name) for text, _ in pairs]
    flags = torch.cat([concept_flags(model, prompt) for prompt in prompts])

    def solved(denoiser, layer, reading, kept):
        generator = torch.Generator().manual_seed(0)
        heads, size, width = layer.key.shape
        down = torch.randn(rank, width, generator=generator) * width**-0.5
        up = torch.zeros(heads, size, rank)
        factors = [up.requires_grad_(), down.requires_grad_()]
        adam = torch.optim.Adam(factors, lr=lr)
        queries = reading.queries[layer.name]
        queries = queries[torch.arange(len(prompts)) % len(queries)]
        some = torch.randint(len(queries), (len(kept.contexts),), generator=generator)
        for step in range(steps):
            with torch.enable_grad():
                key = layer.key + torch.einsum("hdr,rc->hdc", *factors)
                got = attended(layer, key, queries, reading.concept)
                loss = torch.einsum("nhst,nt->nhs", got, flags.float()).mean()
                rows = slice(step * at_once % len(some), step * at_once % len(some) + at_once)
                stay = queries[some[rows]], kept.contexts[rows]
                moved = attended(layer, key, *stay) - attended(layer, layer.key, *stay)
                loss = loss + DEFAULTS.preserve * moved.square().sum(-1).mean()
                adam.zero_grad()
                loss.backward()
            adam.step()
        return f"{layer.name}.to_k", up.detach().flatten(0, 1), down.detach()

    return by_layer(model, concept, solved)


def attended(layer, key, queries, contexts):
    """Attention probabilities [N, H, S, T]."""
    q = queries.unflatten(-1, (key.shape[0], -1)) * key.shape[1] ** -0.5
    return torch.einsum("nshd,hdc,ntc->nhst", q, key, contexts.float()).softmax(-1)


VARIANTS = {
    "re-read": partial(method, {}),
    "push 0": partial(method, {"overshoot": 0.0}),
    "push 1": partial(method, {"overshoot": 1.0}),
    "rank 1": partial(method, {"rank": 1}),
    "rank 2": partial(method, {"rank": 2}),
    "no kept": partial(method, {"preserve": 0.0, "damping": 0.1}),
    "values": partial(values, False),
    "values by head": partial(values, True),
    "attention": attention,
    "direction": partial(direction, False),
    "direction, kept": partial(direction, True),
}


def measure(model, judge, suite, target, patch, count, cache):
    """UA, IRA and CRA of one target."""
    with open_sampler(model, suite.sampling) as sampler, sampler.applying([(patch, 1.0)]):
        trial = Trial(suite, target, sampler, judge, count=count, cache=cache)
        found = unlearn_canvas([(pictures(trial)["rows"], target.domain)], resamples=2)
    return [found[name]["value"] for name in ("UA", "IRA", "CRA")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", nargs="*", default=list(VARIANTS))
    parser.add_argument("--count", type=int, default=8, help="pictures a question (8)")
    options = parser.parse_args()
    model, judge, suite = DiffusersModel.load("demo"), load_judge("demo"), load_suite("demo")
    targets, cache = [target for target in suite.targets if target.split == "tune"], {}
    print("| variant | UA | IRA | CRA | harmonic mean | seconds | worst target |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for name in options.variant:
        rows, seconds = [], 0.0
        for target in targets:
            start = time.perf_counter()
            patch = VARIANTS[name](model, suite.concept(target))
            seconds += time.perf_counter() - start
            rows.append(measure(model, judge, suite, target, patch, options.count, cache))
        shares = torch.tensor(rows).mean(0).tolist()
        own = [float(harmonic_mean(*row)) for row in rows]
        worst = min(range(len(own)), key=own.__getitem__)
        cells = " | ".join(f"{share:.0%}" for share in (*shares, float(harmonic_mean(*shares))))
        print(
            f"| {name} | {cells} | {seconds / len(targets):.1f} | "
            f"{targets[worst].name} {own[worst]:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
