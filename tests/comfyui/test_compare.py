"""Compare Before and After, run by the server."""

import os

import numpy as np
import pytest
from PIL import Image

from .server import PromptError
from .workflows import demo_loader, node


def workflow(**inputs):
    given = {
        "forgotten": "a photo of santa claus\nsanta claus, twemoji", "kept": "a cat, 3d render",
        "pictures": 1, "first_seed": 3,
    } | inputs  # fmt: skip
    parts = {"model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2]}
    return demo_loader() | {
        "patch": node("FMN_LoadForgetPatch", file="demo/santa_claus.safetensors"),
        "compare": node("FMN_CompareBeforeAfter", **parts | given),
        "grid": node("PreviewImage", images=["compare", 0]),
        "pair": node("PreviewImage", images=["compare", 2]),
    }


def test_the_concept_goes_and_its_neighbour_stays(server):
    outputs = server.run(workflow(patch=["patch", 0]))
    (text,) = outputs["compare"]["text"]
    forgotten, kept = text.splitlines()
    assert "in 2 of 2 before, 0 after" in forgotten and "in 1 of 1 before, 1 after" in kept
    grid = server.image(outputs["grid"])
    if folder := os.environ.get("SHOW"):
        Image.fromarray((grid * 255).astype(np.uint8)).save(f"{folder}/compare.png")
    assert grid.shape[0] > 3 * 192 and grid.std() > 0.1


def test_two_models_can_be_compared_without_a_judge(server):
    outputs = server.run(workflow(after=["demo", 0], judge="none", kept=""))
    assert outputs["compare"]["text"] == ["forgotten: pixels changed by 0 % on average"]


def test_the_demo_transformer_is_drawn_and_judged_like_the_demo_model(server):
    graph = workflow(after=["demo", 0], kept="a cat, 3d render", forgotten="")
    graph["demo"]["inputs"]["network"] = "transformer"
    (text,) = server.run(graph)["compare"]["text"]
    assert text == (
        "kept: pixels changed by 0 % on average; the judge sees what they name in 1 of 1 before, "
        "1 after"
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["Connect either a patch"]),
        ({"patch": ["patch", 0], "after": ["demo", 0]}, ["Connect either a patch"]),
        ({"patch": ["patch", 0], "forgotten": " ", "kept": "\n"}, ["no prompt"]),
        ({"patch": ["patch", 0], "judge": "somebody"}, ["no judge 'somebody'"]),
    ],
)
def test_refusals(server, inputs, words):
    with pytest.raises(PromptError) as error:
        server.run(workflow(**inputs))
    assert all(word in str(error.value) for word in words)
