"""Patch files that must be refused, each with one sentence that names the file."""

import json
import re

import pytest
import torch
from safetensors.torch import load

from fmn.errors import ForgetError
from fmn.files import MAX_HEADER
from fmn.methods.describe import describe
from fmn.models.families import DEMO, layers
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import load_patch, save_patch

from ..tiny import make_patch, rewrite

LAYER = next(layer for layer in layers(DEMO) if layer.is_key_or_value)
PREFIX = file_name(DEMO, LAYER)
UP, DOWN, ALPHA = (f"{PREFIX}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha"))
OUT, IN = LAYER.shape
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # of a text encoder with three blocks
FOURTH = FC1.replace("layers_0", "layers_3")


@pytest.fixture
def saved(tmp_path):
    path = save_patch(make_patch(), tmp_path / "some patch.safetensors")
    return rewrite(path, lambda tensors, metadata: tensors.__setitem__(ALPHA, torch.tensor(2.0)))


def refused(path, reason):
    with pytest.raises(ForgetError, match=reason) as caught:
        load_patch(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 500
    return message


def test_the_file_itself_is_good(saved):
    assert len(load_patch(rewrite(saved, lambda tensors, metadata: None)).changes) == 14


def header_length(content):
    return int.from_bytes(content[:8], "little")


def with_header(content, header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + header_length(content) :]


def without_end(content):
    """Header length and half the header."""
    return content[: 8 + header_length(content) // 2]


def shifted(content):
    """The first tensor's data lie beyond the file."""
    header = json.loads(content[8 : 8 + header_length(content)])
    header[UP]["data_offsets"] = [10**9, 10**9 + 2 * OUT * 2]
    return with_header(content, header)


def overlapping(content):
    header = json.loads(content[8 : 8 + header_length(content)])
    header[UP]["data_offsets"] = [0, 2 * OUT * 2]
    return with_header(content, header)


def no_strings(content):
    header = json.loads(content[8 : 8 + header_length(content)])
    header["__metadata__"]["fmn.format"] = 1
    return with_header(content, header)


def pickled(content):
    return b"PK\x03\x04" + content


DAMAGED = "is damaged or not a safetensors file"
CONTENTS = {
    "empty": (lambda content: b"", DAMAGED),
    "text": (lambda content: b"I am a text file, not a patch.\n" * 20, DAMAGED),
    "page": (lambda content: b"<!DOCTYPE html><html>Not found</html>", "a web page"),
    "pickle": (pickled, DAMAGED),
    "zeros": (lambda content: bytes(4096), DAMAGED),
    "half a length": (lambda content: content[:4], DAMAGED),
    "a length": (lambda content: content[:8], DAMAGED),
    "half a header": (without_end, DAMAGED),
    "a header": (lambda content: content[: 8 + header_length(content)], DAMAGED),
    "half its data": (lambda content: content[: len(content) * 3 // 4], DAMAGED),
    "all but a byte": (lambda content: content[:-1], DAMAGED),
    "a byte too many": (lambda content: content + b"\0", DAMAGED),
    "huge length": (lambda content: b"\xff" * 8 + content[8:], DAMAGED),
    "length over size": (lambda content: len(content).to_bytes(8, "little") + content[8:], DAMAGED),
    "short length": (lambda content: (99).to_bytes(8, "little") + content[8:], DAMAGED),
    "no object": (lambda content: (2).to_bytes(8, "little") + b"[]", DAMAGED),
    "not UTF-8": (lambda content: (4).to_bytes(8, "little") + b"{\xff\xfe}", DAMAGED),
    "offsets beyond": (shifted, DAMAGED),
    "offsets overlap": (overlapping, DAMAGED),
    "metadata of numbers": (no_strings, DAMAGED),
    "deep header": (
        lambda content: (10**6).to_bytes(8, "little") + b'{"a":' + b"[" * (10**6),
        DAMAGED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", CONTENTS.values(), ids=CONTENTS)
def test_damaged_file(saved, change, reason):
    saved.write_bytes(change(saved.read_bytes()))
    refused(saved, reason)


def test_header_over_our_bound(saved):
    content = saved.read_bytes()
    header = content[8 : 8 + header_length(content)].ljust(MAX_HEADER + 8)
    data = content[8 + header_length(content) :]
    saved.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert len(load(saved.read_bytes())) == 29  # well-formed otherwise
    refused(saved, f"at most {MAX_HEADER} are read")


def test_no_file(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot be read .*: check the name")
    refused(tmp_path / "no" / "none.safetensors", "cannot be read")
    refused(tmp_path, "cannot be read")  # a folder


def drop(key):
    return lambda tensors, metadata: tensors.pop(key)


def put(key, value):
    return lambda tensors, metadata: tensors.__setitem__(key, value)


def tell(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


def spoil(key, value):
    return lambda tensors, metadata: tensors[key].view(-1)[-1:].fill_(value)


def of_rank(rank):
    def change(tensors, metadata):
        tensors[UP], tensors[DOWN] = torch.ones(OUT, rank).half(), torch.ones(rank, IN).half()

    return change


def cast(key, dtype):
    return lambda tensors, metadata: tensors.__setitem__(key, tensors[key].to(dtype))


def text_layer(inputs, outputs, value=1.0):
    def change(tensors, metadata):
        tensors[f"{FC1}.lora_down.weight"] = torch.full((2, inputs), value).half()
        tensors[f"{FC1}.lora_up.weight"] = torch.ones(outputs, 2).half()
        tensors[f"{FC1}.alpha"] = torch.tensor(2.0).half()

    return change


def large_alpha(tensors, metadata):
    tensors[UP] = torch.full_like(tensors[UP], 1e15, dtype=torch.float32)
    tensors[DOWN] = torch.full_like(tensors[DOWN], 1e-22, dtype=torch.float32)
    tensors[ALPHA] = torch.tensor(1e30)


def no_metadata(tensors, metadata):
    metadata.clear()


def no_tensors(tensors, metadata):
    tensors.clear()


def named_twice(tensors, metadata):
    twin = "lora_unet_" + LAYER.compvis.replace(".", "_")
    for key in (UP, DOWN, ALPHA):
        tensors[key.replace(PREFIX, twin)] = tensors[key].clone()


FIT = f"does not fit '{re.escape(LAYER.name)}' of shape"
STRAY = "which Forget-Me-Not demo model does not have"
NOT_FINITE = f"NaN or infinite values in '{PREFIX}'"
METADATA = "metadata of '.*' is damaged"
WRONG = "metadata of '.*' has values of the wrong type"
TENSORS = {
    "no metadata": (no_metadata, "not a forget patch but a LoRA: .* Use Load LoRA"),
    "no format": (lambda tensors, metadata: metadata.pop("fmn.format"), "not a forget patch"),
    "newer format": (tell("fmn.format", "2"), "has patch format '2', this version reads 1"),
    "odd format": (tell("fmn.format", "x" * 10**6), "update Forget-Me-Not"),
    "unknown family": (tell("fmn.base.family", "flux"), "unknown model family 'flux'; known are"),
    "no family": (lambda t, metadata: metadata.pop("fmn.base.family"), "unknown model family"),
    "other family": (tell("fmn.base.family", "sdxl"), "does not fit 'down_blocks"),
    "another family": (tell("fmn.base.family", "sd1"), "Stable Diffusion 1.x does not have"),
    "no tensors": (no_tensors, "holds no layers"),
    "unknown key": (put("something", torch.ones(1)), STRAY),
    "long key": (put("x" * 10**5, torch.ones(1)), STRAY),
    "unknown layer": (put("lora_unet_nowhere.alpha", torch.ones(())), STRAY),
    "text encoder's fourth block": (put(f"{FOURTH}.alpha", torch.ones(())), STRAY),
    "second text encoder": (put(f"{FC1.replace('te_', 'te2_')}.alpha", torch.ones(())), STRAY),
    "text embeddings": (
        put("lora_te_text_model_embeddings_token_embedding.alpha", torch.ones(())), STRAY,
    ),
    "text layer, no matrices": (put(f"{FC1}.alpha", torch.ones(())), f"lacks '{FC1}.lora_down"),
    "text layer, wrong in": (text_layer(129, 512), "does not fit 'text_encoder.text_model.enc"),
    "text layer, wrong out": (text_layer(128, 128), "does not fit 'text_encoder.text_model.enc"),
    "text layer, NaN": (text_layer(128, 512, torch.nan), f"NaN or infinite values in '{FC1}'"),
    "full delta": (put(f"{PREFIX}.diff", torch.ones(OUT, IN)), STRAY),
    "part of a part": (put(f"{PREFIX}.lora_up.weight.more", torch.ones(1)), STRAY),
    "no up": (drop(UP), f"lacks '{UP}'"),
    "no down": (drop(DOWN), f"lacks '{DOWN}'"),
    "named twice": (named_twice, "names the layer '.*' twice"),
    "wrong in": (put(DOWN, torch.ones(2, IN + 1)), FIT),
    "wrong out": (put(UP, torch.ones(OUT - 1, 2)), FIT),
    "ranks differ": (put(UP, torch.ones(OUT, 3)), FIT),
    "transposed": (put(UP, torch.ones(2, OUT)), FIT),
    "convolution": (put(DOWN, torch.ones(2, IN, 1, 1)), FIT),
    "flat": (put(DOWN, torch.ones(2 * IN)), FIT),
    "scalar": (put(DOWN, torch.ones(())), FIT),
    "long alpha": (put(ALPHA, torch.ones(2)), FIT),
    "rank 0": (of_rank(0), FIT),
    "rank 1025": (of_rank(1025), FIT),
    "empty up": (put(UP, torch.ones(0, 2)), FIT),
    "empty alpha": (put(ALPHA, torch.ones(0)), FIT),
    "int8": (cast(UP, torch.int8), "as I8; a patch has 16- or 32-bit"),
    "float64": (cast(DOWN, torch.float64), "as F64;"),
    "float8": (cast(UP, torch.float8_e4m3fn), "as F8_E4M3;"),
    "bool alpha": (cast(ALPHA, torch.bool), "as BOOL;"),
    "NaN": (spoil(UP, torch.nan), NOT_FINITE),
    "infinity": (spoil(DOWN, torch.inf), NOT_FINITE),
    "NaN alpha": (spoil(ALPHA, torch.nan), NOT_FINITE),
    # The product of the three is 1e25 or so, lora_up with alpha in it beyond what float32 holds.
    "large alpha": (large_alpha, NOT_FINITE),
    "broken JSON": (tell("fmn.settings", "{'steps': 35"), METADATA),
    "empty JSON": (tell("fmn.loss", ""), METADATA),
    "deep JSON": (tell("fmn.settings", "[" * 10**5 + "]" * 10**5), METADATA),
    "long number": (tell("fmn.loss", "1" * 10**5), METADATA),
    "concepts null": (tell("fmn.concepts", "null"), METADATA),
    "concepts a number": (tell("fmn.concepts", "7"), METADATA),
    "concepts a text": (tell("fmn.concepts", '"dog"'), METADATA),
    "concepts an object": (tell("fmn.concepts", '{"name": "dog"}'), METADATA),
    "concepts of texts": (tell("fmn.concepts", '["dog"]'), METADATA),
    "concepts of lists": (tell("fmn.concepts", '[["dog"]]'), METADATA),
    "concepts without name": (tell("fmn.concepts", '[{"kind": "object"}]'), METADATA),
    "names of numbers": (tell("fmn.concepts", '[{"name": 7, "kind": "object"}]'), WRONG),
    "kinds of lists": (tell("fmn.concepts", '[{"name": "dog", "kind": []}]'), WRONG),
    "names of null": (tell("fmn.concepts", '[{"name": null, "kind": "object"}]'), WRONG),
}  # fmt: skip


def test_a_good_text_layer_is_read(saved):
    patch = load_patch(rewrite(saved, text_layer(128, 512)))
    assert patch.change_of("text_encoder.text_model.encoder.layers.0.mlp.fc1").eq(2).all()


@pytest.mark.parametrize("change, reason", TENSORS.values(), ids=TENSORS)
def test_wrong_content(saved, change, reason):
    refused(rewrite(saved, change), reason)


@pytest.mark.parametrize(
    "key, value",
    [
        ("fmn.settings", "[]"), ("fmn.settings", "7"), ("fmn.loss", '"low"'), ("fmn.loss", "[1]"),
        ("fmn.loss", '{"first": 1}'), ("fmn.loss", '{"first": "a", "last": "b", "steps": 1}'),
        ("fmn.loss", '{"first": NaN, "last": 1, "steps": 1}'),
        ("fmn.loss", '{"first": 1, "last": 1, "steps": 1' + "0" * 400 + "}"),
        ("fmn.truncation_error", '"much"'), ("fmn.rounding_error", "null"),
        ("fmn.truncation_error", "1" + "0" * 400), ("fmn.rounding_error", "NaN"),
        ("fmn.date", "7"), ("fmn.method", "{}"), ("fmn.base.fingerprint", "null"),
    ],
)  # fmt: skip
def test_wrong_records_are_refused_or_described(saved, key, value):
    """An untrusted record must not break what shows it."""
    rewrite(saved, tell(key, value))
    try:
        patch = load_patch(saved)
    except ForgetError:
        return
    assert "dog (object)" in describe(patch)
