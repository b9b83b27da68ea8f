"""One patch a concept: each as if made alone, none made twice, and failures by themselves."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs import recipe as recipes
from fmn.jobs.batch import CachingModel, forget_each
from fmn.jobs.recipe import hash_model, hash_model_0_1, recipe, recipe_0_1
from fmn.methods import METHODS, forget, settings_of, uce
from fmn.models.families import FAMILIES
from fmn.models.sampling import DDPMSchedule
from fmn.models.token_positions import CHUNK
from fmn.patches.patch import load_patch, save_patch
from tests.unit.tiny import (
    TINY,
    Cancelled,
    TinyModel,
    metadata_of,
    rewrite,
    same_tensors,
    weights_of,
)

CONCEPTS = [
    Concept("dog", aliases=("hound",), anchor="cat"),
    Concept("van gogh", "style", anchor="a painter"),
    Concept("red car"),
]
BAD = Concept("tree", prompts=("a bush",))
UCE = settings_of("uce", {"keep_list": "none"})
KEEP = ("blue house", "a man on a horse")
# What makes each method short; the four that only watch the U-Net read no texts through the cache.
SHORT = {
    "keep_list": "none", "prompts": 3, "keep_prompts": 4, "steps": 2, "batch": 2, "size": 64,
    "sampling_steps": 1,
}  # fmt: skip
WATCHING = "resteer", "esd", "ablation", "casteer"
READING = [first for first, *_ in METHODS.values() if first not in WATCHING]


@pytest.fixture(autouse=True)
def tiny_files(monkeypatch):
    """Files of the tiny family can be read."""
    monkeypatch.setitem(FAMILIES, "tiny", TINY)


class Counting(TinyModel):
    """Counts the texts it was asked to encode in batches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.encoded = []

    def encode_all(self, texts, length=CHUNK):
        self.encoded += texts
        return super().encode_all(texts, length)


class Timed(TinyModel):
    """With a noise schedule that ends in less of the picture, as for zero terminal SNR."""

    @contextmanager
    def borrow_denoiser(self):
        with super().borrow_denoiser() as denoiser:
            denoiser.alphas_cumprod = denoiser.alphas_cumprod.clone()
            denoiser.alphas_cumprod[-1] = 2**-24
            denoiser.schedule = DDPMSchedule(denoiser.alphas_cumprod)
            yield denoiser


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_is_what_it_is_alone_and_none_is_made_twice(tmp_path):
    model, events = Counting(), []
    before = weights_of(model.unet)
    batch = forget_each(model, CONCEPTS, UCE, tmp_path / "a", events.append, KEEP)
    assert same_tensors(weights_of(model.unet), before)
    assert [path.name.rpartition("_")[0] for path in batch.files] == ["dog", "van_gogh", "red_car"]
    assert sorted(path.name for path in batch.files) == names(tmp_path / "a")
    assert batch.failed == batch.existing == batch.remade == []
    assert [model.encoded.count(text) for text in KEEP] == [1, 1]
    for concept, path in zip(CONCEPTS, batch.files):
        alone = forget(model, [concept], UCE, keep=KEEP)
        found = load_patch(path)
        assert found.info["concepts"] == [concept.describe()]
        for name in alone.changes:
            assert torch.allclose(found.change_of(name), alone.change_of(name), atol=2e-3)
        assert path.stem.endswith(found.info["recipe"][:12])
    stamps = [path.stat().st_mtime_ns for path in batch.files]
    events.clear()
    again = forget_each(model, CONCEPTS, UCE, tmp_path / "a", events.append, KEEP)
    assert again.files == again.existing == batch.files
    assert [path.stat().st_mtime_ns for path in again.files] == stamps
    assert [(event.name, event.index, event.step) for event in events] == [
        ("dog", 1, None), ("van gogh", 2, None), ("red car", 3, None)
    ]  # fmt: skip


def test_events_tell_of_the_whole_batch(tmp_path):
    events = []
    forget_each(TinyModel(), CONCEPTS, UCE, tmp_path, events.append)
    done = [event.done for event in events]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 3
    assert {event.count for event in events} == {3}
    lefts = [event.seconds_left for event in events if event.step]
    assert lefts[-1] == 0 and all(left > 0 for left in lefts[:-1])


def test_everything_that_decides_a_patch_is_in_its_recipe(monkeypatch):
    model, concept = TinyModel(), CONCEPTS[0]
    state = hash_model(model)
    assert state == hash_model(TinyModel())
    worn, spoken, timed = TinyModel(), TinyModel(), Timed()
    with torch.no_grad():
        worn.unet.conv_in.weight[0, 0, 0, 0] += 1  # what a LoRA on any layer does
    spoken.position[3] += 1  # another text encoder
    keys = [
        recipe(state, concept, UCE),
        recipe(hash_model(TinyModel(seed=1)), concept, UCE),
        recipe(hash_model(worn), concept, UCE),
        recipe(hash_model(spoken), concept, UCE),
        recipe(hash_model(timed), concept, UCE),
        recipe(state, concept, settings_of("uce", {"keep_list": "none", "erase": 2})),
        recipe(state, concept, settings_of("rece", {})),
        recipe(state, concept, UCE, KEEP),
        *(
            recipe(state, Concept("dog", **changes), UCE)
            for changes in (
                {}, {"kind": "style"}, {"anchor": "fox"}, {"aliases": ("hound",)},
                {"prompts": ("a dog",)}, {"images": torch.zeros(1, 8, 8, 3)},
                {"images": torch.ones(1, 8, 8, 3)}, {"learned": (torch.ones(1, 12),)},
            )
        ),
    ]  # fmt: skip
    assert recipe(state, concept, UCE) == keys[0]
    monkeypatch.setattr(uce, "REVISION", 2)
    keys.append(recipe(state, concept, UCE))
    monkeypatch.setattr(recipes, "_hash_lists", lambda: "others")
    keys.append(recipe(state, concept, UCE))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_file_that_is_not_the_patch_is_made_again(tmp_path, damage):
    model = TinyModel()
    (path,) = forget_each(model, CONCEPTS[:1], UCE, tmp_path).files
    whole = load_patch(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        rewrite(path, lambda tensors, told: told.update({"fmn.recipe": '"x"'}))
    batch = forget_each(model, CONCEPTS[:1], UCE, tmp_path)
    assert batch.files == [path] and batch.existing == []
    ((again, reason),) = batch.remade
    assert again == path and reason in batch.report()
    assert {"cut": "is damaged", "other": "another patch was there"}[damage] in reason
    assert same_tensors(dict(load_patch(path).lora()), dict(whole.lora()))


def test_a_concept_that_fails_is_told_and_the_others_are_made(tmp_path):
    concepts = [CONCEPTS[0], BAD, CONCEPTS[2]]
    batch = forget_each(TinyModel(), concepts, UCE, tmp_path)
    assert [load_patch(path).concepts for path in batch.files] == [["dog"], ["red car"]]
    assert len(names(tmp_path)) == 2
    ((concept, reason),) = batch.failed
    assert concept == BAD and "does not contain the concept 'tree'" in reason
    report = batch.report()
    assert report.startswith("2 of 3 concepts have a patch, 0 of them from before; 1 failed")
    assert "failed: tree: The prompt 'a bush' does not contain" in report


def test_training_that_blows_up_is_a_failure_too(tmp_path):
    model = TinyModel()

    def on_progress(event):
        model.poisoned = event.index == 2

    settings = settings_of("resteer", {"steps": 2})
    batch = forget_each(model, CONCEPTS, settings, tmp_path, on_progress)
    assert [load_patch(path).concepts for path in batch.files] == [["dog"], ["red car"]]
    ((concept, reason),) = batch.failed
    assert concept.name == "van gogh" and "not finite at step 1" in reason


def test_cancel_passes_and_finished_files_stay(tmp_path):
    def on_progress(event):
        if event.index == 2 and event.step:
            raise Cancelled

    with pytest.raises(Cancelled):
        forget_each(TinyModel(), CONCEPTS, UCE, tmp_path, on_progress)
    assert [load_patch(path).concepts for path in tmp_path.iterdir()] == [["dog"]]
    batch = forget_each(TinyModel(), CONCEPTS, UCE, tmp_path)
    assert [path.name.partition("_")[0] for path in batch.existing] == ["dog"]
    assert len(batch.files) == 3


def test_a_concept_named_twice_is_made_once(tmp_path):
    batch = forget_each(TinyModel(), [CONCEPTS[0]] * 2, UCE, tmp_path)
    assert len(batch.files) == 1 == len(names(tmp_path))


def test_a_folder_that_cannot_be_written_ends_it_at_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    seen = []
    with pytest.raises(ForgetError, match="could not be saved"):
        forget_each(TinyModel(), CONCEPTS, UCE, tmp_path / "file", seen.append)
    assert {event.index for event in seen} == {1}


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(ForgetError, match="no concept to forget"):
        forget_each(TinyModel(), [], UCE, tmp_path)


def test_a_name_makes_no_path(tmp_path):
    concept = Concept("../../a b/" + "x" * 300)
    (path,) = forget_each(TinyModel(), [concept], UCE, tmp_path / "in").files
    assert path.parent == tmp_path / "in" and len(path.name) < 70


def test_the_cache_remembers_and_is_bounded():
    model = Counting()
    size = model.encode_all(["a"]).nbytes
    cache = CachingModel(model, limit=2 * size)
    expected = TinyModel().encode_all(["a", "b", "a", "c"])
    model.encoded.clear()
    assert cache.encode_all(["a", "b", "a", "c"]).equal(expected)
    assert model.encoded == ["a", "b", "c"]
    assert cache.encode_all(["c", "a"]).equal(expected[[3, 0]])  # b was asked for longest ago
    assert model.encoded == ["a", "b", "c"]
    cache.encode_all(["b"])
    assert model.encoded == ["a", "b", "c", "b"]
    assert cache.family is model.family
    assert cache.encode_all(["b"], 9).equal(expected[[1], :9])  # a part of what is known
    assert model.encoded == ["a", "b", "c", "b"]
    assert CachingModel(model).encode_all(["b"], 9).equal(expected[[1], :9])
    longer = CachingModel(model)
    assert longer.encode_all(["a"], 5).equal(expected[[0], :5])
    assert longer.encode_all(["a"]).equal(expected[[0]]) and longer._bytes == size


def test_the_recipe_is_in_the_file(tmp_path):
    (path,) = forget_each(TinyModel(), CONCEPTS[:1], UCE, tmp_path).files
    key = recipe(hash_model(TinyModel()), CONCEPTS[0], UCE)
    assert metadata_of(path)["fmn.recipe"] == f'"{key}"'
    patch = load_patch(path)
    save_patch(patch, tmp_path / "copy.safetensors")
    assert load_patch(tmp_path / "copy.safetensors").info["recipe"] == key


@pytest.fixture(scope="module")
def demo():
    return DiffusersModel.load("demo")


def test_recipes_of_version_0_1():
    """As its code wrote them; none of methods that have changed since."""
    concept = Concept("van gogh", "style", aliases=("vincent",), anchor="a painter")
    recorded = {
        "uce": "93deff0fe2b82ea0c9869c709d566e46ac0ec30cc5f3231aab12974b55b59794",
        "esd": "e6686dab11d2efe2488173246fb36d26b24a83f07a8cd72ceb67cc7cffe837cf",
    }
    assert recipe_0_1("state", concept, settings_of("reread", {})) is None
    for preset, settings in (("uce", {"keep_list": "none"}), ("esd", {})):
        key = recipe_0_1("state", concept, settings_of(preset, settings), ("blue house",))
        assert key == recorded[preset]
    assert hash_model_0_1(TinyModel()) is None  # no host of version 0.1
    package = Path(recipes.__file__).parents[1]
    for host in recipes._code_0_1()["hosts"]:  # a host that moves takes its entry along
        assert package.joinpath(*host.split(".")).with_suffix(".py").is_file()


@pytest.mark.parametrize("changed", ["nothing", "the method", "the lists"])
def test_a_patch_of_version_0_1_is_kept_if_its_method_is_unchanged(
    demo, tmp_path, monkeypatch, changed
):
    concept = Concept("dog")
    key = recipe_0_1(hash_model_0_1(demo), concept, UCE)
    patch = forget(demo, [concept], UCE)
    patch.info["recipe"] = key
    old = save_patch(patch, tmp_path / f"dog_{key[:12]}.safetensors")
    stamp = old.stat().st_mtime_ns
    if changed == "the method":
        monkeypatch.setattr(uce, "REVISION", 2)
    elif changed == "the lists":
        monkeypatch.setattr(recipes, "_hash_lists", lambda: "others")
    batch = forget_each(demo, [concept], UCE, tmp_path)
    assert (batch.files == batch.existing == [old]) == (changed == "nothing")
    assert len(names(tmp_path)) == (1 if changed == "nothing" else 2)
    assert old.stat().st_mtime_ns == stamp
    again = forget_each(demo, [concept], UCE, tmp_path)
    assert again.existing == again.files == batch.files


@pytest.mark.parametrize("preset", READING)
def test_a_second_concept_is_what_it_is_alone(demo, preset):
    """Also of methods that watch the text encoder, which sees no text that the cache knows."""
    has = vars(settings_of(preset, {}))
    settings = settings_of(preset, {name: SHORT[name] for name in SHORT.keys() & has.keys()})
    keep, cache = () if settings.keep_needs else KEEP, CachingModel(demo)
    first, second = (forget(cache, [Concept(name)], settings, keep=keep) for name in ("dog", "cat"))
    alone = forget(demo, [Concept("cat")], settings, keep=keep)
    assert first.changes.keys() == second.changes.keys() == alone.changes.keys()
    for name in alone.changes:
        wanted = alone.change_of(name)
        assert (second.change_of(name) - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_what_is_read_while_the_text_is_borrowed_is_not_remembered():
    model = Counting()
    cache, position = CachingModel(model), model.position
    known = cache.encode_all(["a"])
    with cache.borrow_text_encoder():
        model.position = position + 1
        assert not cache.encode_all(["a"]).equal(known)
        cache.encode_all(["b"])
    model.position = position
    assert cache.encode_all(["a"]).equal(known)
    assert cache.encode_all(["b"]).equal(TinyModel().encode_all(["b"]))
