import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fmn.errors import ForgetError
from fmn.metrics.demo_judge import (
    ARCHITECTURES,
    FILE,
    NOTHING,
    SIDE,
    Attentive,
    Bottleneck,
    Convolution,
    DemoJudge,
    Network,
)
from fmn.metrics.judge import check_images, labels_of
from fmn.metrics.load import load_judge

LABELS = {"concept": ("cat", "dog", NOTHING), "style": ("flat", "drawn")}
DEMO = FILE.parent


def names(file):
    with open(DEMO / file, newline="") as rows:
        return [row["concept"] for row in csv.DictReader(rows)]


def networks(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: Network(name, LABELS).eval() for name in ARCHITECTURES}


def write_file(path, made, record=None):
    state = {
        f"{name}/{key}": value.half() if value.is_floating_point() else value
        for name, network in made.items()
        for key, value in network.state_dict().items()
    }
    facts = {name: {"held concept": 0.5} for name in made}
    record = record or {"labels": LABELS, "facts": facts}
    save_file(state, path, {"judges": json.dumps(record)})
    return path


@pytest.fixture
def file(tmp_path):
    return write_file(tmp_path / "judges.safetensors", networks())


def pictures(count=3, height=SIDE, width=SIDE, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_says_what_its_network_says(file, name):
    judge, images = DemoJudge(name, file), pictures(70)
    network = networks()[name]
    network.load_state_dict({k: v.half().float() for k, v in network.state_dict().items()})
    with torch.no_grad():
        logits = network(images.movedim(-1, 1))
    for domain, labels in LABELS.items():
        found = judge.probabilities(images, domain)
        assert found.shape == (70, len(labels)) and found.dtype == torch.float32
        torch.testing.assert_close(found, logits[domain].softmax(-1), rtol=1e-4, atol=1e-6)
        assert not found.requires_grad
    assert judge.labels == LABELS and judge.facts == {"held concept": 0.5}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_picture_is_judged_alone(file, name):
    """Neither other pictures nor the mode of the caller change the answer."""
    judge, images = DemoJudge(name, file), pictures(3)
    together = judge.features(images)
    with torch.inference_mode():
        alone = torch.cat([judge.features(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_heads_are_linear_in_features(file):
    judge, images = DemoJudge("demo:2", file), pictures()
    head = judge._network.heads["style"]
    expected = (judge.features(images) @ head.weight.T + head.bias).softmax(-1)
    torch.testing.assert_close(judge.probabilities(images, "style"), expected)


def test_any_size_is_shrunk_to_one(file):
    judge, images = DemoJudge("demo", file), pictures(2)
    doubled = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    smaller = judge.features(torch.full((1, 40, 56, 3), 0.25))
    torch.testing.assert_close(smaller, judge.features(torch.full((1, 128, 128, 3), 0.25)))
    assert judge.features(doubled).shape == judge.features(images).shape


def test_judges_are_of_different_kinds():
    first, second = (network.trunk for network in networks().values())
    assert not any(isinstance(part, Attentive) for part in first.modules())
    assert any(isinstance(part, Attentive) for part in second.modules())
    # Convolutions embed the patches; what follows has none.
    assert not any(isinstance(part, Convolution) for part in second.layers.modules())


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_convolution_is_torch_s(size, stride):
    ours, x = Convolution(3, 4, size, stride), torch.randn(2, 3, 12, 12)
    theirs = torch.nn.Conv2d(3, 4, size, stride, size // 2, bias=False)
    theirs.weight.data = ours.weight.data.view(4, 3, size, size)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_block_whose_last_weight_is_zero_does_nothing():
    block = Bottleneck(8, 4).eval()
    torch.nn.init.zeros_(block.layers[-1][-1].weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_attention_ignores_the_order_of_patches():
    layer, x = Attentive(8, 2).eval(), torch.randn(1, 6, 8)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_real_judges_know_the_demo_and_the_controls(name):
    judge = load_judge(name)
    concepts = judge.labels["concept"]
    assert concepts[-1] == NOTHING and len(set(concepts)) == len(concepts)
    assert set(concepts) == {*names("concepts.csv"), *names("controls.csv"), NOTHING}
    assert len(judge.labels["style"]) == 9
    assert FILE.stat().st_size < 8e6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_real_judges_call_noise_and_blank_paper_nothing(name):
    noise = pictures(8, 128, 128)
    blank = torch.ones(2, 128, 128, 3) * torch.tensor([1.0, 0.4])[:, None, None, None]
    judge = load_judge(name)
    found = judge.probabilities(torch.cat([noise, blank]), "concept").argmax(-1)
    assert found.tolist() == [judge.labels["concept"].index(NOTHING)] * 10


def test_controls_are_not_taught():
    assert 4 <= len(names("controls.csv")) <= 8
    assert not set(names("controls.csv")) & set(names("concepts.csv"))


def test_labels_asked_for_are_compared():
    judge = load_judge("demo", {"concept": {"dog": "a dog"}, "style": {"twemoji": "{}, twemoji"}})
    assert labels_of(judge, "style") == judge.labels["style"]


@pytest.mark.parametrize(
    "spec, labels, templates, says",
    [
        ("demo:3", None, None, "There is no judge 'demo:3': use 'demo', 'demo:2', 'clip:'"),
        ("", None, None, "There is no judge ''"),
        ("Demo", None, None, "There is no judge 'Demo'"),
        ("nudenet:640m", None, None, "There is no judge 'nudenet:640m'"),
        (None, None, None, "not by None"),
        (Path("demo"), None, None, "not by PosixPath"),
        ("demo", {"concept": {"dgo": "a dog"}}, None, r"concept 'dgo' \(1 of 1 are unknown\)"),
        ("demo", {"concept": {"dog": "", "x": "", "y": ""}}, None, r"'x' \(2 of 3 are unknown\)"),
        ("demo", {"unsafe": {"safe": ""}}, None, "cannot tell the domain 'unsafe': it knows"),
        ("demo", None, {"style": "{}"}, "takes no templates"),
        ("clip:", {"a": {"b": "c"}}, None, "There is no CLIP model in ''"),
        ("clip:/nowhere", {"a": {"b": "c"}}, None, "There is no CLIP model in '/nowhere'"),
        ("clip:/nowhere", None, None, "CLIP is asked about words, and there are none"),
    ],
)
def test_bad_judges(spec, labels, templates, says):
    with pytest.raises(ForgetError, match=says) as caught:
        load_judge(spec, labels, templates)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "images, says",
    [
        (None, "are NoneType: give a tensor of floats"),
        ([[0.5]], "are list"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "are torch.uint8"),
        (torch.zeros(8, 8, 3), r"shape \[8, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8), r"shape \[1, 3, 8, 8\]: give \[N, height, width, 3\]"),
        (torch.zeros(0, 8, 8, 3), r"shape \[0, 8, 8, 3\]"),
        (torch.zeros(1, 8, 0, 3), r"shape \[1, 8, 0, 3\]"),
        (torch.full((1, 8, 8, 3), 255.0), "values from 255 to 255"),
        (torch.full((1, 8, 8, 3), -0.1), "values from -0.1 to -0.1"),
        (torch.full((1, 8, 8, 3), torch.nan), "values from nan to nan"),
        (torch.full((1, 8, 8, 3), torch.inf), "values from inf to inf"),
    ],
)
def test_bad_pictures(file, images, says):
    with pytest.raises(ForgetError, match=says):
        DemoJudge("demo", file).features(images)


def test_alpha_is_dropped_and_halves_are_taken():
    images = pictures(2).half()
    with_alpha = torch.cat([images, torch.full_like(images[..., :1], 9.0)], -1)
    assert torch.equal(check_images(with_alpha), images.float())


def test_unknown_domain(file):
    with pytest.raises(ForgetError, match="cannot tell the domain 'mood': it knows concept, style"):
        DemoJudge("demo", file).probabilities(pictures(), "mood")


def test_missing_file(tmp_path):
    with pytest.raises(ForgetError, match="judges are missing at"):
        DemoJudge("demo", tmp_path / "none.safetensors")


def test_broken_files(tmp_path, file):
    broken = {
        "cut": file.read_bytes()[:2000],
        "text": b"not safetensors at all",
        "empty": b"",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    made = networks()
    write_file(tmp_path / "one", {"demo": made["demo"]})
    write_file(tmp_path / "other labels", made, {"labels": {"mood": ["a"]}, "facts": {"demo:2": 1}})
    write_file(tmp_path / "no labels", made, {"facts": {"demo:2": 1}})
    write_file(tmp_path / "a list", made, [1])
    save_file({"a": torch.zeros(1)}, tmp_path / "no metadata")
    for name in (*broken, "one", "other labels", "no labels", "a list", "no metadata"):
        with pytest.raises(ForgetError, match="damaged or not|does not hold the demo"):
            DemoJudge("demo:2", tmp_path / name)
