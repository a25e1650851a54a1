"""Lists the configs of the kernels of gated and modulated rows, and plans how programs share the rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from triton_norm.tuning.configs import Config, Space, config, next_power_of_2, space_of, warps_for
from triton_norm.tuning.limits import MOST_REGISTERS_PER_THREAD, MOST_THREADS, REGISTERS_PER_SM, Gpu
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.row_spaces import rows_backward_teams


class ModulatedWork(NamedTuple):
    """Describes the rows that a kernel processes.

    Args:
        n_cols: columns of a row.
        types: names of dtypes: x, residual, gate and y in the forward; dy, dtotal, total, x and gate in the backward;
            those that are not None.
        formula: names the norm, the order of gate and norm, and the tensors that are not None.
        span: most columns that a program has at once; it has longer rows in pieces.
        n_sums: sums over rows that the backward has in registers; 0 in the forward.
        summed: programs share the rows of one modulation.
    """

    n_cols: int
    types: tuple[str, ...]
    formula: str
    span: int
    n_sums: int = 0
    summed: bool = False

    @property
    def width(self) -> int:
        return next_power_of_2(min(self.n_cols, self.span))

    @property
    def is_whole(self) -> bool:
        """Tells whether a program has whole rows."""
        return self.n_cols <= self.span

    @property
    def crowded(self) -> bool:
        """Tells whether a backward has more in registers than x, dy, and two sums or a gate."""
        return self.n_sums > 2 or (self.summed and " gate " in f" {self.formula} ")

    @property
    def packed(self) -> bool:
        """Tells whether a crowded backward has a gate or a bias, too."""
        return self.n_sums > 2 and not {"gate", "bias"}.isdisjoint(self.formula.split())

    @property
    def backward_width(self) -> int:
        """Returns the columns that a program of a backward has; half as many of long rows with much in registers."""
        return self.width if self.is_whole or not self.crowded else self.width // 2

    @property
    def key(self) -> str:
        columns = f"columns {self.width}{'' if self.is_whole else ' at a time'}"
        return f"{columns}, {', '.join(self.types)}, {self.formula}{', summed' if self.summed else ''}"


def most_columns(itemsize: int, gpu: Gpu) -> int:
    """Returns the most columns that a program has at once.

    Args:
        itemsize: bytes of the type that is computed in.
    """
    return gpu.limits.backward_span_bytes // itemsize


@remembered
def modulated_forward(work: ModulatedWork, gpu: Gpu) -> Space:
    """Returns the configs of a forward: several short rows a program, or one."""
    width = work.width
    if gpu.interpreted:
        configs = [config(4, BLOCK_M=max(1, gpu.limits.interpreted_tile_elements // width), BLOCK_N=width)]
    else:
        configs = [
            config(warps_for(tile, per_thread, gpu), BLOCK_M=tile // width, BLOCK_N=width)
            for per_thread in (16, 8)
            for tile in sorted({max(width, tile) for tile in (1024, 2048, 4096)}, reverse=True)
            if tile <= MOST_THREADS * per_thread
        ]
    return space_of("modulated_forward_kernel", work.key, configs)


def _backward_config(work: ModulatedWork, tile: int, per_thread: int, gpu: Gpu) -> Config:
    """Returns a config that limits registers a thread, so that all programs meant for a multiprocessor fit.

    Programs with several rows have addresses and statistics of each: at 8 registers an element they spilled 27 to 132
    of them (bf16, 128 columns, sm_90). A crowded backward spilled 3 to 40 of those that do for the others, and a packed
    one 4 to 6 of those that do for crowded ones (bf16, 1152 columns, sm_80 and sm_100).
    """
    threads, several = warps_for(tile, per_thread, gpu) * gpu.warp, tile > work.backward_width
    registers = REGISTERS_PER_SM // gpu.limits.rows_backward_elements_per_sm * per_thread * (2 if several else 1)
    if work.crowded:
        registers = registers * 3 // 2 if several or work.packed else registers * 9 // 8
    programs = max(1, REGISTERS_PER_SM // (threads * registers))
    limit = min(REGISTERS_PER_SM // (threads * programs) // 8 * 8, MOST_REGISTERS_PER_THREAD)  # allocated by eights
    blocks = {"BLOCK_M": tile // work.backward_width, "BLOCK_N": work.backward_width}
    return config(threads // gpu.warp, maxnreg=limit if gpu.limits_registers else None, **blocks)


@remembered
def modulated_backward(work: ModulatedWork, gpu: Gpu) -> Space:
    """Returns the configs of a backward: few rows a program, or many where few programs share a modulation's rows."""
    width = work.backward_width
    if gpu.interpreted:
        configs = [config(4, BLOCK_M=max(1, gpu.limits.interpreted_tile_elements // width), BLOCK_N=width)]
    else:
        tiles = sorted({max(width, tile) for tile in (1024, 2048, 4096)}, reverse=work.summed and not work.crowded)
        configs = [
            _backward_config(work, tile, per_thread, gpu)
            for tile in tiles
            for per_thread in ((8, 16) if tile > width else (16, 8))
            if tile <= MOST_THREADS * per_thread
        ]
    return space_of("modulated_backward_kernel", work.key, configs)


def modulated_backward_splits(config: Mapping[str, Any], n_members: int, n_cols: int, summed: bool, gpu: Gpu) -> int:
    """Returns the number of programs that share the rows of one modulation, or all rows; of one piece of the columns.

    Programs of one modulation depend on its rows and the GPU alone: the sums of a sample have the same bits in every
    batch. Each has so many rows that writing and reading its sums is at most 5 % of the traffic.

    Args:
        n_members: rows of a modulation, or all rows.
        summed: the gradients of modulations are sums over these rows.
    """
    most = rows_backward_teams(config, n_members, n_cols, gpu)
    if not summed:
        return most
    return max(1, min(most, n_members // gpu.limits.modulated_split_rows))


@remembered
def modulated_row_sums(work: ModulatedWork, gpu: Gpu) -> Space:
    """Returns the configs of the kernel that sums the rows of a backward piece by piece."""
    rows = max(1, gpu.limits.interpreted_tile_elements // work.width) if gpu.interpreted else 1
    configs = [
        config(4 if gpu.interpreted else warps_for(work.width, per_thread, gpu), BLOCK_M=rows, BLOCK_N=work.width)
        for per_thread in (16, 8)
    ]
    return space_of("modulated_row_sums_kernel", work.key, configs)


@remembered
def modulated_backward_finalise(gpu: Gpu) -> Space:
    shapes = ((4, 64, 512),) if gpu.interpreted else ((4, 16, 32), (4, 128, 16), (4, 16, 64), (8, 128, 16))
    configs = [config(n_warps, BLOCK_M=rows, BLOCK_N=columns) for n_warps, rows, columns in shapes]
    return space_of("modulated_backward_finalise_kernel", "", configs)
