"""Light shifts and scalings of pictures, so that a concept is not one fixed picture."""

import torch
from torch.nn import functional as F

CELL = 8


def moved(images, styles, generator):
    """Shift by up to 4 pixels and scale by 0.92 to 1.02; float [N, 3, H, W] in -1..1.

    What comes in at an edge has the colour of the picture's corner. Pixel art moves by whole cells,
    as its cells would fall apart otherwise.
    """
    out = []
    for image, style in zip(images, styles):
        scale, right, down = torch.rand(3, generator=generator).tolist()
        if style == "pixel art":
            cells = int(right * 3) - 1, int(down * 3) - 1
            out.append(_rolled(image, *(cell * CELL for cell in cells)))
        else:
            shift = (2 * right - 1) * 4, (2 * down - 1) * 4
            out.append(_resampled(image, 0.92 + 0.10 * scale, *shift))
    return torch.stack(out)


def _rolled(image, right, down):
    """The icon's margin is wider than a cell, so nothing of it comes in at the other side."""
    return image.roll((down, right), (1, 2))


def _resampled(image, scale, right, down):
    half = image.shape[-1] / 2
    matrix = torch.tensor(
        [[1 / scale, 0, -right / half / scale], [0, 1 / scale, -down / half / scale]]
    )
    grid = F.affine_grid(matrix[None], (1, *image.shape), align_corners=False)
    corner = image[:, :1, :1]
    found = F.grid_sample((image - corner)[None], grid, mode="bicubic", align_corners=False)
    return (found[0] + corner).clamp(-1, 1)


def as_floats(images):
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
