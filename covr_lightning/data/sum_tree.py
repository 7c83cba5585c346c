"""Rows drawn in proportion to a number of each, and these numbers changed, in logarithmic time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class SumTree:
    """A binary tree of sums over N non-negative numbers, its leaves.

    Node i holds the sum of nodes 2i and 2i + 1; node 1 is the root, the leaves are nodes P … P + N − 1, P the next
    power of two. After a change every sum above is taken anew, so that the whole tree follows from its leaves, bit for
    bit.

    Args:
        size: N.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.depth = max(size - 1, 0).bit_length()
        self._nodes: NDArray[np.float64] = np.zeros(2 << self.depth)

    @property
    def leaves(self) -> NDArray[np.float64]:
        """The numbers (N,); a view, not to be written to."""
        first = 1 << self.depth
        return self._nodes[first : first + self.size]

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self._nodes[1])

    def set(self, index: NDArray[np.int64], value: NDArray[np.float64]) -> None:
        """Change some numbers.

        Args:
            index: Which (M,); of those named twice the last value counts.
            value: Non-negative, (M,).
        """
        node = index + (1 << self.depth)
        self._nodes[node] = value
        for _ in range(self.depth):
            node = np.unique(node >> 1)
            self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]

    def find(self, mass: NDArray[np.float64]) -> NDArray[np.int64]:
        """The leaf i with Σ_{j<i} ≤ mass < Σ_{j≤i}, for each mass (M,) in [0, total); never one that is 0.

        Args:
            mass: Uniform over [0, total), leaves are drawn in proportion to their numbers.
        """
        node, rest = np.ones(len(mass), dtype=np.int64), mass.astype(np.float64)
        for _ in range(self.depth):
            left = self._nodes[2 * node]
            # Rounding may leave a hair more than there is below; what lies right of it is 0 then.
            right = (rest >= left) & (self._nodes[2 * node + 1] > 0)
            rest -= np.where(right, left, 0.0)
            node = 2 * node + right
        return node - (1 << self.depth)
