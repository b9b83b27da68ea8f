"""Projections off the span of what is kept, for rows of float64 matrices."""

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
