"""Damaged and hostile files: patches, erasers of other tools, lists of concepts.

    python benchmarks/mutated_files.py [--seed 0] [--count 10000] [--keep FOLDER]

Makes files as this program and others write them, damages each copy (flipped bits, cut ends, edited
headers, huge shapes, wrong types, pickles that name other things, odd names), and reads it. Each is
either refused by a ``ForgetError`` of at most 300 characters, or read as something whole: finite
changes in the layers' shapes, concepts with names. Prints how many were refused, the slowest, the
growth of memory, and whatever went wrong; with --keep its file is left there.
"""

import argparse
import io
import json
import math
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save

from fmn.concepts.concept import Concept
from fmn.concepts.concept_list import FIELDS, MAX_CONCEPTS, read_concepts
from fmn.errors import ForgetError
from fmn.models.families import DEMO, layers
from fmn.models.transformers import BY_KEY
from fmn.patches.file_check import MAX_RANK
from fmn.patches.foreign_file import ForeignFile, Tensors
from fmn.patches.import_patch import import_patch
from fmn.patches.patch import ForgetPatch, load_patch, save_patch

LAYERS = [layer for layer in layers(DEMO) if layer.is_key_or_value][:2]
GENERATOR = torch.Generator().manual_seed(0)
BASE = {f"{one.name}.weight": torch.randn(one.shape, generator=GENERATOR) for one in LAYERS}
MAX_MESSAGE, MAX_GROWTH, MAX_SECONDS = 300, 400 << 20, 5.0
TEXTS = (
    "", " ", "\0", "\x1b[31m", "..", "../../etc/passwd", "C:\\con", "\u202egnp", "e\u0301",
    "a" * 5000, "dog\n\nrm -rf", "\U0001f600", "\ud800", "'; DROP", "{}", "%s%n", "NaN",
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 1.5, 1e308, 2**63, 2**70, float("nan"), "", [], {}, [[[[]]]], [1, "a"],
    {"name": {}}, *TEXTS,
)  # fmt: skip
NAMES = (
    "a",
    "..",
    "con",
    "x" * 180,
    "dög 犬",
    "a\nb",
    "a\x1b[31mb",
    "50%",
    "[a]",
    "-rf",
    "a.b.c",
    "'",
)


def factors(layer, rank=2):
    up = torch.randn(layer.shape[0], rank, generator=GENERATOR)
    return up, torch.randn(rank, layer.shape[1], generator=GENERATOR)


def lora():
    tensors = {}
    for layer in LAYERS:
        name, (up, down) = "lora_unet_" + layer.name.replace(".", "_"), factors(layer)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def flux():
    """A LoRA of a transformer, some of it parts of joined matrices."""
    block = "transformer.single_transformer_blocks.0."
    return {
        f"{block}{name}.lora_{part}.weight": torch.ones(shape)
        for name in ("attn.to_q", "attn.to_v", "proj_out")
        for part, shape in {"A": (2, 4), "B": (6, 2)}.items()
    }


def edited():
    return {
        key: weight + 0.1 * torch.outer(weight[:, 0], weight[0]) for key, weight in BASE.items()
    }


def pickled(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def originals(folder):
    """(how to read it, ending, bytes) of whole files."""
    record = {"concepts": [{"name": "dog", "kind": "object"}], "method": "reread", "settings": {}}
    patch = ForgetPatch(DEMO, {one.name: factors(one) for one in LAYERS}, record)
    ours = save_patch(patch, folder / "ours.safetensors").read_bytes()
    metadata = {
        "prompts": '["dog"]',
        "lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.r": 2}',
    }
    fields = [{"name": "dog", "kind": "object", "aliases": ["hound"], "anchor": "cat"}, "style:ink"]
    lists = {
        ".txt": "dog | hound -> cat\nstyle:ink\n# end\n",
        ".csv": "name,kind,aliases\ndog,object,hound|cur\nink,style,\n",
        ".json": json.dumps(fields),
        ".yaml": "- {name: dog, aliases: [hound], anchor: cat}\n- style:ink\n",
    }
    return [
        (load_patch, ".safetensors", ours),
        (load_patch, ".safetensors", ours),
        (imported, ".safetensors", ours),
        (imported, ".safetensors", save(lora(), metadata)),
        (imported, ".safetensors", save(flux(), {"modelspec.architecture": "flux-1-dev/lora"})),
        (imported, ".safetensors", save(edited())),
        (imported, ".pt", pickled(lora())),
        (imported, ".pt", pickled({"unet": OrderedDict(edited())})),
        (imported, ".ckpt", pickled(edited(), _use_new_zipfile_serialization=False)),
        *((read_concepts, ending, text.encode()) for ending, text in lists.items()),
    ]


def imported(path):
    return import_patch(path, [Concept("dog")], ForeignFile("base", Tensors(BASE), {})).patch


# Damage: each takes the bytes and a source of random numbers.


def flip(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 64))):
        # Half of them where structure is: at the beginning or the end.
        near = draw.choice((len(data), len(data), 400, -400))
        place = draw.randrange(near) if near > 0 else len(data) - 1 - draw.randrange(-near)
        data[max(0, min(place, len(data) - 1))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def insert(data, draw):
    place, more = draw.randrange(len(data)), draw.choice(TEXTS).encode("utf-8", "surrogatepass")
    return data[:place] + (more or b"\0" * 64) + data[place:]


def double(data, draw):
    return data + data[draw.randrange(len(data)) :]


def other_beginning(data, draw):
    starts = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"<!DOCTYPE html>", b"\xff" * 8,
              b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 16,
              b"\x08" + b"\0" * 7 + b"{")  # fmt: skip
    start = draw.choice(starts)
    return start + data[len(start) if draw.random() < 0.5 else 0 :]


def header(data, draw):
    """Edit the JSON of a safetensors file, or its length."""
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    for _ in range(draw.choice((1, 1, 3))):
        key = draw.choice(list(content))
        entry = content[key]
        act = draw.randrange(8)
        if act == 0:
            content[draw.choice(TEXTS)] = content.pop(key)
        elif act == 1:
            content[key] = draw.choice(VALUES)
        elif act == 2:
            del content[key]
        elif isinstance(entry, dict) and entry:
            inner = draw.choice(list(entry))
            value = draw.choice(VALUES)
            if inner == "dtype":
                value = draw.choice(
                    ("F64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "U64", "BF16", "F16")
                )
            elif inner == "shape":
                value = draw.choice(([2**40], [2**32, 2**32], [0, 8], [], [-1], [1] * 60, [2**64]))
            elif inner == "data_offsets":
                value = draw.choice(([0, 0], [0, 2**63], [8, 4], [0, len(data)], [0]))
            elif key == "__metadata__":
                wrong = json.dumps(draw.choice(VALUES[:14]))
                value = draw.choice((wrong, "[" * 500, '{"a":', "NaN", *TEXTS))
            entry[inner] = value
        if not content:
            break
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    length = len(text) if draw.random() < 0.9 else draw.choice((0, 1, 2**40, 2**63, len(text) + 9))
    return length.to_bytes(8, "little") + text + data[8 + size :]


class Evil:
    def __reduce__(self):
        return sys.exit, (77,)


def hostile_pickle(data, draw):
    """Another content for a torch file: what weights_only lets pass, and what it must not."""
    content = dict(draw.choice((lora(), flux(), edited())))
    key = draw.choice([key for key, tensor in content.items() if tensor.dim() == 2])
    one = content[key]
    loop: dict = {}
    loop["a"] = loop
    bomb: dict = {}
    for _ in range(6):
        bomb = {str(number): bomb for number in range(30)}
    content[key] = draw.choice((
        Evil(), None, 3, "text", [one], {"weight": one}, torch.ones(1).expand(10**6, 10**6),
        one.to(torch.int8), one * math.nan, one * 1e38 * 10, one.to(torch.complex64), one[:1],
        one.to_sparse(), torch.empty(one.shape, device="meta"), loop, bomb, torch.nn.Parameter(one),
        one.T.contiguous().T, torch.zeros(0), torch.ones(()), one.bool(), one.double(),
        bytearray(10), {1: one}, set(), torch.float16, one.to(torch.float8_e4m3fn), one * 0,
    ))  # fmt: skip
    if draw.random() < 0.3:
        content[draw.choice(TEXTS)] = content.pop(key)
    whole = draw.choice(
        (content, {"state_dict": content}, {"unet": content}, [content], (content,))
    )
    return pickled(whole, _use_new_zipfile_serialization=draw.random() < 0.8)


def listed(data, draw):
    """Another content for a list."""
    entries = ["dog", "style:ink", {"name": "cat"}]
    for _ in range(draw.choice((1, 2, 5))):
        entry = draw.choice((
            draw.choice(VALUES), {"name": draw.choice(VALUES)}, {draw.choice(TEXTS): "a"},
            {"name": "x", draw.choice(FIELDS): draw.choice(VALUES)},
            f"{draw.choice(TEXTS)} | {draw.choice(TEXTS)} -> {draw.choice(TEXTS)}",
        ))  # fmt: skip
        entries.insert(draw.randrange(len(entries) + 1), entry)
    text = json.dumps(draw.choice((entries, entries, entries[0], {"a": entries})))
    if draw.random() < 0.1:
        text = draw.choice(
            ("&a [*a]", "a: &a [x, x]\nb: [*a, *a]", "!!python/object:os.x {}", "[" * 9999)
        )
    return text.encode("utf-8", "surrogatepass")


def damage(read, ending, data, draw):
    kinds = [flip, flip, cut, insert, double, other_beginning]
    kinds += {".safetensors": [header] * 6, ".pt": [hostile_pickle] * 6}.get(ending, [])
    kinds += [listed] * 5 if read is read_concepts else []
    return draw.choice(kinds)(data, draw)


def check(read, path):
    """Read one file; returns None, or the message of its refusal."""
    try:
        found = read(path)
    except ForgetError as error:
        message = str(error).replace(str(path.parent), "")
        assert len(message) <= MAX_MESSAGE, f"{len(message)} characters: {message}"
        return message
    if isinstance(found, list):
        assert 0 < len(found) <= MAX_CONCEPTS
        for concept in found:
            assert concept.name.strip() and all(isinstance(each, str) for each in concept.aliases)
        return None
    assert found.changes and (found.family is DEMO or found.family.entry is BY_KEY["flux"])
    for layer in found.layers:
        up, down = found.changes[layer.name]
        assert up.shape[0] == layer.shape[0] and tuple(down.shape[1:]) == layer.shape[1:]
        assert 0 < up.shape[1] == down.shape[0] <= MAX_RANK
        assert torch.isfinite(found.change_of(layer.name)).all()
    assert len(found.layers) == len(found.changes)
    assert all(isinstance(name, str) for name in found.concepts)
    return None


def run(seed, count, folder, keep=None):
    """Read ``count`` damaged files; returns how many were read and refused, the slowest, and what
    went wrong."""
    draw, known = random.Random(seed), originals(folder)
    results, slowest, wrong = Counter(), (0.0, ""), []
    for read, ending, data in known:
        path = folder / f"whole{ending}"
        path.write_bytes(data)
        assert check(read, path) is None, path
    for index in range(count):
        read, ending, data = draw.choice(known)
        path = folder / f"{draw.choice(NAMES) if draw.random() < 0.1 else 'dog'}{ending}"
        path.write_bytes(damage(read, ending, data, draw))
        start = time.process_time()
        try:
            outcome = "read" if check(read, path) is None else "refused"
        except (Exception, SystemExit) as error:
            outcome, at = "WRONG", traceback.extract_tb(error.__traceback__)[-1]
            found = (
                f"{index}: {path.name!r}: {type(error).__name__}: {error} ({at.name}:{at.lineno})"
            )
            wrong.append(found)
            if keep:
                (keep / f"{index}{ending}").write_bytes(path.read_bytes())
        slowest = max(slowest, (time.process_time() - start, f"{index}{ending}"))
        results[read.__name__, outcome] += 1
        path.unlink()
    return results, slowest, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="where a file that is read wrongly is left")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        run(options.seed + 1, 50, Path(folder))  # what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        results, slowest, wrong = run(options.seed, options.count, Path(folder), options.keep)
    seconds, name = slowest
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    for (reader, outcome), number in sorted(results.items()):
        print(f"{reader:14} {outcome:8} {number:6}")
    print(f"slowest: {seconds:.2f} s ({name}); memory grew by {growth >> 20} MiB")
    print("\n".join(wrong[:40]))
    return int(bool(wrong) or growth > MAX_GROWTH or seconds > MAX_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
