"""Which transformer blocks are alike, and how much each of them does."""

import numpy as np
from numpy.typing import NDArray

from fedft.core import seeds

Matrix = NDArray[np.float64]


def contiguous_groups(similarity: Matrix, count: int) -> list[list[int]]:
    """``count`` runs of blocks with the largest sum of within-run mean similarity times length.

    Dynamic programming over the last run's beginning, O(L^2 K); ties go to the longer first runs.
    """
    L = len(similarity)
    total = np.zeros((L + 1, L + 1))
    total[1:, 1:] = similarity.cumsum(0).cumsum(1)

    def worth(a: int, b: int) -> float:
        """Of the run [a, b): mean similarity times length."""
        return float(total[b, b] - total[a, b] - total[b, a] + total[a, a]) / (b - a)

    best = np.full((count + 1, L + 1), -np.inf)
    best[0, 0] = 0.0
    begins = np.zeros((count + 1, L + 1), dtype=np.int64)
    for k in range(1, count + 1):
        for b in range(k, L + 1):
            values = [best[k - 1, a] + worth(a, b) for a in range(k - 1, b)]
            found = len(values) - 1 - int(np.argmax(values[::-1]))
            best[k, b], begins[k, b] = values[found], k - 1 + found
    groups: list[list[int]] = []
    end = L
    for k in range(count, 0, -1):
        begin = int(begins[k, end])
        groups.append(list(range(begin, end)))
        end = begin
    return groups[::-1]


def spectral_groups(similarity: Matrix, count: int, restarts: int = 20) -> list[list[int]]:
    """``count`` clusters by the normalised cut, in the order of their first blocks.

    Normalised Laplacian, the ``count`` smallest eigenvectors with rows of length one, k-means++
    from a fixed seed with ``restarts`` restarts. A cluster that runs empty takes the block that is
    farthest from its own centre, so that there are always ``count``.
    """
    scale = 1 / np.sqrt(similarity.sum(1))
    laplacian = np.eye(len(similarity)) - scale[:, None] * similarity * scale
    rows = np.linalg.eigh(laplacian)[1][:, :count]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    generator = seeds.numpy_generator(0, "spectral")
    tries = [_k_means(rows, count, generator) for _ in range(restarts)]
    labels = min(tries, key=lambda found: found[0])[1]
    groups = [np.flatnonzero(labels == k).tolist() for k in range(count)]
    return sorted(groups)


def _k_means(
    rows: Matrix, count: int, generator: np.random.Generator
) -> tuple[float, NDArray[np.int64]]:
    """One run of Lloyd's algorithm from k-means++: the sum of squared distances, and the labels."""
    centres = rows[[int(generator.integers(len(rows)))]]
    while len(centres) < count:
        far = _distances(rows, centres).min(1)
        p = far / far.sum() if far.sum() > 0 else None
        centres = np.vstack([centres, rows[int(generator.choice(len(rows), p=p))]])
    for _ in range(100):
        labels = _filled(_distances(rows, centres), count)
        following = np.stack([rows[labels == k].mean(0) for k in range(count)])
        if np.array_equal(following, centres):
            break
        centres = following
    distances = _distances(rows, centres)
    labels = _filled(distances, count)
    return float(distances[np.arange(len(rows)), labels].sum()), labels


def _distances(rows: Matrix, centres: Matrix) -> Matrix:
    return np.square(rows[:, None] - centres[None]).sum(-1)


def _filled(distances: Matrix, count: int) -> NDArray[np.int64]:
    """The nearest centre of each row, but no centre without any row."""
    labels = distances.argmin(1)
    for k in range(count):
        if not (labels == k).any():
            crowded = np.bincount(labels, minlength=count)[labels] > 1
            own = distances[np.arange(len(labels)), labels]
            labels[int(np.where(crowded, own, -1.0).argmax())] = k
    return labels


def standardised(importance: Matrix) -> Matrix:
    """In standard deviations over all blocks; zero where all are alike."""
    spread = importance.std()
    return (importance - importance.mean()) / spread if spread > 0 else np.zeros_like(importance)
