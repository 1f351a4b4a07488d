"""Which rows of the endless sequence a global batch has, where the first batches have other sizes than the rest."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cuts:
    """Batches cut from the sequence of rows one after another: no row is left out, none read twice.

    Example, ramp ((2, 2), (1, 3)), rows 4: batches 0 1 2 3 4 have rows 0-1, 2-3, 4-6, 7-10, 11-14.

    Attributes:
        rows: of each batch after the ramp.
        ramp: (batches, rows of each) in order; empty: all batches are of one size.
    """

    rows: int
    ramp: tuple[tuple[int, int], ...] = ()

    def size(self, number: int) -> int:
        """Rows of a batch, from 0."""
        for batches, rows in self.ramp:
            if number < batches:
                return rows
            number -= batches
        return self.rows

    def first(self, number: int) -> int:
        """Place of the first row of a batch in the endless sequence."""
        place = 0
        for batches, rows in self.ramp:
            here = min(number, batches)
            place, number = place + here * rows, number - here
        return place + number * self.rows
