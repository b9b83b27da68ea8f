"""The demo model's autoencoder: training it, and the latents of all pictures."""

import torch
from torch.nn import functional as F

from demo.moving import as_floats, moved
from demo.optim import Optimiser

PATCH = 8


def training_rows(rows):
    return [row for row in rows if not row["holdout"]]


def odds(rows, derived=None):
    """Chances of the rows [N]; ``derived``: what the derived styles have together, if not even."""
    is_derived = torch.tensor([float(row["derived"]) for row in rows])
    derived = is_derived.mean().item() if derived is None else derived
    others = 1 - is_derived
    share = derived * is_derived / is_derived.sum().clamp(min=1)
    return share + (1 - derived) * others / others.sum().clamp(min=1)


def colour_targets(pixels):
    """Mean luma and two opponent colours of each 8 x 8 patch: [N, 3, H, W] to [N, 3, h, w]."""
    red, green, blue = F.avg_pool2d(pixels, PATCH).unbind(1)
    luma = 0.3 * red + 0.6 * green + 0.1 * blue
    return torch.stack([luma, red - green, blue - (red + green) / 2], 1)


def autoencoder_loss(vae, pixels, prior=0.1, frozen_encoder=False):
    """Error of the picture, and a pull of latents 0 to 2 to the patch's colours.

    Without the pull, hues that are rare in the data went missing.
    """
    with torch.set_grad_enabled(not frozen_encoder):
        latents = vae.encode(pixels).latents
    error = vae.decode(latents).sample - pixels
    loss = error.abs().mean() + error.square().mean()
    if frozen_encoder:
        return loss
    return loss + prior * (latents[:, :3] - colour_targets(pixels)).square().mean()


def autoencoder_parts(vae, images, rows, given):
    """(optimiser, loss function) of the stage; ``given`` as parsed by train.py."""
    rows = training_rows(rows)
    pixels, weights = as_floats(images), odds(rows, given.derived)
    vae.train().to(memory_format=torch.channels_last)
    if given.decoder_only:
        vae.encoder.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimiser = Optimiser([], parameters, 0.0, given.ae_lr, ema=0.995)

    def loss_of(generator):
        chosen = torch.multinomial(weights, given.ae_batch, True, generator=generator).tolist()
        index = [rows[i]["index"] for i in chosen]
        batch = moved(pixels[index], [rows[i]["style"] for i in chosen], generator)
        batch = _crops(batch, given.crop, generator).to(given.device)
        return autoencoder_loss(vae, batch, frozen_encoder=given.decoder_only)

    return optimiser, loss_of


def _crops(batch, side, generator):
    """A square part of each picture, at a place of its own."""
    places = torch.randint(batch.shape[-1] - side + 1, (len(batch), 2), generator=generator)
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(batch, places.tolist())]
    )


@torch.no_grad()
def encode_all(vae, images, rows, variants, seed, batch=16):
    """Unscaled latents [variants, N, 4, h, w] of all pictures, moved a little in all but the first.

    They are float16, as is the checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    vae.eval().to(memory_format=torch.channels_last)
    pixels, styles = as_floats(images), [row["style"] for row in rows]
    found = []
    for variant in range(variants):
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            shown = pixels[part]
            if variant:
                shown = moved(shown, styles[part], generator)
            found.append(vae.encode(shown.to(vae.device)).latents.half().cpu())
        print(f"latents: {variant + 1} of {variants}", flush=True)
    found = torch.cat(found)
    return found.view(variants, len(rows), *found.shape[1:])


@torch.no_grad()
def quality(vae, images, rows, batch=16):
    """Mean peak signal-to-noise ratio in decibels of each style's pictures, by style."""
    vae.eval().to(memory_format=torch.channels_last)
    pixels, found = as_floats(images), []
    for part in pixels.split(batch):
        part = part.to(vae.device)
        error = (vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) - part) / 2
        found.append(-10 * error.square().mean((1, 2, 3)).log10().cpu())
    values = torch.cat(found).tolist()
    by_style = {row["style"]: [] for row in rows}
    for row, value in zip(rows, values):
        by_style[row["style"]].append(value)
    return {style: sum(values) / len(values) for style, values in by_style.items()}
