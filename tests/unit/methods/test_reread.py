"""Re-read's regression against its equations written out with sums."""

import math
from dataclasses import replace

import pytest
import torch

from fmn.methods import shared_settings
from fmn.methods.reread import method, regression

from ..literal import near, rows

WIDTH, OUT = 7, 9
READ = [(rows(4, 1, WIDTH), rows(4, 2, WIDTH)), (rows(6, 3, WIDTH), rows(6, 4, WIDTH))]
ONE = READ[:1]
KEPT = rows(5, 5, WIDTH)
W = rows(OUT, 6, WIDTH)


def matrices(weight, read, kept, settings):
    """S and W Z, sum by sum."""
    width = weight.shape[1]
    system = torch.zeros(width, width, dtype=torch.float64)
    towards = torch.zeros(width, width, dtype=torch.float64)
    for concepts, others in read:
        for o, other in zip(concepts, others):
            system = system + torch.outer(o, o) / len(concepts)
            towards = towards + (1 + settings.overshoot) * torch.outer(other - o, o) / len(concepts)
    for k in kept:
        system = system + settings.preserve * torch.outer(k, k) / len(kept)
    mean = sum(float(system[i, i]) for i in range(width)) / width
    for i in range(width):
        system[i, i] += settings.damping * mean
    return system, weight @ towards


def whole(weight, read, kept, settings):
    """W Z S^-1."""
    system, target = matrices(weight, read, kept, settings)
    return target @ torch.inverse(system)


def best(weight, read, kept, settings, rank):
    """The change of that rank by the singular values of dW S^1/2; and the squares left out.

    With the symmetric root: any root of S gives the same change.
    """
    system, _ = matrices(weight, read, kept, settings)
    values, vectors = torch.linalg.eigh(system)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd(whole(weight, read, kept, settings) @ root)
    change = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank] @ torch.inverse(root)
    return change, float((s[rank:] ** 2).sum())


def jointly(weight, read, kept, settings, rank):
    """sum_i D_i (G_i + l t) (S + l t)^-1 of the changes D_i of each concept alone, with kept rows
    at a fifth of their weight."""
    changes = [best(weight, [one], kept, settings, rank)[0] for one in read]
    grams = [concept.T @ concept / len(concept) for concept, _ in read]
    system = sum(grams) + 0.2 * settings.preserve * kept.T @ kept / len(kept)
    eye = torch.eye(len(system), dtype=torch.float64)
    pull = 0.01 * float(system.trace()) / len(system) * eye
    wanted = sum(change @ (each + pull) for change, each in zip(changes, grams))
    return wanted @ torch.inverse(system + pull)


def objective(change, weight, read, kept, settings):
    """What ``solve_alone`` minimises, row by row."""
    found = 0.0
    for concepts, others in read:
        for o, other in zip(concepts, others):
            off = change @ o - (1 + settings.overshoot) * (weight @ (other - o))
            found += float(off @ off) / len(concepts)
    for k in kept:
        found += settings.preserve * float((change @ k) @ (change @ k)) / len(kept)
    plain, _ = matrices(weight, read, kept, replace(settings, damping=1e-9))
    ridge = settings.damping * float(plain.trace()) / len(plain)
    return found + ridge * float((change**2).sum())


def settings_of(**more):
    return method.Settings(**{"overshoot": 0.7, "preserve": 2.0, "damping": 0.1, "rank": 0} | more)


def solve(settings, read=ONE, kept=KEPT):
    problem = regression.Problem("", W, read, kept)
    return regression.solve(problem, settings, [settings.overshoot] * len(read))


def solved(settings, read=ONE, kept=KEPT):
    up, down = solve(settings, read, kept)
    assert up.shape[1] == down.shape[0]
    return up @ down


@pytest.mark.parametrize(
    "more", [{}, {"overshoot": 0.0}, {"preserve": 0.0, "damping": 1e-3}, {"preserve": 1000.0}]
)
def test_without_a_bound_it_is_ridge_regression(more):
    settings = settings_of(**more)
    near(solved(settings), whole(W, ONE, KEPT, settings), 1e-10)
    near(solved(settings, READ[1:]), whole(W, READ[1:], KEPT, settings), 1e-10)
    near(solved(settings, kept=KEPT[:0]), whole(W, ONE, KEPT[:0], settings), 1e-10)


def test_several_do_on_their_own_rows_what_they_do_alone():
    near(solved(settings_of(), READ), jointly(W, READ, KEPT, settings_of(), WIDTH), 1e-10)


def test_it_is_where_the_objective_is_least():
    settings = settings_of(damping=0.3)
    change = solved(settings)
    least = objective(change, W, ONE, KEPT, settings)
    for seed in range(20):
        other = change + 1e-3 * rows(OUT, 10 + seed, WIDTH)
        assert objective(other, W, ONE, KEPT, settings) > least


@pytest.mark.parametrize("rank", [1, 3])
def test_a_bounded_rank_is_the_best_of_that_rank(rank):
    settings, read, allowed = settings_of(rank=rank), ONE, rank
    up, down = solve(settings, read)
    assert up.shape == (OUT, allowed) and down.shape == (allowed, WIDTH)
    change, lost = best(W, read, KEPT, settings, allowed)
    near(up @ down, change, 1e-10)
    least = objective(up @ down, W, read, KEPT, settings)
    free = objective(whole(W, read, KEPT, settings), W, read, KEPT, settings)
    assert math.isclose(least, free + lost, rel_tol=1e-8) and lost > 1e-3
    for seed in range(20):
        some = rows(OUT, 100 + seed, allowed), rows(allowed, 200 + seed, WIDTH)
        for size in (1e-3, 1.0):
            other = (up + size * some[0]) @ (down + size * some[1])
            assert objective(other, W, read, KEPT, settings) > least
    # Nor is the plain truncation of the whole change, which forgets how S weighs, any better.
    u, s, vh = torch.linalg.svd(whole(W, read, KEPT, settings))
    plain = u[:, :allowed] @ torch.diag(s[:allowed]) @ vh[:allowed]
    assert objective(plain, W, read, KEPT, settings) > least


def test_no_rank_is_above_what_a_file_may_have(monkeypatch):
    monkeypatch.setattr(shared_settings, "MAX_RANK", 3)
    for rank in (0, 2, 3):
        up, _ = solve(settings_of(rank=rank), READ)
        assert up.shape[1] == 3
    assert solve(settings_of(rank=2))[0].shape[1] == 2


def test_overshoot_scales_the_change():
    for read in (ONE, READ):
        once = solved(settings_of(overshoot=0.0, rank=1), read)
        for overshoot in (0.5, 1.0, 4.0):
            found = solved(settings_of(overshoot=overshoot, rank=1), read)
            near(found, (1 + overshoot) * once, 1e-12)


def test_damping_holds_everything():
    sizes = [float(solved(settings_of(damping=d)).norm()) for d in (1e-3, 1.0, 1e3, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    plain, target = matrices(W, ONE, KEPT, settings_of(damping=1e-9))
    mean = float(plain.trace()) / WIDTH  # far out, W Z / (l t)
    near(solved(settings_of(damping=1e6)), target / (1e6 * mean), 1e-4)
    assert sizes[-1] < 1e-5 * sizes[0]


def test_units_do_not_count():
    """Damping is a share of what is read: the same text in other units gives the same edit."""
    settings = settings_of(rank=1)
    scaled = [(100 * concept, 100 * other) for concept, other in READ]
    near(solved(settings, scaled, 100 * KEPT), solved(settings, READ), 1e-10)


def test_what_is_kept_and_apart_stays_as_it_is():
    basis = torch.linalg.qr(rows(WIDTH, 7, WIDTH)).Q
    spoken, apart = basis[:, :3], basis[:, 3:]
    read = [(rows(4, 8, 3) @ spoken.T, rows(4, 9, WIDTH))]
    kept = rows(5, 10, 4) @ apart.T
    for more in ({}, {"preserve": 1000.0}, {"rank": 1}):
        change = solved(settings_of(**more), read, kept)
        assert float(change.norm()) > 0.1
        assert float((change @ kept.T).norm()) < 1e-12


def test_what_is_kept_stays_if_it_weighs_enough():
    few = KEPT[:2]
    moved = [
        float((solved(settings_of(preserve=p, damping=1e-6), kept=few) @ few.T).norm())
        for p in (0.0, 1.0, 1000.0)
    ]
    assert moved[0] > moved[1] > moved[2] and moved[2] < 1e-2 * moved[0]


def test_each_concept_counts_the_same():
    """Means over a concept's rows: twice the sentences are no strength."""
    twice = [tuple(torch.cat([side, side]) for side in READ[0]), READ[1]]
    near(solved(settings_of(), twice), solved(settings_of(), READ), 1e-12)
