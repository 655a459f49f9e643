"""The interpreter of Triton runs programs one after the other. A GPU starts and ends them in any order."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime import interpreter


@contextmanager
def shuffled_programs(seed: int) -> Iterator[set[int]]:
    """Run the programs of each launch in an order of its own. Gives the numbers of programs of the launches."""
    builder, found = interpreter.interpreter_builder, set()
    set_index, generator, orders = builder.set_grid_idx, torch.Generator().manual_seed(seed), {}

    def set_another(x: int, y: int, z: int) -> None:
        number = builder.grid_dim[0]
        found.add(number)
        if x == y == z == 0 or number not in orders:
            orders[number] = torch.randperm(number, generator=generator).tolist()
        set_index(orders[number][x], y, z)

    builder.set_grid_idx = set_another
    try:
        yield found
    finally:
        builder.set_grid_idx = set_index
