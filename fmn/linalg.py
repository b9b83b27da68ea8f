"""Projections off the span of what is kept, for rows of float64 matrices."""

import math

import torch


def main_directions(rows, count):
    """Orthonormal basis [D, k] of the ``count`` directions in which rows [n, D] are largest.

    Fewer if the rows have fewer.
    """
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    own = int((s > 1e-10 * s[:1]).sum())
    return vh[: min(own, count)].mT


def strong_directions(rows, threshold, span):
    """Orthonormal basis [D, k] of the eigenvectors of mean c c^T with eigenvalue >= threshold.

    Args:
        rows: [n, D]. threshold: what is rounding never counts, also if it is 0.
        span: orthonormal basis [D, q] of a space that holds all rows.
    """
    if not len(rows):
        return span[:, :0]
    inside = rows @ span
    values, vectors = torch.linalg.eigh(inside.mT @ inside / len(rows))
    return span @ vectors[:, values >= max(threshold, 1e-12 * float(values[-1]))]


def extended(basis, vector):
    """An orthonormal basis of the span of a basis [D, q] and a vector [D]."""
    rest = off(off(vector, basis), basis)  # twice: once leaves rounding
    length = rest.norm()
    return torch.cat([basis, (rest / length)[:, None]], 1) if length > 1e-9 else basis


def off(rows, basis):
    """Rows without their part in the basis' span: P c."""
    return rows - rows @ basis @ basis.mT


def weakest_direction(weight):
    """The last right singular vector [in] of a weight [out, in], of the thin decomposition."""
    square = weight @ weight.mT if len(weight) < weight.shape[1] else weight.mT @ weight
    vector = torch.linalg.eigh(square).eigenvectors[:, 0]
    vector = weight.mT @ vector if len(weight) < weight.shape[1] else vector
    return vector / vector.norm()


def centres(rows, count, rounds=50):
    """``count`` k-means centres of rows (Lloyd 1982), begun with rows far from each other."""
    found = rows[:1]
    for _ in range(min(count, len(rows)) - 1):
        found = torch.cat([found, rows[torch.cdist(rows, found).amin(1).argmax()][None]])
    for _ in range(rounds):
        nearest = torch.cdist(rows, found).argmin(1)
        members = torch.nn.functional.one_hot(nearest, len(found)).to(rows)
        # A centre that no row is nearest to stays where it is.
        counts = members.sum(0)[:, None]
        new = torch.where(counts > 0, members.mT @ rows / counts.clamp(min=1), found)
        if torch.equal(new, found):
            break
        found = new
    return found


def truncate(change, rank, oversample=8, rounds=4):
    """Best factors of that rank, by subspace iteration (Halko et al. 2011, algorithm 4.4).

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
    up = basis @ u[:, :rank] * s[:rank].sqrt()
    down = s[:rank].sqrt()[:, None] * vh[:rank]
    norm = matrix.norm()
    error = float((matrix - up @ down).norm() / norm) if norm > 0 else 0.0
    if change.dim() == 4:
        return up[:, :, None, None], down.unflatten(1, change.shape[1:]), error
    return up, down, error


def product_svd(up, down):
    """u, s, vh of up @ down, for [out, k] and [k, in]; the product is made only if k is large."""
    if up.shape[1] >= min(len(up), down.shape[1]):
        return _svd(up @ down)
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(up_core @ down_core.mT, full_matrices=False)
    return up_basis @ u, s, vh @ down_basis.mT


def full_rank(matrix):
    """Factors of a matrix as they are: its shorter side's identity, and itself.

    Scaled by a power of two, which rounds nothing, so that both are of like size: half precision
    has no small numbers.
    """
    out, width = matrix.shape
    size = float(matrix.norm()) / min(out, width) ** 0.5
    scale = 2.0 ** round(math.log2(size) / 2) if size else 1.0
    eye = scale * torch.eye(min(out, width)).to(matrix)
    return (eye, matrix / scale) if out <= width else (matrix / scale, eye)


def _svd(matrix):
    """Its thin one; of the square factor of the longer side's QR, which LAPACK is faster at."""
    if len(matrix) < matrix.shape[1]:
        u, s, vh = _svd(matrix.mT)
        return vh.mT, s, u.mT
    basis, core = torch.linalg.qr(matrix)
    u, s, vh = torch.linalg.svd(core)
    return basis @ u, s, vh


def merge(up, down):
    """The full change up @ down, [out, in] or [out, in, kh, kw], in float32."""
    product = up.flatten(1).float() @ down.flatten(1).float()
    return product.unflatten(1, down.shape[1:]) if down.dim() == 4 else product


def gram(rows):
    """Sum of c c^T over rows [n, D]."""
    return rows.mT @ rows


def exact(tensor):
    """A tensor in float64, where it is; on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def cut(up, down, rank):
    """The best factors of at most that rank for up @ down (Eckart and Young 1936).

    Returns:
        up [out, r], down [r, in], and the sum of squares of up @ down that is lost.
    """
    rank = min(rank, up.shape[0], down.shape[1])
    if up.shape[1] <= rank:
        return up, down, 0.0
    if rank in (up.shape[0], down.shape[1]):
        return *full_rank(up @ down), 0.0
    u, s, vh = product_svd(up, down)
    roots = s[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank], float(s[rank:].square().sum())


def share(lost, whole):
    """The relative error of a cut, of sums of squares."""
    return (lost / whole) ** 0.5 if whole > 0 else 0.0
