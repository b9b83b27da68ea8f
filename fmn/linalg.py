"""Linear algebra of the closed forms: Gram matrices, spans, and factors of low rank."""

import math

import torch
from torch import Tensor

ROUNDING = 1e-10  # of the largest singular value


def to_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64 where it is, or on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def gram(rows: Tensor) -> Tensor:
    """Sum of c c^T over rows c [n, D]: [D, D]."""
    return rows.mT @ rows


def relative_error(lost: float, total: float) -> float:
    """The relative Frobenius error, of the sums of squares that are lost and in all."""
    return (lost / total) ** 0.5 if total > 0 else 0.0


# Spans of rows


def main_directions(rows: Tensor, count: int) -> Tensor:
    """Orthonormal basis [D, k] of the ``count`` directions in which rows [n, D] are largest.

    Fewer if the rows have fewer.
    """
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    rank = int((s > ROUNDING * s[:1]).sum())
    return vh[: min(rank, count)].mT


def strong_directions(rows: Tensor, threshold: float, span: Tensor) -> Tensor:
    """Orthonormal basis [D, k] of the eigenvectors of mean c c^T with eigenvalue >= threshold.

    Args:
        rows: [n, D].
        threshold: eigenvalues below rounding never count, also if it is 0.
        span: orthonormal basis [D, q] of a space that holds all rows.
    """
    if not len(rows):
        return span[:, :0]
    coordinates = rows @ span
    values, vectors = torch.linalg.eigh(gram(coordinates) / len(rows))
    return span @ vectors[:, values >= max(threshold, 1e-12 * float(values[-1]))]


def extend_basis(basis: Tensor, vector: Tensor) -> Tensor:
    """An orthonormal basis of the span of a basis [D, q] and a vector [D]."""
    rest = orthogonal_part(orthogonal_part(vector, basis), basis)  # once leaves rounding
    length = rest.norm()
    return torch.cat([basis, (rest / length)[:, None]], 1) if length > 1e-9 else basis


def orthogonal_part(rows: Tensor, basis: Tensor) -> Tensor:
    """P c of each row c [n, D], P the projector off the span of an orthonormal basis [D, k]."""
    return rows - rows @ basis @ basis.mT


def weakest_direction(weight: Tensor) -> Tensor:
    """The last right singular vector [in] of a weight [out, in], of the thin decomposition."""
    wide = len(weight) < weight.shape[1]
    vector = torch.linalg.eigh(weight @ weight.mT if wide else gram(weight)).eigenvectors[:, 0]
    vector = weight.mT @ vector if wide else vector
    return vector / vector.norm()


def kmeans_centres(rows: Tensor, count: int, rounds: int = 50) -> Tensor:
    """k-means (Lloyd 1982) of rows [n, D] from starts far apart: ``count`` centres [k, D]."""
    centres = rows[:1]
    for _ in range(min(count, len(rows)) - 1):
        centres = torch.cat([centres, rows[torch.cdist(rows, centres).amin(1).argmax()][None]])
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        members = torch.nn.functional.one_hot(nearest, len(centres)).to(rows)
        # A centre that no row is nearest to stays where it is.
        counts = members.sum(0)[:, None]
        moved = torch.where(counts > 0, members.mT @ rows / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


# Factors up [out, r] and down [r, in] of a change up @ down


def full_change(up: Tensor, down: Tensor) -> Tensor:
    """up @ down, [out, in] or [out, in, kh, kw], in float32."""
    product = up.flatten(1).float() @ down.flatten(1).float()
    return product.unflatten(1, down.shape[1:]) if down.dim() == 4 else product


def balanced_factors(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the first ``rank`` parts of u s vh, with the roots of s in each of the two."""
    roots = s[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank]


def truncate_matrix(
    change: Tensor, rank: int, oversample: int = 8, rounds: int = 4
) -> tuple[Tensor, Tensor, float]:
    """Best factors of a rank, by subspace iteration (Halko et al. 2011, algorithm 4.4).

    Args:
        change: [out, in] or [out, in, kh, kw].

    Returns:
        up [out, r] (or [out, r, 1, 1]), down [r, in] (or [r, in, kh, kw]), and the relative
        Frobenius error ||change - up @ down|| / ||change||.
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], rank + oversample, generator=generator)
    basis = torch.linalg.qr(matrix @ probes.to(matrix)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    up, down = balanced_factors(basis @ u[:, :rank], s, vh, rank)
    norm = matrix.norm()
    error = float((matrix - up @ down).norm() / norm) if norm > 0 else 0.0
    if change.dim() == 4:
        return up[:, :, None, None], down.unflatten(1, change.shape[1:]), error
    return up, down, error


def truncate_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most a rank for up @ down (Eckart and Young 1936).

    Returns:
        up [out, r], down [r, in], and the sum of squares of up @ down that is lost.
    """
    rank = min(rank, up.shape[0], down.shape[1])
    if up.shape[1] <= rank:
        return up, down, 0.0
    if rank in (up.shape[0], down.shape[1]):
        return *identity_factors(up @ down), 0.0
    u, s, vh = product_svd(up, down)
    return *balanced_factors(u, s, vh, rank), float(s[rank:].square().sum())


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, vh of up @ down, for [out, k] and [k, in]; the product is made only if k is large."""
    if up.shape[1] >= min(len(up), down.shape[1]):
        return _thin_svd(up @ down)
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(up_core @ down_core.mT, full_matrices=False)
    return up_basis @ u, s, vh @ down_basis.mT


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the square factor of the longer side's QR, of which LAPACK's SVD is faster."""
    if len(matrix) < matrix.shape[1]:
        u, s, vh = _thin_svd(matrix.mT)
        return vh.mT, s, u.mT
    basis, core = torch.linalg.qr(matrix)
    u, s, vh = torch.linalg.svd(core)
    return basis @ u, s, vh


def identity_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Exact factors of a matrix [out, in]: itself, and the identity of its shorter side.

    Scaled by a power of two, which rounds nothing, so that both are of like size: half precision
    has no small numbers.
    """
    out, width = matrix.shape
    size = float(matrix.norm()) / min(out, width) ** 0.5
    scale = 2.0 ** round(math.log2(size) / 2) if size else 1.0
    eye = scale * torch.eye(min(out, width)).to(matrix)
    return (eye, matrix / scale) if out <= width else (matrix / scale, eye)
