"""Which cells of a unified KV cache are taken. llama.cpp knows, but has no call that tells; several sequences may hold the same cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CellLedger:
    """Cells by number, each with the count of sequences that hold it. The numbers are ours: where llama.cpp puts a cell does not matter here.

    Args:
        capacity: cells of the cache.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holders: dict[int, int] = {}
        self._n_taken = 0

    @property
    def used(self) -> int:
        """Cells that at least one sequence holds."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Cells that none holds."""
        return self.capacity - len(self._holders)

    def age(self, cell: int) -> int:
        """Cells taken since this one was."""
        return self._n_taken - cell

    def take(self, n: int) -> list[int]:
        """n free cells for one sequence. The caller has looked at `free`."""
        assert n <= self.free, f"{n} cells wanted, {self.free} are free"
        cells = list(range(self._n_taken, self._n_taken + n))
        self._n_taken += n
        self._holders.update(dict.fromkeys(cells, 1))
        return cells

    def share(self, cells: Sequence[int]) -> list[int]:
        """The same cells for one more sequence."""
        for cell in cells:
            self._holders[cell] += 1
        return list(cells)

    def release(self, cells: Iterable[int]) -> None:
        """One sequence gives cells back."""
        for cell in cells:
            self._holders[cell] -= 1
            if not self._holders[cell]:
                del self._holders[cell]
