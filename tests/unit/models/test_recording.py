"""Rows are taken at the right tokens of the right layers, over several forwards."""

import pytest
import torch
from torch import nn

from fmn.models.recording import Recorder
from fmn.models.transformers import (
    PICTURE,
    PICTURE_TEXT,
    POOLED,
    TEXT_PICTURE,
    TRANSFORMERS,
    Reader,
    Transformer,
    transformer_of,
)


def tokens(text, picture, padding=0):
    """One sequence in which a picture's token i is [i, i]."""
    body = torch.cat([torch.arange(picture), torch.full((padding,), -2)]).float()
    before, after = text
    parts = [torch.full((before,), -1.0), body, torch.full((after,), -1.0)]
    return torch.cat(parts)[None, :, None].expand(1, -1, 2).clone()


@pytest.mark.parametrize(
    ("order", "text", "pad"),
    [
        (PICTURE, (0, 0), 1),
        (TEXT_PICTURE, (3, 0), 1),
        (TEXT_PICTURE, (4, 0), 4),
        (PICTURE_TEXT, (0, 3), 1),
        (PICTURE_TEXT, (0, 4), 4),
    ],
)
def test_rows_of_the_picture(order, text, pad):
    entry = Transformer("x", "X", "X", "X", (), (), "x", pad=pad)
    layer, positions = nn.Linear(2, 1, bias=False), torch.tensor([[0, 5], [2, 3], [1, 4]])
    nn.init.ones_(layer.weight)
    recorder = Recorder(entry, positions, 6)
    reader = Reader("layer", "layer", order)
    sequence = tokens(text, 6, -6 % pad)
    with recorder.attached({"layer": reader}, {"layer": layer}):
        layer(sequence.expand(2, -1, -1))
        layer(sequence)
    rows = recorder.taken()["layer"]
    assert rows.inputs[..., 0].tolist() == positions.tolist()
    assert rows.outputs[..., 0].tolist() == (2 * positions).tolist()
    assert not layer._forward_hooks


def test_pooled_text_has_one_row():
    entry, layer = Transformer("x", "X", "X", "X", (), (), "x"), nn.Linear(3, 2)
    recorder = Recorder(entry, torch.zeros(2, 4).long(), 6)
    pooled = torch.randn(2, 3)
    with recorder.attached({"p": Reader("p", "p", POOLED)}, {"p": layer}):
        given = layer(pooled)
    rows = recorder.taken()["p"]
    assert torch.equal(rows.inputs[:, 0], pooled) and torch.equal(rows.outputs[:, 0], given)


def test_of_a_fused_layer_what_attention_gives_is_recorded():
    entry, layer = Transformer("x", "X", "X", "X", (), (), "x"), nn.Linear(5, 2)
    recorder = Recorder(entry, torch.tensor([[1]]), 3)
    given = torch.randn(1, 3, 5)
    with recorder.attached({"x": Reader("x", "x", PICTURE, fused=True)}, {"x": layer}):
        output = layer(given)
    rows = recorder.taken()["x"]
    assert torch.equal(rows.inputs[0], given[0, 1:2, :2])
    assert torch.equal(rows.outputs[0], output[0, 1:2])


def test_families_differ_and_are_told_apart():
    assert len({entry.key for entry in TRANSFORMERS}) == len(TRANSFORMERS)
    for entry in TRANSFORMERS:
        names = {mark for mark in entry.marks if not mark.startswith("!")}
        assert transformer_of(entry.network, names) is entry
    assert transformer_of("UNetModel", set()) is None


def test_layers_come_in_the_order_of_a_forward_pass():
    known = {"single_blocks.0.linear2", "vector_in.in_layer"} | {
        f"double_blocks.{i}.img_attn.proj" for i in (10, 9, 1, 0)
    }
    flux = transformer_of("Flux", {"vector_in.in_layer"})
    assert [path for path, _ in flux.paths(flux.readers, known)] == [
        "vector_in.in_layer", "double_blocks.0.img_attn.proj", "double_blocks.1.img_attn.proj",
        "double_blocks.9.img_attn.proj", "double_blocks.10.img_attn.proj",
        "single_blocks.0.linear2",
    ]  # fmt: skip


@pytest.mark.parametrize("order", [PICTURE, POOLED])
def test_rows_keep_the_precision_of_the_model(order):
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    recorder = Recorder(Transformer("x", "X", "X", "X", (), (), "x"), torch.zeros(1, 1).long(), 4)
    given = torch.ones(1, *(4,) * (order == PICTURE), 3, dtype=torch.bfloat16)
    with recorder.attached({"x": Reader("x", "x", order)}, {"x": layer}):
        output = layer(given)
    rows = recorder.taken()["x"]
    assert rows.inputs.dtype is rows.outputs.dtype is torch.bfloat16
    assert torch.equal(rows.outputs[0, 0], output.flatten(0, -2)[0])
