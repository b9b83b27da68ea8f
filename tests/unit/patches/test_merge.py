"""Merged patches against full matrices, on numbers small enough to see."""

import itertools
import json

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods.describe import describe
from fmn.models.families import DEMO, SD1, layers
from fmn.models.unknown_family import family_of_file
from fmn.patches.joint import joint_change, layer_inputs
from fmn.patches.merge import choose_ranks, concatenate, merge_patches
from fmn.patches.patch import ForgetPatch, file_size, load_patch, save_patch

from ..tiny import make_patch, metadata_of, rewrite

CAT = [Concept("cat")]
NAME = next(layer.name for layer in layers(DEMO) if layer.is_key_or_value)
OUT, IN = next(layer.shape for layer in layers(DEMO) if layer.is_key_or_value)


def patch_of(up, down, name=NAME, concept="dog"):
    info = make_patch(concepts=[Concept(concept)]).info
    return ForgetPatch(DEMO, {name: (up, down)}, info)


def unit(size, *places):
    return torch.eye(size)[list(places)]


def test_a_merged_change_is_the_sum_of_the_changes():
    """Of full matrices, also where layers differ, and of convolutions."""
    first = make_patch(rank=2, scope=lambda layer: True)
    second = make_patch(rank=3, seed=1, concepts=CAT)
    merged = merge_patches([(first, 0.5), (second, -2.0)])
    assert merged.error == 0 and set(merged.patch.changes) == set(first.changes)
    for layer in first.layers:
        expected = 0.5 * first.change_of(layer.name)
        if layer.name in second.changes:
            expected = expected - 2 * second.change_of(layer.name)
        found = merged.patch.change_of(layer.name)
        assert found.shape == layer.shape and torch.allclose(found, expected, atol=1e-5)
    up, down = concatenate([(first, 0.5), (second, -2.0)])[NAME]
    assert up.shape == (OUT, 5) and down.shape == (5, IN)


def other_patch(shapes, concept="dog"):
    """A patch of rank 2 for a model that is none we know; name -> shape of the weight."""
    parts = {name: {"up": (high, 2), "down": (2, wide)} for name, (high, wide) in shapes.items()}
    changes = {
        name: (torch.ones(high, 2), torch.ones(2, wide)) for name, (high, wide) in shapes.items()
    }
    info = make_patch(concepts=[Concept(concept)]).info
    return ForgetPatch(family_of_file("f", "Flux", None, parts), changes, info)


@pytest.mark.parametrize("budget", [0, 10**5])
@pytest.mark.parametrize("order", [1, -1])
def test_layers_of_all_patches_are_saved_of_models_that_files_tell_of(tmp_path, order, budget):
    one = other_patch({"lora_unet_a": (6, 4)})
    two = other_patch({"lora_unet_a": (6, 4), "lora_unet_b": (8, 4)}, "cat")
    merged = merge_patches([(one, 1.0), (two, 0.5)][::order], budget)
    found = load_patch(save_patch(merged.patch, tmp_path / "both.safetensors"))
    assert found.changes.keys() == two.changes.keys()
    assert torch.allclose(found.change_of("lora_unet_a"), torch.full((6, 4), 3.0), atol=1e-2)
    assert torch.allclose(found.change_of("lora_unet_b"), torch.full((8, 4), 1.0), atol=1e-2)


def test_layers_of_one_name_and_two_shapes_are_refused():
    one, two = (
        other_patch({"lora_unet_a": (high, 4)}, name) for high, name in ((6, "x"), (8, "y"))
    )
    with pytest.raises(ForgetError, match=r"'lora_unet_a' is of shape \[6, 4\] in the patch for x"):
        merge_patches([(one, 1.0), (two, 1.0)])


def test_a_high_rank_is_cut_to_what_the_matrix_has():
    many = [(make_patch(rank=30, seed=seed, concepts=CAT), 1.0) for seed in range(5)]
    merged = merge_patches(many)
    assert max(merged.patch.ranks) == OUT == IN == 128 and merged.error < 1e-6
    expected = sum(patch.change_of(NAME) for patch, _ in many)
    assert torch.allclose(merged.patch.change_of(NAME), expected, atol=1e-4)


def test_ranks_beyond_what_a_file_may_have_are_cut(monkeypatch):
    monkeypatch.setattr("fmn.patches.merge.MAX_RANK", 3)
    patch = patch_of(unit(OUT, 0, 1, 2, 3).mT * torch.tensor([4.0, 3, 2, 1]), unit(IN, 0, 1, 2, 3))
    merged = merge_patches([(patch, 1.0)])
    assert merged.patch.ranks == [3] and merged.error == round((1 / 30) ** 0.5, 6)


def test_a_budget_keeps_the_largest_directions_of_all_layers():
    """Two layers of equal size: singular values 5, 1 and 4, 3. Room for three leaves out the 1."""
    names = [layer.name for layer in layers(DEMO) if layer.is_key_or_value][:2]
    patch = patch_of(unit(OUT, 0, 1).mT * torch.tensor([5.0, 1]), unit(IN, 0, 1))
    patch.changes[names[1]] = unit(OUT, 2, 3).mT * torch.tensor([4.0, 3]), unit(IN, 5, 6)
    assert names[0] == NAME
    whole = merge_patches([(patch, 1.0)], budget=10**6)
    assert whole.error == 0 and [len(d) for _, d in whole.patch.changes.values()] == [2, 2]
    merged = merge_patches([(patch, 1.0)], budget=file_size(whole.patch) - 100)
    assert [len(down) for _, down in merged.patch.changes.values()] == [1, 2]
    assert merged.error == round((1 / 51) ** 0.5, 6) == merged.patch.info["truncation_error"]
    expected = torch.zeros(OUT, IN)
    expected[0, 0] = 5
    assert torch.allclose(merged.patch.change_of(NAME), expected, atol=1e-6)


@pytest.mark.parametrize("equal", [True, False])
def test_no_other_choice_of_ranks_is_better(equal):
    """All choices tried. Layers of one size: none is better at any room. Else none is better that
    takes as many bytes as the order does before the first direction that does not fit."""
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for _ in range(20):
        values = [torch.rand(3, generator=generator).sort(descending=True).values for _ in range(3)]
        costs = [2] * 3 if equal else torch.randint(1, 6, (3,), generator=generator).tolist()
        choices = [
            (sum(rank * cost for rank, cost in zip(ranks, costs)), _left(values, ranks))
            for ranks in itertools.product(range(4), repeat=3)
        ]
        order = sorted(
            (float(value) ** 2 / cost, cost) for own, cost in zip(values, costs) for value in own
        )[::-1]
        whole = set(itertools.accumulate(cost for _, cost in order))
        for room in range(sum(costs) * 3 + 1):
            ranks = choose_ranks(values, costs, [0] * 3, room)
            taken = sum(rank * cost for rank, cost in zip(ranks, costs))
            assert taken <= room
            if equal or room in whole:
                best = min(left for bytes_, left in choices if bytes_ <= room)
                assert _left(values, ranks) == pytest.approx(best)
                checked += 1
    assert checked >= 180


def _left(values, ranks):
    return sum(float(own[rank:].square().sum()) for own, rank in zip(values, ranks))


def test_ranks_by_hand():
    three = [torch.tensor([5.0, 1.0]), torch.tensor([4.0, 3.0]), torch.tensor([])]
    for room, expected in ((0, [0, 0]), (1, [1, 0]), (2, [1, 1]), (3, [1, 2]), (9, [2, 2])):
        assert choose_ranks(three, [1, 1, 1], [0, 0, 0], room) == [*expected, 0]
    # 25 for 10 bytes is less than 16 for 2 and 9 for 2
    assert choose_ranks(three, [10, 2, 1], [0, 0, 0], 11) == [0, 2, 0]
    # opening the second layer costs 5: the 25 for 1 byte, then 16 and 9 for 5 + 2, if they fit
    assert choose_ranks(three, [1, 1, 1], [0, 5, 0], 6) == [2, 0, 0]
    assert choose_ranks(three, [1, 1, 1], [0, 5, 0], 7) == [1, 1, 0]
    assert choose_ranks(three, [1, 1, 1], [0, 5, 0], 8) == [1, 2, 0]


@pytest.mark.parametrize("family", [DEMO, SD1])
def test_a_file_has_no_more_bytes_than_its_budget(family, tmp_path):
    patches = [
        (make_patch(family, rank=2, seed=seed, concepts=[Concept(f"dog {seed}")]), 1 - seed / 10)
        for seed in range(3)
    ]
    whole = file_size(merge_patches(patches).patch)
    errors = []
    for share in (0.2, 0.5, 0.9) if family is SD1 else torch.linspace(0.1, 0.97, 30).tolist():
        budget = int(share * whole)
        merged = merge_patches(patches, budget)
        path = save_patch(merged.patch, tmp_path / "merged.safetensors")
        size = path.stat().st_size
        assert max(0.9 * budget, budget - 4200) < size <= budget
        exact = merge_patches(patches).patch
        lost = total = 0.0
        for name in exact.changes:
            expected = exact.change_of(name)
            found = load_patch(path).change_of(name) if name in merged.patch.changes else 0
            lost += float((expected - found).square().sum())
            total += float(expected.square().sum())
        assert merged.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
        errors.append(merged.error)
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_too_small_a_budget_says_what_it_takes():
    patches = [(make_patch(), 1.0), (make_patch(seed=1, concepts=CAT), 1.0)]
    with pytest.raises(ForgetError, match=r"1 kB are too few: .* take [\d.]+ kB") as caught:
        merge_patches(patches, 1000)
    least = float(str(caught.value).split()[-2])
    assert merge_patches(patches, int(least * 1000 + 100)).patch.ranks == [1]


def test_the_record(tmp_path):
    first = make_patch()
    second = make_patch(seed=1, concepts=CAT)
    second.info["base.fingerprint"] = "0" * 32
    merged = merge_patches([(first, 0.5), (second, 1.0), (second, 0.25)])
    path = save_patch(merged.patch, tmp_path / "merged.safetensors")
    metadata = metadata_of(path)
    assert json.loads(metadata["fmn.method"]) == "merge"
    assert json.loads(metadata["fmn.settings"]) == {"how": "concatenate", "budget": 0}
    assert "fmn.base.fingerprint" not in metadata and json.loads(metadata["fmn.loss"]) == {}
    loaded = load_patch(path)
    assert loaded.concepts == ["dog", "van gogh", "cat"]
    assert loaded.info["concepts"][0]["aliases"] == ["puppy"]
    text = describe(loaded)
    assert "method: merge" in text and "loss" not in text.replace("lost", "")
    assert (
        "merged: dog, van gogh (resteer) at 0.5; cat (resteer) at 1; cat (resteer) at 0.25" in text
    )
    assert len(merged.notes) == 2
    assert "different bases" in merged.notes[0] and "forget cat" in merged.notes[1]
    assert "3 patches merged (concatenate): 14 layers, rank 6" in merged.report()
    same = merge_patches([(first, 1.0)])
    assert same.notes == [] and same.patch.info["base.fingerprint"] == "f" * 32


def test_many_parts_are_told_in_short():
    many = [(make_patch(concepts=[Concept(f"dog {i}")]), 1 + i / 10) for i in range(20)]
    assert "merged: 20 patches by resteer, at 1 to 2.9" in describe(merge_patches(many).patch)


def test_a_merged_patch_can_be_merged(tmp_path):
    first, second = make_patch(), make_patch(seed=1, concepts=CAT)
    once = save_patch(
        merge_patches([(first, 1.0), (second, 0.5)]).patch, tmp_path / "once.safetensors"
    )
    twice = merge_patches([(once, 2.0), (first, -1.0)]).patch
    expected = first.change_of(NAME) + second.change_of(NAME)
    assert torch.allclose(twice.change_of(NAME), expected, atol=2e-3)
    assert [part["method"] for part in twice.info["merged"]] == ["merge", "resteer"]


def test_what_cannot_be_merged():
    demo, other = make_patch(), make_patch(SD1, concepts=CAT)
    with pytest.raises(ForgetError, match="dog.* is for Forget-Me-Not demo model, the one for cat "
                       "for Stable Diffusion 1.x"):  # fmt: skip
        merge_patches([(demo, 1.0), (other, 1.0)])
    for nothing in ([], [(demo, 0.0)]):
        with pytest.raises(ForgetError, match="nothing to merge"):
            merge_patches(nothing)
    for budget in (0, 10**6):
        with pytest.raises(ForgetError, match="cancel each other out"):
            merge_patches([(demo, 1.0), (demo, -1.0)], budget)


@pytest.mark.parametrize(
    "value",
    [
        3, ["x"], [{"method": "uce", "concepts": ["dog"]}],
        [{"method": 3, "concepts": ["dog"], "strength": 1}],
        [{"method": "uce", "concepts": [3], "strength": 1}],
        [{"method": "uce", "concepts": 3, "strength": 1}],
        [{"method": "uce", "concepts": ["dog"], "strength": "1"}],
        [{"method": "uce", "concepts": ["dog"], "strength": 10**400}],
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, value):
    path = save_patch(merge_patches([(make_patch(), 1.0)]).patch, tmp_path / "merged.safetensors")
    rewrite(path, lambda tensors, metadata: metadata.update({"fmn.merged": json.dumps(value)}))
    with pytest.raises(ForgetError, match="metadata of 'merged.safetensors'"):
        load_patch(path)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_joint_is_the_minimum_of_what_it_says():
    """Against the normal equations written out, and against its neighbours."""
    changes = [rows(4, 6, seed=seed) for seed in (1, 2)]
    parts = [tuple(factor for factor in (full, torch.eye(6).double())) for full in changes]
    read, kept = [rows(5, 6, seed=3), rows(9, 6, seed=4)], rows(7, 6, seed=5)
    preserve, damping = 0.3, 0.01
    system = layer_inputs(read, kept, preserve, damping)
    (up, down), (before, after, whole) = joint_change(parts, system)
    grams = [each.mT @ each / len(each) for each in read]
    wanted = sum(grams) + preserve * kept.mT @ kept / 7
    level = damping * wanted.trace() / 6
    pull = level * torch.eye(6).double()  # to the sum of the patches
    expected = sum(d @ (g + pull) for d, g in zip(changes, grams)) @ torch.linalg.inv(wanted + pull)
    assert torch.allclose(up @ down, expected)

    def loss(change):
        off = sum(
            ((change - d) @ x.mT).square().sum() / len(x) for d, x in zip(changes, read)
        )  # fmt: skip
        return float(off + preserve * (change @ kept.mT).square().sum() / 7)

    assert after == pytest.approx(loss(expected)) and before == pytest.approx(loss(sum(changes)))
    assert whole == pytest.approx(loss(torch.zeros(4, 6).double()))
    assert after < before and after < whole
    summed = sum(changes)
    damped = loss(expected) + level * (expected - summed).square().sum()
    for seed in range(20):
        near = expected + 1e-3 * rows(4, 6, seed=100 + seed)
        assert loss(near) + level * (near - summed).square().sum() > damped


def test_joint_leaves_a_patch_whose_other_directions_nothing_reads():
    """What no row tells about stays as in the sum; a pull to 0 would undo it."""
    change = torch.ones(1, 1).double(), torch.ones(1, 2).double()
    inputs = layer_inputs([unit(2, 0)], torch.zeros(0, 2), 1.0, 0.5)
    (up, down), _ = joint_change([change], inputs)
    assert torch.allclose(up @ down, torch.ones(1, 2).double())


def test_joint_of_patches_that_do_not_meet_is_their_sum():
    """Each acts on its own direction, and nothing is kept: sum and solution are the same."""
    first = unit(4, 0).mT.double(), unit(6, 0).double()
    second = unit(4, 1).mT.double(), unit(6, 1).double()
    system = layer_inputs([unit(6, 0), unit(6, 1)], torch.zeros(0, 6), 1.0, 1e-12)
    (up, down), (before, after, _) = joint_change([first, second], system)
    expected = torch.zeros(4, 6).double()
    expected[0, 0] = expected[1, 1] = 1
    assert torch.allclose(up @ down, expected) and abs(before) < 1e-9 and abs(after) < 1e-9


def test_joint_takes_back_what_one_patch_does_on_anothers_prompts():
    """The second patch does nothing on the first's row; the first's change bleeds into the second's
    unless it is solved for."""
    first = torch.ones(1, 1).double(), torch.ones(1, 2).double()  # acts on both directions
    system = layer_inputs([unit(2, 0), unit(2, 1)], torch.zeros(0, 2), 1.0, 1e-12)
    (up, down), _ = joint_change([first, None], system)
    assert torch.allclose(up @ down, torch.tensor([[1.0, 0.0]]).double())


def test_kept_rows_are_left_alone():
    change = torch.ones(1, 1).double(), torch.ones(1, 2).double()
    system = layer_inputs([unit(2, 0)], unit(2, 1), 1e6, 1e-15)
    (up, down), _ = joint_change([change], system)
    assert torch.allclose(up @ down, torch.tensor([[1.0, 0.0]]).double(), atol=1e-5)


def test_a_patch_without_a_record_of_its_base():
    patch = make_patch()
    patch.info = {"concepts": []}
    merged = merge_patches([(patch, 1.0)])
    assert merged.patch.info["merged"] == [{"concepts": [], "method": "unknown", "strength": 1.0}]
    assert "base.fingerprint" not in merged.patch.info and merged.notes == []
