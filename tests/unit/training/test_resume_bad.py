"""Untrusted training states: a bad one is refused in one sentence that names the file."""

import json

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import forget, settings_of
from fmn.training.resume import TrainingState, load_state, save_state
from fmn.training.run import TrainingOptions

from ..tiny import TinyModel, rewrite

CONCEPTS = [Concept("dog")]
SETTINGS = {"steps": 12, "rank": 2}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "good.fmn-train"

    def save(progress, run):
        if progress.index == 11:
            save_state(run.state(), path)

    options = TrainingOptions(keep_best=True, after_step=save)
    forget(TinyModel(), CONCEPTS, settings_of("resteer", SETTINGS), options=options)
    return path


@pytest.fixture
def copy(good, tmp_path):
    path = tmp_path / "bad.fmn-train"
    path.write_bytes(good.read_bytes())
    return path


def load(path):
    options = TrainingOptions(resume=load_state(path))
    return forget(TinyModel(), CONCEPTS, settings_of("resteer", SETTINGS), options=options)


def test_the_good_one_is_read(copy):
    assert load(copy).info["loss"]["steps"] == 12


def up_of(tensors):
    return next(key for key in sorted(tensors) if key.endswith(".up") and key[:5] != "best.")


def record(**changes):
    def change(tensors, metadata):
        metadata["fmn.train"] = json.dumps(json.loads(metadata["fmn.train"]) | changes)

    return change


def raw(text):
    return lambda tensors, metadata: metadata.update({"fmn.train": text})


def without(part):
    def change(tensors, metadata):
        del tensors[next(key for key in tensors if key.endswith(part) and key[:5] != "best.")]

    return change


def with_tensor(make, ending=""):
    """Put another tensor in place of the first trained one, or of its moment."""

    def change(tensors, metadata):
        key = up_of(tensors) + ending
        tensors[key] = make(tensors[key])

    return change


def losses(values):
    return lambda tensors, metadata: tensors.update(losses=values)


def best_only(tensors, metadata):
    record(best=None)(tensors, metadata)


def no_best(tensors, metadata):
    for key in [key for key in tensors if key.startswith("best.")]:
        del tensors[key]


def other_best_shape(tensors, metadata):
    tensors["best." + up_of(tensors)] = torch.zeros(1)


def all_layers_gone(tensors, metadata):
    for key in [key for key in tensors if key != "losses"]:
        del tensors[key]
    record(best=None)(tensors, metadata)


def a_layer_gone(tensors, metadata):
    layer = up_of(tensors).removesuffix(".up")
    for key in [key for key in tensors if layer in key]:
        del tensors[key]


def a_layer_more(tensors, metadata):
    for start in ("", "best."):
        tensors[start + "down_blocks.9.attn2.to_k.up"] = torch.zeros(3, 2)


def another_shape(tensors, metadata):
    up = up_of(tensors)
    for key in (up, f"{up}.exp_avg", f"{up}.exp_avg_sq", f"best.{up}"):
        tensors[key] = torch.zeros(3, 2)


def nan(tensor):
    return torch.full_like(tensor, float("nan"))


def beside_scale(value):
    return {"beside.scale": torch.tensor(value)}


BAD = {
    "no format": (lambda t, m: m.pop("fmn.train.format"), "is no training state"),
    "another format": (lambda t, m: m.update({"fmn.train.format": "2"}), "format 2, this version"),
    "no record": (lambda t, m: m.pop("fmn.train"), "record .* damaged .KeyError"),
    "no json": (raw("{"), "record .* damaged .JSONDecodeError"),
    "a list": (raw("[]"), "record .* damaged .TypeError"),
    "deep json": (raw("[" * 100_000), "record .* damaged .RecursionError"),
    "tries as text": (record(tries="11"), "record .* damaged .TypeError"),
    "tries as a bool": (record(tries=True), "record .* damaged .TypeError"),
    "fewer tries than steps": (record(tries=3), "3 for 11 steps"),
    "endless tries": (record(tries=10**12), "attempts.*for 11 steps"),
    "more tries than halvings": (record(tries=22), "22 for 11 steps"),
    "scale zero": (record(scale=0.0), "loss scale"),
    "scale nan": (raw('{"scale": NaN}'), "record .* damaged .KeyError"),
    "scale not a power": (record(scale=3.0), "loss scale"),
    "scale huge": (record(scale=2.0**40), "loss scale"),
    "scale beside zero": (lambda t, m: t.update(beside_scale(0.0)), "loss scale"),
    "scale beside negative": (lambda t, m: t.update(beside_scale(-2.0)), "loss scale"),
    "scale beside nan": (lambda t, m: t.update(beside_scale(torch.nan)), "loss scale"),
    "settings as a list": (record(settings=[]), "record .* damaged .TypeError"),
    "best as text": (record(best=["a", 1]), "record .* damaged .TypeError"),
    "best in the future": (record(best=[0.1, 12]), "list of best parameters"),
    "best at no step": (record(best=[0.1, 0]), "record .* damaged .ValueError"),
    "best infinite": (record(best=[float("inf"), 3]), "record .* damaged .ValueError"),
    "best unannounced": (best_only, "list of best parameters"),
    "best missing": (no_best, "list of best parameters"),
    "best of another shape": (other_best_shape, "shapes of the best parameters"),
    "no losses": (lambda t, m: t.pop("losses"), "list of tensors"),
    "empty losses": (losses(torch.zeros(0, dtype=torch.float64)), "list of losses"),
    "losses in a square": (losses(torch.ones(2, 2, dtype=torch.float64)), "list of losses"),
    "losses nan": (losses(torch.full((11,), torch.nan, dtype=torch.float64)), "list of losses"),
    "losses in 32 bits": (losses(torch.ones(11)), "tensor .losses."),
    "nothing but losses": (all_layers_gone, "list of tensors"),
    "half a tensor's bits": (with_tensor(lambda t: t.half()), "tensor .*attn2"),
    "integers": (with_tensor(lambda t: t.int()), "tensor .*attn2"),
    "nan": (with_tensor(nan), "not finite"),
    "infinite moments": (with_tensor(lambda t: t + torch.inf, ".exp_avg"), "not finite"),
    "negative squares": (with_tensor(lambda t: t - 1, ".exp_avg_sq"), "exp_avg_sq of"),
    "a moment missing": (without(".exp_avg"), "not complete"),
    "steps missing": (without(".step"), "not complete"),
    "parameter missing": (without(".up"), "not complete"),
    "moment of another shape": (with_tensor(lambda t: t[:1], ".exp_avg"), "exp_avg of"),
    "half a step": (with_tensor(lambda t: t * 0 + 0.5, ".step"), "step of"),
    "no step": (with_tensor(lambda t: t * 0, ".step"), "step of"),
    "too many steps": (with_tensor(lambda t: t * 0 + 99, ".step"), "step of"),
    "steps in a list": (with_tensor(lambda t: t.repeat(2), ".step"), "step of"),
    "a layer missing": (a_layer_gone, "is in one of them only"),
    "a layer too many": (a_layer_more, "'down_blocks.9.* is in one of them only"),
    "another rank": (another_shape, r"of shape \[3, 2\], and"),
    "another family": (record(family="sdxl"), "made with a model of family 'sdxl'"),
    "another base": (record(fingerprint="0" * 32), "a base model of fingerprint"),
    "another prediction": (record(prediction="v"), "a model of prediction 'v'"),
    "another method": (record(method="esd"), "the method 'esd'"),
    "concepts that are none": (record(concepts=[1, {"name": "owl"}]), "concepts '[?], owl'"),
    "another setting": (record(settings={"lr": 1}), "only steps may differ"),
}


def test_as_many_tries_as_a_scale_can_be_halved(copy):
    """From 1024 to 1; each of them is a draw that no step came of."""
    assert load_state(rewrite(copy, record(tries=21))).record["tries"] == 21


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_is_refused(case, copy):
    change, message = BAD[case]
    with pytest.raises(ForgetError, match=message) as caught:
        load(rewrite(copy, change))
    assert "bad.fmn-train" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: b"", "damaged or not a safetensors file"),
        (lambda data: b"\xff" * 40, "damaged or not a safetensors file"),
        (lambda data: data[:-10], "damaged or not a safetensors file"),
        (lambda data: b"\x80\x04" + data[2:], "damaged or not a safetensors file"),
    ],
)
def test_a_damaged_file_is_refused(spoil, message, copy):
    copy.write_bytes(spoil(copy.read_bytes()))
    with pytest.raises(ForgetError, match=message):
        load(copy)


def test_a_missing_file(tmp_path):
    with pytest.raises(ForgetError, match="cannot be read .No such file"):
        load_state(tmp_path / "no.fmn-train")


def test_a_concept_that_an_older_version_saved_as_it_was_pasted():
    old = {"name": "miku\u200b  \\(v\\)", "kind": "object", "aliases": [], "prompts": []}
    keys = "method", "family", "prediction", "fingerprint"
    record = dict.fromkeys(keys, "x") | {"settings": {}}
    now = record | {"concepts": [Concept("miku (v)").describe()]}
    TrainingState(record | {"concepts": [old]}, [], {}, "old").check(now)
    for other in ([old, old], [{"name": 5}], ["miku"], [old | {"name": "miku"}]):
        with pytest.raises(ForgetError, match="was made with concepts"):
            TrainingState(record | {"concepts": other}, [], {}, "old").check(now)
