"""``AccuracyMatrix``: average accuracy, transfer and forgetting of a run over several tasks.

R[i][j] is the accuracy on task j after training on tasks 0..i in that order (Lopez-Paz and
Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 3.2;
forgetting: Chaudhry et al., "Riemannian Walk for Incremental Learning", arXiv 1801.10112,
section 3.1). T is the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secura_serve.errors import DataError

__all__ = ["AccuracyMatrix"]


@dataclass(frozen=True)
class AccuracyMatrix:
    """The accuracies of one run over T tasks.

    Args:
        tasks: T names, in the order of training.
        rows: T rows of T accuracies; row i is measured after training on task i. Entries above
            the diagonal, tasks not trained yet, are needed for forward transfer alone.
        untrained: T accuracies of the model before any training, for forward transfer.

    Raises:
        DataError: the shapes do not fit.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    untrained: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        t = len(self.tasks)
        widths = [len(row) for row in self.rows]
        if not t or widths != [t] * t or len(self.untrained or self.tasks) != t:
            raise DataError(
                f"an accuracy matrix of {t} tasks needs {t} rows of {t} accuracies, got rows of "
                f"{widths}" + (f" and {len(self.untrained)} untrained" if self.untrained else "")
            )

    @property
    def average_accuracy(self) -> float:
        """ACC = 1/T · Σ_j R[T−1][j]: over all tasks, after the last training."""
        return sum(self.rows[-1]) / len(self.tasks)

    @property
    def backward_transfer(self) -> float | None:
        """BWT = 1/(T−1) · Σ_{j<T−1} (R[T−1][j] − R[j][j]): negative where earlier tasks suffer.

        None for a single task.
        """
        return _mean([self.rows[-1][j] - self.rows[j][j] for j in range(len(self.tasks) - 1)])

    @property
    def forgetting(self) -> float | None:
        """F = 1/(T−1) · Σ_{j<T−1} (max_{j<=i<T−1} R[i][j] − R[T−1][j]): how far each task fell from
        its best; None for a single task.

        Chaudhry et al. take the best over all i < T−1; before task j is trained its accuracy is
        the base's, so that it starts at i = j here, and nothing that was never learned counts.
        """
        last = len(self.tasks) - 1
        return _mean(
            [max(row[j] for row in self.rows[j:last]) - self.rows[-1][j] for j in range(last)]
        )

    @property
    def forward_transfer(self) -> float | None:
        """FWT = 1/(T−1) · Σ_{j>=1} (R[j−1][j] − b[j]), b = ``untrained``: what earlier tasks taught
        about a later one; None without ``untrained`` or for a single task."""
        if self.untrained is None:
            return None
        return _mean([self.rows[j - 1][j] - self.untrained[j] for j in range(1, len(self.tasks))])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
