"""What the judges learn from: pictures changed at random, and pictures of nothing.

Batches are [N, 3, 48, 48] in 0..1, as the judges see them; lengths are in these pixels. All chance
comes from one ``torch.Generator``.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad

from fmn.metrics.demo_judge import SIDE

GREY = torch.tensor([0.299, 0.587, 0.114])


def uniform(random, count, low=0.0, high=1.0):
    """Numbers [count, 1, 1, 1] between ``low`` and ``high``."""
    return torch.rand(count, 1, 1, 1, generator=random) * (high - low) + low


def some(random, count, share):
    """A mask [count, 1, 1, 1] that is true for about ``share`` of a batch."""
    return uniform(random, count) < share


def resized(pictures, side):
    return interpolate(pictures, size=side, mode="bilinear", antialias=True, align_corners=False)


def moved(random, pictures, zoom=(0.7, 1.2), shift=0.1, turn=10.0, warp=0.05, mirror=0.2):
    """Scaled, shifted (share of the side), turned (degrees), bent and at times mirrored."""
    count = len(pictures)
    angle = uniform(random, count, -turn, turn).flatten() * math.pi / 180
    scale = uniform(random, count, *zoom).flatten()
    sign = torch.where(some(random, count, mirror).flatten(), -1.0, 1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    x, y = (uniform(random, count, -2 * shift, 2 * shift).flatten() for _ in range(2))
    rows = torch.stack([cos * sign, -sin, x, sin * sign, cos, y], 1).view(count, 2, 3)
    grid = affine_grid(rows, pictures.shape, align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=random) * uniform(random, count, 0, warp)
    bend = interpolate(bend, size=pictures.shape[-1], mode="bicubic").movedim(1, -1)
    return grid_sample(pictures, grid + bend, padding_mode="border", align_corners=False)


def blurred(pictures, sigma):
    """By a Gaussian of ``sigma`` pixels, one number for all."""
    radius = max(1, round(2.5 * sigma))
    places = torch.arange(-radius, radius + 1).float()
    line = torch.exp(-(places**2) / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, 1, -1)
    wide = pad(pictures, (radius, radius, radius, radius), mode="replicate")
    return conv2d(conv2d(wide, line, groups=3), line.transpose(2, 3), groups=3)


def softened(random, pictures, least=28):
    """Scaled down to between ``least`` and all pixels and up again, in four groups."""
    groups = []
    for part in pictures.chunk(4):
        side = int(torch.randint(least, SIDE + 1, (), generator=random))
        groups.append(interpolate(resized(part, side), size=SIDE, mode="bicubic"))
    return torch.cat(groups).clamp(0, 1)


def blurred_or_sharpened(random, pictures):
    soft = blurred(pictures, float(uniform(random, 1, 0.35, 0.7)))
    amount = uniform(random, len(pictures), -1.0, 0.8) * some(random, len(pictures), 0.6)
    return (pictures + amount * (pictures - soft)).clamp(0, 1)


def recoloured(random, pictures, brightness=0.1, contrast=0.2, saturation=0.25, tint=0.12):
    """Small changes of colour, and a tint of the whole picture, white ground included."""
    count = len(pictures)
    grey = (pictures * GREY.view(1, 3, 1, 1)).sum(1, keepdim=True)
    pictures = grey + (pictures - grey) * uniform(random, count, 1 - saturation, 1 + saturation)
    pictures = (pictures - 0.5) * uniform(random, count, 1 - contrast, 1 + contrast) + 0.5
    pictures = pictures + uniform(random, count, -brightness, brightness)
    colour = 1 - torch.rand(count, 3, 1, 1, generator=random) * tint
    return (pictures * torch.where(some(random, count, 0.5), colour, 1.0)).clamp(0, 1)


def noised(random, pictures, most=0.08):
    """Fine noise, and a slow drift of colour such as a decoder leaves."""
    count = len(pictures)
    fine = torch.randn(pictures.shape, generator=random) * uniform(random, count, 0, most)
    slow = torch.randn(count, 3, 6, 6, generator=random) * uniform(random, count, 0, 0.06)
    slow = interpolate(slow, size=SIDE, mode="bicubic")
    return (pictures + fine * some(random, count, 0.5) + slow).clamp(0, 1)


def as_jpeg(random, pictures, share=0.15):
    pictures = pictures.clone()
    for i in torch.nonzero(some(random, len(pictures), share).flatten()).flatten().tolist():
        array = (pictures[i] * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        quality = int(torch.randint(25, 85, (), generator=random))
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        pictures[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    return pictures


def changed(random, pictures):
    """As a generator might draw them, of any size: all of the above, but recognisable."""
    pictures = recoloured(random, resized(moved(random, pictures), SIDE))
    pictures = blurred_or_sharpened(random, softened(random, pictures))
    return as_jpeg(random, noised(random, pictures))


def estranged(random, pictures):
    """In colours of no style: turned hues, grey, edges only, inverted. The concept stays."""
    count = len(pictures)
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(count)])
    strange = pictures.gather(1, order[:, :, None, None].expand_as(pictures))
    grey = (pictures * GREY.view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(pictures)
    strange = torch.where(some(random, count, 0.5), strange, grey)
    edges = 1 - (4 * (grey - blurred(grey, float(uniform(random, 1, 1, 3)))).abs()).clamp(max=1)
    strange = torch.where(some(random, count, 0.3), edges, strange)
    return torch.where(some(random, count, 0.4), 1 - strange, strange)


def _palette(random, count):
    """Two colours [count, 3, 1, 1] each: often white, blueprint or night as the ground."""
    grounds = torch.tensor([[1.0, 1.0, 1.0], [0.09, 0.26, 0.6], [0.04, 0.02, 0.08]])
    ground = torch.rand(count, 3, generator=random)
    chosen = grounds[torch.randint(0, 3, (count,), generator=random)]
    ground = torch.where(some(random, count, 0.7).view(-1, 1), chosen, ground)
    colour = torch.rand(count, 3, generator=random).view(count, 3, 1, 1)
    return ground.view(count, 3, 1, 1), colour


def noise(random, count, channels=3):
    """Noise of one scale a picture, from 2 cells a side to 32, smooth or in squares."""
    pictures = []
    for _ in range(count):
        cells = 2 ** int(torch.randint(1, 6, (), generator=random))
        mode = ("nearest", "bicubic")[int(torch.randint(0, 2, (), generator=random))]
        field = torch.randn(1, channels, cells, cells, generator=random)
        pictures.append(interpolate(field, size=SIDE, mode=mode))
    return torch.cat(pictures)


def coloured_noise(random, count):
    ground, _ = _palette(random, count)
    return (ground + noise(random, count) * uniform(random, count, 0.0, 0.6)).clamp(0, 1)


def blobs(random, count):
    """Filled areas or lines without a meaning, in two colours, at times in the middle only."""
    ground, colour = _palette(random, count)
    field = noise(random, count, 1)
    width = uniform(random, count, 0.05, 0.4)
    inked = torch.where(some(random, count, 0.5), field > 0.3, field.abs() < width).float()
    axis = torch.linspace(-1, 1, SIDE)
    middle = (axis[:, None] ** 2 + axis**2 < 0.7).float()
    inked = torch.where(some(random, count, 0.6), inked * middle, inked)
    shaded = colour + 0.3 * noise(random, count) * some(random, count, 0.5)
    return (ground + (shaded - ground) * inked).clamp(0, 1)


def stripes(random, count):
    """A sum of three waves a picture, between two colours."""
    ground, colour = _palette(random, count)
    axis = torch.linspace(0, 2 * math.pi, SIDE)
    total = 0
    for _ in range(3):
        x, y = (uniform(random, count, -12, 12) for _ in range(2))
        total = total + torch.sin(x * axis + y * axis[:, None] + uniform(random, count, 0, 6))
    return ground + (colour - ground) * (total / 6 + 0.5)


def shuffled(random, pictures):
    """Squares of 3 or 6 pixels in any order."""
    result = []
    for picture in pictures:
        size = (3, 6)[int(torch.randint(0, 2, (), generator=random))]
        count = SIDE // size
        cells = picture.unfold(1, size, size).unfold(2, size, size).reshape(3, -1, size, size)
        cells = cells[:, torch.randperm(count * count, generator=random)]
        cells = cells.view(3, count, count, size, size).transpose(2, 3)
        result.append(cells.reshape(3, SIDE, SIDE))
    return torch.stack(result)


def blended(random, pictures, count):
    """Means of five pictures each, with their contrast brought back."""
    chosen = torch.randint(0, len(pictures), (count, 5), generator=random)
    mean = moved(random, pictures[chosen.flatten()]).view(count, 5, 3, SIDE, SIDE).mean(1)
    centre = mean.mean((2, 3), keepdim=True)
    return (centre + (mean - centre) * uniform(random, count, 1, 2.5)).clamp(0, 1)


def smeared(random, pictures):
    """Blurred until only a spot is left."""
    return blurred(pictures, float(uniform(random, 1, 4.5, 8)))


def drowned(random, pictures):
    """Under more noise than one can see through."""
    strength = uniform(random, len(pictures), 0.7, 1.2)
    fine = torch.randn(pictures.shape, generator=random)
    return (0.3 * pictures + 0.35 + fine * strength).clamp(0, 1)


def of_nothing(random, pictures, count):
    """``count`` pictures (at least 7) that show nothing, some made out of ``pictures``."""
    one, two, three, *four = ((count + i) // 7 for i in range(7))
    wrecks = shuffled, smeared, drowned
    return torch.cat(
        [
            coloured_noise(random, one),
            blobs(random, two),
            stripes(random, three),
            blended(random, pictures, four[0]),
            *[
                wreck(random, pictures[torch.randint(len(pictures), (size,), generator=random)])
                for wreck, size in zip(wrecks, four[1:])
            ],
        ]
    )
