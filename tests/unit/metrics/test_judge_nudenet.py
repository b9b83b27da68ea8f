"""The NudeNet judge on detections written down beforehand; its detector is replaced."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fmn.errors import ForgetError
from fmn.metrics.load import load_judge, weight_files
from fmn.metrics.nudenet_judge import COUNTED, UNSAFE, NudeNetJudge


def box(part, score):
    return {"class": part, "score": score, "box": [1, 2, 3, 4]}


# As nudenet 3.4.2 gives them: one list a picture, scores from 0.2 up.
FOUND = [
    [],
    [box("FACE_FEMALE", 0.9), box("BELLY_EXPOSED", 0.8)],
    [box("FEMALE_BREAST_EXPOSED", 0.61), box("FEMALE_BREAST_EXPOSED", 0.59)],
    [box("BUTTOCKS_EXPOSED", 0.35), box("ARMPITS_EXPOSED", 0.6)],
    [box("FEMALE_BREAST_COVERED", 0.95), box("ANUS_COVERED", 0.7)],
]


class Recorded:
    """A detector that gives what was written down, and keeps what it was shown."""

    def __init__(self):
        self.shown, self.answers = [], iter(FOUND)

    def detect(self, array):
        self.shown.append(array)
        return next(self.answers)


@pytest.fixture
def detector(monkeypatch):
    made = Recorded()
    real = importlib.import_module

    def replaced(name):
        return SimpleNamespace(NudeDetector=lambda: made) if name == "nudenet" else real(name)

    monkeypatch.setattr(importlib, "import_module", replaced)
    return made


def pictures(count=len(FOUND)):
    return torch.rand(count, 6, 8, 3, generator=torch.Generator().manual_seed(0))


def test_another_judge_with_nudenet_judges_unsafe_content_too(detector):
    judge = load_judge("demo+nudenet", {"concept": {"dog": "a dog"}})
    assert set(judge.labels) == {"concept", "style", "unsafe"} and judge.name == "demo+nudenet"
    assert judge.probabilities(pictures(), "unsafe").shape == (len(FOUND), 2)
    assert len(weight_files("demo+nudenet")) == 1 and weight_files("clip:/a") == [Path("/a")]


@pytest.mark.parametrize(
    "threshold, unsafe", [(0.6, [0, 0, 1, 0, 0]), (0.2, [0, 0, 1, 1, 0]), (0.62, [0, 0, 0, 0, 0])]
)
def test_a_picture_is_unsafe_by_its_parts(detector, threshold, unsafe):
    found = NudeNetJudge(threshold).probabilities(pictures(), "unsafe")
    assert found.tolist() == [[float(i), float(1 - i)] for i in unsafe]
    assert found.dtype == torch.float32


def test_classes_can_be_chosen(detector):
    judge = NudeNetJudge(unsafe=("BELLY_EXPOSED",))
    assert judge.probabilities(pictures(), "unsafe")[:, 0].tolist() == [0, 1, 0, 0, 0]


def test_counts_are_of_boxes(detector):
    counts = NudeNetJudge().counts(pictures())
    expected = {"BELLY_EXPOSED": 1, "FEMALE_BREAST_EXPOSED": 1, "ARMPITS_EXPOSED": 1}
    assert counts == dict.fromkeys(COUNTED, 0) | expected
    assert len(COUNTED) == 8 and len(UNSAFE) == 5


def test_detector_sees_bytes_as_opencv_reads_them(detector):
    images = torch.zeros(1, 2, 2, 3)
    images[0, 0, 1] = torch.tensor([1.0, 0.5, 0.25])
    NudeNetJudge().boxes(images)
    (shown,) = detector.shown
    assert shown.dtype.name == "uint8" and shown.flags["C_CONTIGUOUS"]
    assert shown[0, 1].tolist() == [64, 128, 255]


def test_boxes_keep_their_places(detector):
    rows = NudeNetJudge(0.2).boxes(pictures())
    assert [len(row) for row in rows] == [0, 2, 2, 2, 2]
    assert rows[1][0] == box("FACE_FEMALE", 0.9)


@pytest.mark.parametrize("threshold", [0.0, 0.19, 1.1, float("nan")])
def test_bad_thresholds(detector, threshold):
    with pytest.raises(ForgetError, match="threshold is .*: use 0.2 to 1"):
        NudeNetJudge(threshold)


def test_bad_questions(detector):
    judge = load_judge("nudenet", {"unsafe": {"unsafe": "", "safe": ""}})
    with pytest.raises(ForgetError, match="cannot tell the domain 'concept': it knows unsafe"):
        judge.probabilities(pictures(1), "concept")
    with pytest.raises(ForgetError, match="has no features"):
        judge.features(pictures(1))
    with pytest.raises(ForgetError, match="have shape"):
        judge.probabilities(torch.zeros(2, 2, 3), "unsafe")
    with pytest.raises(ForgetError, match="does not know the unsafe 'nude'"):
        load_judge("nudenet", {"unsafe": {"nude": ""}})


def test_package_is_missing(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ForgetError, match="No module named 'nudenet'.*pip install") as caught:
        load_judge("nudenet")
    assert "\n" not in str(caught.value)
