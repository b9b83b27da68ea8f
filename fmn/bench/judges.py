"""The judges of a run: made from their specs, joined where several are needed, and told apart."""

import hashlib
from pathlib import Path

from ..errors import ForgetError
from ..metrics.judge import find_labels, load_judge

SAMPLED = 1 << 20  # bytes of each end of a large file that are hashed, with its size
WEIGHTS = (".safetensors", ".bin", ".onnx", ".json", ".png")


class Joined:
    """Several judges as one: each domain by the first that knows it, features by the first."""

    def __init__(self, judges):
        self.judges = judges
        self.name = "+".join(judge.name for judge in judges)
        self.labels = {}
        for judge in reversed(judges):
            self.labels |= judge.labels

    def probabilities(self, images, domain):
        find_labels(self, domain)
        judge = next(judge for judge in self.judges if domain in judge.labels)
        return judge.probabilities(images, domain)

    def features(self, images):
        return self.judges[0].features(images)


def judge_for(spec, suite):
    """A judge of a suite's concepts and styles; ``A+nudenet`` adds unsafe content to A."""
    first, plus, second = spec.rpartition("+")
    if plus and second == "nudenet":
        return Joined([judge_for(first, suite), load_judge(second)])
    if spec == "nudenet":
        return load_judge(spec)
    labels = {
        "concept": dict(suite.concepts),
        "style": {name: text.format("something") for name, text in suite.styles.items()},
    }
    if not spec.startswith("clip:"):
        return load_judge(spec, labels)
    return load_judge(spec, labels, {"concept": "a picture of {}", "style": "{}"})


def check_domains(judge, targets):
    """Refuse a judge that cannot tell what a target needs.

    Raises:
        ForgetError
    """
    for target in targets:
        if target.domain not in judge.labels:
            raise ForgetError(
                f"Judge '{judge.name}' cannot tell '{target.name}' ({target.kind}): name one that "
                "can, such as clip:FOLDER or, for unsafe content, clip:FOLDER+nudenet."
            )


def hash_of(paths):
    """A hash over files, and over the weights and settings in folders; "" paths are skipped."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix in WEIGHTS:
                digest.update(f"{file.name}|{file.stat().st_size}|".encode())
                with open(file, "rb") as opened:
                    digest.update(opened.read(SAMPLED))
                    opened.seek(max(0, file.stat().st_size - SAMPLED))
                    digest.update(opened.read())
    return digest.hexdigest()[:32]


def files_of(spec):
    """Where a judge's weights lie; nothing for NudeNet, whose version is its package's."""
    from ..metrics.demo_judge import FILE

    paths = []
    for part in spec.split("+"):
        kind, _, rest = part.partition(":")
        paths += {"demo": [FILE], "clip": [rest]}.get(kind, [])
    return paths
