"""Draw the targets of the suite ``demo-wide`` by a seed, and write it.

Every concept of the demo model's world can be a target that both judges know well: they recognise
it in at least ``KNOWN`` of its untouched pictures, one in each style. What settings of this package
were ever chosen on is in the half ``tune``. Neighbours are the members of a target's domain that
the model reads most like it: by the cosine of what its cross-attention layers give for both, less
what they give for no word, at equal queries.

    python tools/demo_suite.py
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fmn.bench.suite import SUITES, parse_suite, read_suite  # noqa: E402
from fmn.closed_form.text_embeddings import encode_chunk  # noqa: E402
from fmn.hosts.diffusers.open import open_model  # noqa: E402
from fmn.methods.reread.attention_output import (  # noqa: E402
    cross_attention_layers,
    read_out,
    record_queries,
)
from fmn.methods.reread.settings import Settings  # noqa: E402
from fmn.metrics.load import load_judge  # noqa: E402
from fmn.models.image_sampler import open_sampler  # noqa: E402

KNOWN = 3 / 4  # of the pictures, by each judge; only those count in the bench
NEAR = 5
COUNTS = {"report": (8, 12, 4), "tune": (4, 5, 3)}  # identities, objects, styles
CHOSEN_ON = ("santa claus", "robot", "dog", "apple", "neon sign", "ink drawing")
KINDS = ("identity", "object", "style")
SEED = 0
HEAD = """\
# The demo model's world with 36 targets, 24 of them for reports. Made by tools/demo_suite.py: every
# concept that both judges know well could be drawn; `near` are the five that the model reads most
# like the target. The suite `demo` has the prompts for the other probes.
"""


def main() -> None:
    data = read_suite("demo")
    suite, judges = parse_suite(data, "demo"), [load_judge(name) for name in ("demo", "demo:2")]
    model = open_model("demo")
    pairs = [(concept, style) for concept in suite.concepts for style in suite.styles]
    with open_sampler(model, suite.sampling, 16) as sampler:
        images = sampler.draw([suite.prompt(*pair) for pair in pairs], list(range(len(pairs))))
        phrases = [f"a photo of {phrase}" for phrase in suite.concepts.values()]
        styled = [suite.in_style("a picture", style) for style in suite.styles]
        likeness = {
            "concept": likeness_of(model, sampler.denoiser, "a photo of", phrases),
            "style": likeness_of(model, sampler.denoiser, "a picture", styled),
        }
    right = torch.stack([said_right(judge, images, pairs) for judge in judges]).all(0)  # [N, 2]
    right = right.unflatten(0, (len(suite.concepts), len(suite.styles)))
    known = {
        "concept": names_above(suite.concepts, right[..., 0].float().mean(1)),
        "style": names_above(suite.styles, right[..., 1].float().mean(0)),
    }
    of_kind = {kind: [name for name in known["concept"] if suite.kinds[name] == kind]
               for kind in KINDS[:2]} | {"style": known["style"]}  # fmt: skip
    targets = []
    for name, kind, split in drawn(of_kind, suite.far):
        domain = "style" if kind == "style" else "concept"
        names = list(suite.styles if kind == "style" else suite.concepts)
        order = likeness[domain][names.index(name)].argsort(descending=True).tolist()
        others = [one for one in known[domain] if one not in (name, *suite.far)]
        near = [names[i] for i in order if names[i] in others][:NEAR]
        targets.append({"name": name, "kind": kind, "split": split, "near": near})
    data |= {"name": "demo-wide", "title": "Demo model, 36 targets", "targets": targets}
    text = HEAD + yaml.safe_dump(data, sort_keys=False, width=100, default_flow_style=None)
    parse_suite(yaml.safe_load(text), "demo-wide")
    (SUITES / "demo-wide.yaml").write_text(text, "utf-8")
    print({kind: len(names) for kind, names in of_kind.items()}, "known;", len(targets), "targets")


def drawn(of_kind, far):
    """(name, kind, split) of every target, in order."""
    chooser, found = random.Random(SEED), []
    for number, (kind, names) in enumerate(of_kind.items()):
        fixed = [name for name in CHOSEN_ON if name in names]
        free = [name for name in names if name not in (*fixed, *far)]
        chooser.shuffle(free)
        tune, report = (COUNTS[split][number] for split in ("tune", "report"))
        fixed += free[: tune - len(fixed)]
        rest = [name for name in free if name not in fixed][:report]
        found += [(name, kind, "tune") for name in fixed]
        found += [(name, kind, "report") for name in rest]
    return found


def said_right(judge, images, pairs):
    """Whether the judge names the concept and the style of each picture, bool [N, 2]."""
    columns = []
    for domain, wanted in zip(("concept", "style"), zip(*pairs)):
        labels = judge.labels[domain]
        said = judge.probabilities(images, domain).argmax(1).tolist()
        columns.append(torch.tensor([labels[i] == name for i, name in zip(said, wanted)]))
    return torch.stack(columns, 1)


def names_above(names, shares):
    return [name for name, share in zip(names, shares.tolist()) if share >= KNOWN]


def likeness_of(model, denoiser, blank, texts):
    """The mean cosine over layers of what is read out of each two texts, less ``blank``, [N, N]."""
    settings = Settings(sampling_steps=1, guidance=1.0, query_positions=64)
    empty = encode_chunk(model, "")
    side = model.family.resolution // 8
    queries = record_queries(denoiser, model.family, [empty] * 2, empty, settings, side)
    contexts, found = model.encode_all([blank, *texts]), []
    for layer in cross_attention_layers(denoiser, model.family):
        rows = queries[layer.name].flatten(0, 1).expand(len(contexts), -1, -1)
        output = (
            read_out(layer, rows, contexts) @ denoiser.module(f"{layer.name}.to_out.0").weight.T
        )
        directions = F.normalize((output[1:] - output[:1]).flatten(1), dim=1)
        found.append(directions @ directions.T)
    return torch.stack(found).mean(0)


if __name__ == "__main__":
    main()
