"""Double Projections with whole matrices against ours."""

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import double_projections as dp

from ..literal import WIDTH, assert_solves, near, rows, weights
from ..tiny import TinyModel, same_tensors, weights_of
from .test_uce import last

KEEP = ("blue house", "tree", "a man on a horse", "boat")


def spaces(model, texts, count):
    """An orthonormal basis of the main directions of kept contexts, and U of what is left."""
    u, s, _ = torch.linalg.svd(torch.stack([last(model, text) for text in texts]).T)
    return u[:, :count], u[:, count:]


def literal(weight, c, proxy, u):
    """dW = W (c* - c) x^T U^T / |x|^2 with x = U^T c, for one concept."""
    x = u.T @ c
    return weight + torch.outer(weight @ (proxy - c), x) @ u.T / x.square().sum()


@pytest.mark.parametrize("anchor", ["", "cat"])
@pytest.mark.parametrize("proxy", [0, 2])
def test_one_concept_is_the_published_formula(anchor, proxy, tmp_path):
    model, concept = TinyModel(), Concept("red dog", anchor=anchor)
    settings = dp.Settings(keep_list="none", proxy=proxy)
    before = weights_of(model.unet)
    patch = dp.run(model, [concept], settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    safe, u = spaces(model, ("", *KEEP), 5)
    c = last(model, "red dog")
    safe = safe[:, : proxy or 5]
    target = last(model, anchor) if anchor else safe @ safe.T @ c
    expected = {name: literal(w, c, target, u) for name, w in weights(model).items()}
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")
    assert patch.ranks == [1]


@pytest.mark.parametrize("settings", [dp.Settings(directions=3), dp.Settings()])
def test_a_large_kept_set_is_cut_to_its_main_directions(settings, tmp_path):
    """The shipped list spans the tiny model's width: by default half of that is protected."""
    model, concept = TinyModel(), Concept("red dog", anchor="cat")
    patch = dp.run(model, [concept], settings)
    words = ("", *dp.keep_for([concept]))
    assert len(words) > WIDTH
    # BOS, of the empty prompt, is always protected; then what is largest without it.
    bos = last(model, "") / last(model, "").norm()
    without = torch.eye(WIDTH, dtype=torch.float64) - torch.outer(bos, bos)
    others = without @ torch.stack([last(model, text) for text in words]).T
    main = torch.linalg.svd(others).U[:, : (settings.directions or WIDTH // 2) - 1]
    u = torch.linalg.svd(torch.cat([bos[:, None], main], 1)).U[:, main.shape[1] + 1 :]
    expected = {
        name: literal(w, last(model, "red dog"), last(model, "cat"), u)
        for name, w in weights(model).items()
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_own_words_are_protected_before_the_list():
    model, concept = TinyModel(), Concept("red dog", anchor="cat")
    patch = dp.run(model, [concept], dp.Settings(), keep=KEEP)
    for name, weight in weights(model).items():
        for text in ("", *KEEP):
            moved = patch.change_of(name).double() @ last(model, text)
            assert float(moved.norm()) < 1e-5 * float((weight @ last(model, text)).norm())


def test_several_concepts_are_solved_jointly(tmp_path):
    """Each goes to its own target exactly, and nothing kept moves."""
    model = TinyModel()
    concepts = [Concept("red dog", anchor="cat"), Concept("monet", "style", anchor="painter")]
    settings = dp.Settings(keep_list="none")
    patch = dp.run(model, concepts, settings, keep=KEEP)
    _, u = spaces(model, ("", *KEEP), 5)
    c = torch.stack([last(model, each.name) for each in concepts]).T
    targets = torch.stack([last(model, each.anchor) for each in concepts]).T
    p = u @ u.T
    expected = {
        name: w + w @ (targets - c) @ torch.inverse(c.T @ p @ c) @ c.T @ p
        for name, w in weights(model).items()
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")
    for name, w in expected.items():
        near(w @ c, weights(model)[name] @ targets, 1e-9)
        for text in ("", *KEEP):
            near(w @ last(model, text), weights(model)[name] @ last(model, text), 1e-9)


def test_the_edit_itself_is_exact():
    basis = torch.linalg.qr(rows(4, 1).T).Q
    c, target = rows(1, 2), rows(1, 3)
    edit = dp.double_projections(c, target, basis)
    u = torch.linalg.svd(basis).U[:, 4:]
    identity = torch.eye(WIDTH, dtype=torch.float64)
    near(identity + edit.left @ edit.right, literal(identity, c[0], target[0], u), 1e-10)


def test_the_same_name_twice_does_not_blow_up():
    basis = torch.linalg.qr(rows(4, 1).T).Q
    c, target = rows(1, 2), rows(1, 3)
    twice = dp.double_projections(torch.cat([c, c]), torch.cat([target, target]), basis)
    once = dp.double_projections(c, target, basis)
    near(twice.left @ twice.right, once.left @ once.right, 1e-9)


def test_a_concept_made_of_kept_words_is_refused():
    concept = Concept("old tree house")
    with pytest.raises(ForgetError, match="'old tree house' is a mix of the kept words"):
        # The kept phrase has the same words before and the same last token.
        dp.run(TinyModel(), [concept], dp.Settings(keep_list="none"), keep=("big red house",))
