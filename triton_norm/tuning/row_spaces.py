"""Lists the configs of the LayerNorm and RMSNorm kernels, and plans how programs share rows."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from triton_norm.tuning.configs import Config, Space, config, next_power_of_2, space_of, warps_for
from triton_norm.tuning.limits import MOST_REGISTERS_PER_THREAD, MOST_THREADS, REGISTERS_PER_SM, Gpu
from triton_norm.tuning.memory import remembered


class RowWork(NamedTuple):
    """Describes the rows that a kernel processes.

    Args:
        n_cols: columns of a row.
        types: names of dtypes: x, residual and total in the forward, dy, dtotal and x in the backward, if present.
        stored_bytes: bytes an element of the widest of these types.
        compute_bytes: bytes an element of the compute type.
        output: name of the dtype of y; forward only.
    """

    n_cols: int
    types: tuple[str, ...]
    stored_bytes: int
    compute_bytes: int
    output: str | None = None

    @property
    def width(self) -> int:
        return next_power_of_2(self.n_cols)

    @property
    def key(self) -> str:
        """Returns the key of choices. It names y's type only if that is not x's: older measurements keep their keys."""
        named = f"columns {self.width}, {', '.join(self.types)}"
        return named if self.output in (None, self.types[0]) else f"{named} to {self.output}"


def _shared(width: int, block: int, peers: int) -> dict[str, int]:
    """Returns PIECES and PEERS for a row of `width` columns in pieces of `block`; all are powers of two.

    Each program has one group of rows: STAGES is 0.
    """
    members = min(peers, width // block)
    return {"PIECES": width // block // members, "PEERS": members, "STAGES": 0}


def _cluster_forward(work: RowWork, gpu: Gpu, most_blocks: int) -> list[Config]:
    """Returns the configs of programs that have a whole row in the registers of a cluster's blocks, if one fits.

    The second of them takes one row after another, and loads two rows ahead while the sum of this one is on its way
    between the blocks. Its threads have fewer elements, since weight and bias are in registers too.

    Compiled by Triton 3.9 for sm_90 and sm_100, neither spills, except up to 6 registers of rows that are read by 2 or
    4 bytes, and 5 of 262144 columns and more in a 16-bit type with a bias; no GPU has run them yet.
    """
    limits, row_bytes = gpu.limits, work.width * work.stored_bytes
    blocks = min(most_blocks, max(2, row_bytes // limits.cluster_block_bytes))
    threads = row_bytes // limits.cluster_thread_bytes // blocks
    parts = 2 if len(work.types) == 1 else 1  # twice as much in a thread spilled 11 registers beside a residual
    if work.width < limits.cluster_least_columns or threads > parts * MOST_THREADS:
        return []
    forms = [(min(threads, MOST_THREADS), 0)]
    if work.width <= limits.cluster_prefetched_columns and work.compute_bytes == 4:
        forms.append((work.width // limits.cluster_prefetched_elements // blocks, 3))
    # Without a limit the assembler spilled a register of RMSNorm to fit more warps (8192 columns, sm_100).
    limit = REGISTERS_PER_SM // MOST_THREADS
    whole = {"BLOCK_M": 1, "BLOCK_N": work.width, "PIECES": 1, "PEERS": 1}
    return [
        config(n_threads // gpu.warp, maxnreg=limit, num_ctas=blocks, **whole, STAGES=stages)
        for n_threads, stages in forms
    ]


def _with_clusters(
    cluster: Callable[[RowWork, Gpu, int], list[Config]], work: RowWork, gpu: Gpu, others: list[Config]
) -> list[Config]:
    """Returns the configs of rows that one block can't hold: clusters first, those of more blocks than are portable
    last, and the others between."""
    if gpu.most_blocks == 1:
        return others
    portable = cluster(work, gpu, gpu.most_blocks)
    larger = [] if portable else cluster(work, gpu, 2 * gpu.most_blocks)
    return portable + others + larger


@remembered
def rows_forward(work: RowWork, gpu: Gpu) -> Space:
    """Returns the configs of a forward: several short rows a program, one row in registers, or a long row in spans,
    whose programs exchange moments."""
    width, limits = work.width, gpu.limits
    whole = width * work.stored_bytes <= limits.whole_row_bytes
    if gpu.interpreted:
        most = limits.interpreted_tile_elements
        block = width if whole else most
        configs = [config(4, BLOCK_M=max(1, most // block), BLOCK_N=block, **_shared(width, block, 1))]
    elif whole:
        tiles = sorted({max(width, tile) for tile in (1024, 2048, 4096)}, reverse=True)
        configs = [
            config(warps_for(tile, per_thread, gpu), BLOCK_M=tile // width, BLOCK_N=width, **_shared(width, width, 1))
            for per_thread in ((32, 16) if width <= 8192 else (16, 32))  # else the first would spill
            for tile in tiles
            if tile <= MOST_THREADS * per_thread
        ]
        if gpu.most_blocks > 1:
            configs += _cluster_forward(work, gpu, gpu.most_blocks)
    else:
        piece = limits.forward_piece_bytes // work.compute_bytes
        configs = [
            config(warps_for(block, per_thread, gpu), BLOCK_M=1, BLOCK_N=block, **_shared(width, block, gpu.most_peers))
            for block, per_thread in ((piece // 2, 32), (piece // 4, 32), (piece, 32), (piece // 2, 16))
        ]
        configs = _with_clusters(_cluster_forward, work, gpu, configs)
    return space_of("rows_forward_kernel", work.key, configs)


def rows_forward_programs(config: Mapping[str, Any], n_rows: int, n_cols: int, gpu: Gpu) -> int:
    """Returns the number of programs: as many as run at once, if each takes one group of rows after another."""
    n_groups: int = -(-n_rows // config["BLOCK_M"])
    if config["PEERS"] > 1:
        n_peers: int = -(-n_cols // (config["BLOCK_N"] * config["PIECES"]))
        return n_groups * n_peers
    if config["STAGES"] == 0:
        return n_groups
    per_sm = MOST_THREADS // (config["num_warps"] * gpu.warp)
    at_once: int = gpu.multiprocessors * per_sm // config.get("num_ctas", 1)
    return min(n_groups, at_once)


def _backward_config(elements: int, per_thread: int, gpu: Gpu, **blocks: Any) -> Config:
    """Returns a config that limits registers a thread, so that all programs meant for a multiprocessor fit."""
    n_warps = warps_for(elements, per_thread, gpu)
    registers = REGISTERS_PER_SM // gpu.limits.rows_backward_elements_per_sm * per_thread
    limit = min(registers, REGISTERS_PER_SM // (n_warps * gpu.warp), MOST_REGISTERS_PER_THREAD)
    return config(n_warps, maxnreg=limit if gpu.limits_registers else None, **blocks)


def _whole_rows_backward(width: int, span: int, gpu: Gpu) -> list[Config]:
    """Returns configs of programs with whole rows. More than one stage prefetches the next rows to shared memory."""
    tiles = ((span // 4, 16), (span // 2, 16), (span // 8, 8), (span // 2, 8)) if width < span else ((span, 8),)
    return [
        _backward_config(
            tile,
            per_thread,
            gpu,
            BLOCK_M=tile // width,
            BLOCK_N=width,
            PEERS=1,
            STAGES=stages,
            HOLD_WEIGHT=tile < span,
        )
        for tile, per_thread in tiles
        if tile >= width
        for stages in ((3, 1) if 256 < width < span else (1, 3))
    ]


def _shared_rows_backward(work: RowWork, span: int, gpu: Gpu) -> list[Config]:
    """Returns configs of programs that share each row, and exchange its sums."""
    width = work.width
    narrowest = width // gpu.most_peers
    # Wide blocks need registers for addresses: 16 elements a thread, not stored in a narrower type, spilled 5 to 26
    # registers (sm_90, Triton 3.7.1 to 3.9.0).
    spills = span // 4 < narrowest <= span and work.stored_bytes >= work.compute_bytes
    fewer_threads = ((4, 32),) if spills else ()
    configs = [
        _backward_config(
            block,
            per_thread,
            gpu,
            BLOCK_M=1,
            BLOCK_N=block,
            PEERS=width // block,
            STAGES=1,
            HOLD_WEIGHT=False,
        )
        for registers, per_thread in (*fewer_threads, (4, 16), (4, 8), (2, 16), (2, 8), (1, 8))
        for block in [max(narrowest, span // registers)]
    ]
    if width == 2 * span:  # spills, but is faster in 16-bit types
        configs += [config(32, BLOCK_M=1, BLOCK_N=width, PEERS=1, STAGES=1, HOLD_WEIGHT=False)]
    return configs


def _clusters_backward(work: RowWork, gpu: Gpu, most_blocks: int) -> list[Config]:
    """Returns configs of programs that have whole rows in the registers of a cluster's blocks.

    Threads have 16 elements, or 8: 16 in each of 1024 threads would spill 12 to 30 registers. Two stages load the next
    row while the sums of this one are on their way between the blocks; in 1024 threads they spilled 2 registers of
    float32 (sm_100, Triton 3.9).
    """
    limits = gpu.limits
    blocks = min(most_blocks, max(2, work.width // limits.cluster_backward_elements))
    elements = work.width // blocks
    if work.width < limits.cluster_least_columns:
        return []
    prefetched_threads = MOST_THREADS // (2 if work.stored_bytes > 2 else 1)
    return [
        config(
            elements // per_thread // gpu.warp,
            maxnreg=min(REGISTERS_PER_SM * per_thread // elements, MOST_REGISTERS_PER_THREAD),
            num_ctas=blocks,
            BLOCK_M=1,
            BLOCK_N=work.width,
            PEERS=1,
            STAGES=stages,
            HOLD_WEIGHT=True,
        )
        for per_thread, most_threads in ((16, MOST_THREADS // 2), (8, MOST_THREADS))
        for stages in (1, 2)
        if elements <= most_threads * per_thread
        if stages == 1
        or (work.width <= limits.cluster_prefetched_columns and elements <= prefetched_threads * per_thread)
    ]


@remembered
def rows_backward(work: RowWork, gpu: Gpu) -> Space:
    width, span = work.width, gpu.limits.backward_span_bytes // work.compute_bytes
    if gpu.interpreted:
        n_rows = max(1, gpu.limits.interpreted_tile_elements // width)
        configs = [config(4, BLOCK_M=n_rows, BLOCK_N=width, PEERS=1, STAGES=1, HOLD_WEIGHT=True)]
    elif width <= span:
        configs = _whole_rows_backward(width, span, gpu)
        if gpu.most_blocks > 1:
            configs += _clusters_backward(work, gpu, gpu.most_blocks)
    else:
        configs = _with_clusters(_clusters_backward, work, gpu, _shared_rows_backward(work, span, gpu))
    return space_of("rows_backward_kernel", work.key, configs)


def rows_backward_teams(config: Mapping[str, Any], n_rows: int, n_cols: int, gpu: Gpu) -> int:
    """Returns the number of teams that share the rows, as many as run at once. Each leaves a row of partial sums."""
    n_blocks: int = config.get("num_ctas", 1)
    elements = config["BLOCK_M"] * config["BLOCK_N"] // n_blocks
    per_sm: int = max(1, gpu.limits.rows_backward_elements_per_sm // elements)
    n_peers: int = -(-n_cols // config["BLOCK_N"])
    n_groups: int = -(-n_rows // config["BLOCK_M"])
    return max(1, min(n_groups, gpu.multiprocessors * per_sm // (n_peers * n_blocks)))


def rows_backward_programs(config: Mapping[str, Any], n_rows: int, n_cols: int, gpu: Gpu) -> int:
    n_peers: int = -(-n_cols // config["BLOCK_N"])
    return rows_backward_teams(config, n_rows, n_cols, gpu) * n_peers


@remembered
def rows_backward_finalise(gpu: Gpu) -> Space:
    shapes = ((4, 64, 512),) if gpu.interpreted else ((4, 128, 16), (4, 256, 8), (8, 128, 16), (8, 256, 16))
    configs = [config(n_warps, BLOCK_M=rows, BLOCK_N=columns) for n_warps, rows, columns in shapes]
    return space_of("rows_backward_finalise_kernel", "", configs)
