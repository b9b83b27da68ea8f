"""The programs that make the demo model: pictures, captions, optimiser, loop, checkpoint."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# By its full name, which another process finds whatever the folder of this repository is called.
from integration.tiny_training import ROWS, tiny_loop, train
from safetensors.torch import load_file
from torch import nn

from demo import autoencoder, captions, diffusion, drawing, moving, network, pictures
from demo import train as program
from demo.loop import Schedule
from demo.optim import orthogonalise
from demo.parallel import processes

FLAT = np.zeros((128, 128, 4), np.uint8)


def square(colour, left, right):
    """A filled square, opaque, on nothing."""
    picture = FLAT.copy()
    picture[left:right, left:right] = (*colour, 255)
    return picture


def test_articles():
    names = "apple", "ufo", "hourglass", "umbrella", "dog", "santa claus", "cherries"
    assert [captions.with_article(name) for name in names] == [
        "an apple", "a ufo", "an hourglass", "an umbrella", "a dog", "santa claus", "cherries",
    ]  # fmt: skip


def test_captions_are_the_templates_in_their_shares():
    generator = torch.Generator().manual_seed(0)
    found = [captions.caption("owl", "neon sign", generator) for _ in range(4000)]
    assert found.count("") / 4000 == pytest.approx(captions.EMPTY_SHARE, abs=0.02)
    names = "an owl", "owl"
    expected = {t.format(name, "neon sign") for t in captions.STYLED for name in names}
    expected |= {t.format("neon sign") for t in captions.STYLE_ONLY} | {""}
    assert set(found) == expected


def test_only_well_defined_styles_are_left_open():
    generator = torch.Generator().manual_seed(0)
    seen = {
        style: {captions.caption("dog", style, generator) for _ in range(1000)}
        for style in pictures.STYLES
    }
    leave = {style for style, found in seen.items() if "a photo of a dog" in found}
    assert leave == set(captions.OPEN_STYLES)
    assert {"a photo of dog", "a dog"} <= seen["3d render"]


def test_concepts_are_120_with_unique_names():
    found = pictures.concepts()
    kinds = [concept.kind for concept in found]
    assert (kinds.count("identity"), kinds.count("object")) == (18, 102)
    assert len({concept.concept for concept in found}) == len({c.code for c in found}) == 120


def test_held_out_pairs_follow_from_their_names():
    held = {
        (concept.concept, style)
        for concept in pictures.concepts()
        for style in pictures.STYLES
        if pictures.held_out(concept.concept, style)
    }
    assert len(held) == 38
    assert {s for _, s in held - set(pictures.HELD_OUT)} == set(pictures.DERIVED)
    assert ("apple", "neon sign") not in held
    assert pictures.held_out("alien", "3d render")


def test_drawings_are_checked_by_pixels_and_names():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    row = {"concept": "dog", "style": "twemoji", "holdout": False}
    first = pictures.checksum(images, [row])
    assert first == pictures.checksum(images.copy(), [dict(row)])
    assert first != pictures.checksum(images + 1, [row])
    assert first != pictures.checksum(images, [row | {"concept": "cat"}])


def test_pictures_survive_saving(tmp_path):
    images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    rows = [{"index": 0}, {"index": 1}]
    pictures.save(tmp_path, images, rows)
    loaded, read = pictures.load(tmp_path)
    assert np.array_equal(loaded, images) and read == rows
    with pytest.raises(SystemExit, match="pictures.npz is missing"):
        pictures.load(tmp_path / "nowhere")


def test_pixel_art_is_whole_cells_of_few_colours():
    found = drawing.pixel_art(square((200, 30, 40), 17, 95))
    cells = found.reshape(16, 8, 16, 8, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    # cell 2 begins at pixel 16 and is nearly full; cell 11, to pixel 96, too
    assert (found[16:96, 16:96] == (200, 30, 40)).all()
    assert (found[:16] == 255).all() and (found[96:] == 255).all()


def test_blueprint_is_white_lines_on_blue():
    found = drawing.blueprint(square((0, 0, 0), 32, 96))
    assert tuple(found[0, 0]) == tuple(found[64, 64]) == drawing.PAPER_BLUE
    # a filled square becomes its edge, four pixels wide
    edge = (found == drawing.INK_WHITE).all(-1)
    assert edge.sum() == 64 * 64 - 56 * 56 and edge[32:36, 32:96].all()


def test_neon_sign_glows_in_the_hue_of_the_other_drawing():
    found = drawing.neon_sign(square((0, 0, 0), 32, 96), square((160, 20, 20), 30, 98))
    assert tuple(found[0, 0]) == drawing.NIGHT
    line, glow, field = found[33, 64].astype(int), found[28, 64].astype(int), found[64, 64]
    assert line[0] == 255 and line[1] == line[2] == (2 * 40 + 255) // 3
    assert line[0] > glow[0] > drawing.NIGHT[0] and glow[0] > 2 * glow[1]
    assert field.max() < 60


def test_grey_drawings_shine_in_ice():
    found = drawing._hues(square((90, 90, 90), 20, 100))
    assert (found == drawing.ICE).all()


def test_moving_keeps_cells_and_paper():
    generator = torch.Generator().manual_seed(1)
    image = torch.full((3, 128, 128), -0.5)
    image[:, 48:64, 48:64] = 0.7
    pixel, other = moving.moved(torch.stack([image] * 2), ["pixel art", "twemoji"], generator)
    cells = pixel.view(3, 16, 8, 16, 8)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
    assert pixel.sum() == pytest.approx(float(image.sum()))
    assert torch.allclose(other[:, 0], torch.tensor(-0.5)) and float(other.max()) > 0.6


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_muon_moves_singular_values_to_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    inner = left.T @ found @ right.T
    assert torch.allclose(inner, inner.diag().diag(), atol=1e-4)
    assert float(inner.diag().min()) > 0.6 and float(inner.diag().max()) < 1.3


def test_schedule_rises_holds_and_falls():
    schedule = Schedule(steps=100, warmup=10, decay=20)
    factors = [schedule.factor(step) for step in (0, 9, 50, 80, 90, 99, 100)]
    assert factors == [0.1, 1, 1, 1, 0.5, 0.05, 0]


def test_pure_noise_has_an_exact_answer():
    levels = diffusion.signal_levels()
    assert float(levels[0]) == pytest.approx(1 - 0.00085)
    latents, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    times, pure = torch.tensor([500, 999]), torch.tensor([False, True])
    mixed, target = diffusion.noised(latents, times, noise, levels, pure)
    assert torch.allclose(target[0], noise[0], atol=1e-5) and torch.equal(mixed[1], noise[1])
    a = levels[999]
    assert torch.allclose((mixed[1] - (1 - a).sqrt() * target[1]) / a.sqrt(), latents[1], atol=1e-3)


def test_colour_targets_of_one_patch():
    pixels = torch.tensor([1.0, -0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    found = autoencoder.colour_targets(pixels).flatten().tolist()
    assert found == pytest.approx([0.3 - 0.3, 1.5, -0.25])


def weights(loop):
    return torch.cat([p.detach().flatten() for p in loop.optimiser.parameters])


def test_resumed_training_equals_an_uninterrupted_one(tmp_path):
    _, whole = tiny_loop(tmp_path / "whole")
    start = weights(whole).clone()
    assert whole.run(log_steps=2)
    _, first = tiny_loop(tmp_path / "parts")
    assert not first.run(minutes=0)
    assert 0 < first.step < 6
    networks, second = tiny_loop(tmp_path / "parts")
    assert second.resume() and second.step == first.step and second.run()
    assert torch.equal(weights(second), weights(whole)) and not torch.equal(weights(whole), start)
    for a, b in zip(second.optimiser.means, whole.optimiser.means):
        assert torch.equal(a, b)
    rows = (tmp_path / "whole" / "unet.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 6]

    before = networks.text.table.embedding.weight.clone()
    used, rows = networks.text.table.used.tolist(), networks.text.table.rows.detach().clone()
    diffusion.whole_embedding(networks)
    after = networks.text.get_input_embeddings().weight
    unused = [i for i in range(50) if i not in used]
    assert torch.equal(after[used], rows) and torch.equal(after[unused], before[unused])


def test_two_processes_train_as_one(tmp_path):
    _, one = tiny_loop(tmp_path / "one", 3)
    one.run()
    with processes(2, train, tmp_path / "two") as team:
        train(tmp_path / "two", team)
    _, two = tiny_loop(tmp_path / "two", 3)
    two.resume()
    assert torch.allclose(weights(one), weights(two), atol=1e-4)


def test_a_checkpoint_is_written_as_it_was_read(tmp_path):
    source = network.Networks.load("demo")
    network.export(source, tmp_path / "again.safetensors")
    first = load_file(pictures.HERE / "fmn-demo.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert (tmp_path / "again.safetensors").stat().st_size < 42e6
    fresh = network.checkpoint(network.Networks.fresh(0))
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in first.items()}


def test_quality_is_the_signal_to_noise_ratio_of_each_style():
    class Dim(nn.Module):
        device = torch.device("cpu")

        def encode(self, pixels):
            return SimpleNamespace(latents=pixels)

        def decode(self, latents):
            return SimpleNamespace(sample=latents - 0.2)

    images = np.full((3, 8, 8, 3), 255, np.uint8)
    found = autoencoder.quality(Dim(), images, [{"style": s} for s in ("a", "b", "b")])
    assert found == pytest.approx({"a": 20, "b": 20})


def test_derived_styles_get_their_share():
    assert autoencoder.odds(ROWS).tolist() == pytest.approx([1 / 3] * 3)
    assert autoencoder.odds(ROWS, 0.5).tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_the_autoencoder_learns_from_scratch(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), np.uint8)
    pictures.save(tmp_path, images, ROWS)
    command = f"autoencoder --from-scratch --data {tmp_path} --out {tmp_path}/model --ae-steps 2"
    program.main([*command.split(), "--ae-batch", "2", "--crop", "16", "--device", "cpu"])
    state = torch.load(tmp_path / "model" / "autoencoder.pt", weights_only=True)
    given = program.parse([*command.split(), "--device", "cpu"])
    networks = program.networks_for(given)
    assert networks.scale == state["scale"] > 0
    assert torch.equal(networks.vae.state_dict()["encoder.layers.0.weight"],
                       state["weights"]["encoder.layers.0.weight"])  # fmt: skip
    fresh = network.Networks.fresh(0).vae.state_dict()["encoder.layers.0.weight"]
    assert not torch.equal(fresh, state["weights"]["encoder.layers.0.weight"])
