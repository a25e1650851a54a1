"""Kernels made wrong in one place each, by replacing a piece of their source that occurs there once."""

import inspect
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import triton

from support.cluster_mutants import CLUSTERS


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a function of kernels/; `check`, of test_mutants.py, then fails as `caught` says there."""

    module: str
    function: str
    check: str
    caught: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.function}: {old} -> {new}"

    @property
    def target(self) -> Any:
        return getattr(import_module(f"triton_norm.kernels.{self.module}"), self.function)

    def source(self) -> str:
        source = inspect.getsource(self.target.fn)
        result = source.count(self.old)
        assert result == 1, f"{self.module}.{self.function} has {self.old!r} {result} times: write this mutant anew"
        return source.replace(self.old, self.new)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """The kernel's function itself is another one: whoever has imported it calls the mutant."""
    target, source = mutant.target, mutant.source()
    file = f"<mutant of {mutant.module}.{mutant.function}>"
    scope = dict(target.fn.__globals__)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # the interpreter looks there
    try:
        exec(compile(source, file, "exec"), scope)
        broken = scope[mutant.function]
        assert type(broken) is type(target) is not triton.JITFunction
        with mock.patch.dict(vars(target), vars(broken)):
            yield
    finally:
        del linecache.cache[file]


def _read(table: str) -> list[Mutant]:
    """Below a line "module.function", lines "check | caught | old -> new", of which a long one is continued at ->."""
    result, where = [], ""
    for line in table.strip().replace("\n        ->", " ->").split("\n"):
        if not line.startswith(" "):
            where = line
            continue
        check, caught, edit = line.strip().split(" | ", 2)
        old, new = (text.strip().replace("\\n", "\n") for text in edit.split("->"))
        result.append(Mutant(*where.split("."), check, caught, old, new))
    return result


ROWS = _read(r"""
rows.forward_of_group
    short rows | bounds | row_mask = rows < n_rows -> row_mask = rows <= n_rows
    short rows | bounds | mask = row_mask & (cols < n_cols)\n    x =
        -> mask = row_mask & (cols <= n_cols)\n    x =
    far rows | overflow | group.to(tl.int64) * BLOCK_M -> group * BLOCK_M
    large eps | value | tl.rsqrt(moments.m2 / to_float(n_cols, COMPUTE) + NORM.EPS)
        -> tl.rsqrt(moments.m2 / to_float(n_cols, COMPUTE)) + NORM.EPS
    long rows | value | to_float(start - begin, COMPUTE) -> to_float(start - begin - BLOCK_N, COMPUTE)
    long rows | value | tl.minimum(end - start, BLOCK_N) -> BLOCK_N
    long rows, no mean | value | moments.m2 + of_piece.m2 -> of_piece.m2
    long rows | unwritten | range(BLOCK_N, last - begin + 1, BLOCK_N) -> range(BLOCK_N, last - begin, BLOCK_N)
    long sums | barrier | tl.debug_barrier() -> pass
    short rows | unwritten | tl.store(tensors.statistics + rows, moments.mean, mask=row_mask) -> pass
    short rows | value | rstd, mask=row_mask) -> rstd.to(tl.bfloat16), mask=row_mask)
    shared rows | race | tl.where(peer == 0, n_rows, 0) -> n_rows
rows.rows_forward_kernel
    rows in turn | unwritten | tl.num_programs(0), num_stages -> tl.num_programs(0) + 1, num_stages
    rows in turn | unwritten | tl.cdiv(n_rows, BLOCK_M) -> (tl.cdiv(n_rows, BLOCK_M) - 1)
    rows in turn | race | tl.range(tl.program_id(0), -> tl.range(0,
    rows in turn | bounds | weight_ptr + cols, mask=cols < n_cols -> weight_ptr + cols, mask=cols <= n_cols
    rows in turn | value | weight = tl.load(weight_ptr + cols -> weight = tl.load(bias_ptr + cols
rows.exchange_moments
    shared rows | value | tl.minimum(n_cols - members * SPAN, SPAN) -> SPAN
    shared rows | bounds | there = members < n_peers -> there = members <= n_peers
    shared rows | race | team.index.to(tl.int64) * n_peers * KINDS -> team.index.to(tl.int64) * n_peers
    shared rows | race | meet(team.sync_ptr, team.index, n_peers) -> meet(team.sync_ptr, team.index, n_peers - 1)
rows.load_summed
    short rows | unwritten | mask=mask, other=0.0, eviction_policy=EVICTION -> mask=mask, eviction_policy=EVICTION
    long sums | different | .to(total_rows.dtype.element_ty) ->
rows.load_columns
    weight offset | value | columns += OFFSET -> columns += 0.0
rows.centred_on
    off-centre long rows | off-centre | (centred - moments.mean) - moments.mean_lo -> centred - moments.mean
rows.rounded
    rounded x_hat | different | x_hat.to(ROUNDED).to(x_hat.dtype) -> x_hat
rows_backward.rows_backward_kernel
    short rows | value | dweight += dyx -> dweight = dyx
    short rows | unwritten | tile_sum(dweight, 0), mask=col_mask)
        -> tile_sum(dweight, 0), mask=col_mask & (team_index + 0 * cols < n_teams - 1))
    short rows | race | dbias_sums_ptr + team_index.to(tl.int64) * n_cols + cols -> dbias_sums_ptr + cols
    short rows | unwritten | step = n_teams.to(tl.int64) * BLOCK_M -> step = (n_teams + 1).to(tl.int64) * BLOCK_M
    short rows | value | dx -= sums.wdy * inverse_total -> pass
    long sums | different | dx += load_gradient( -> load_gradient(
    shared rows | unwritten | end += step -> end += 0
    shared rows | bounds | (rows < n_rows) & col_mask -> row_mask & col_mask
    shared rows | value | last = these -> last = Waiting(these.rows, these.dy, x, these.mean, these.rstd)
    shared rows | value | x_hat if KEEPS_X_HAT else x -> x
    shared half rows | value | last = these -> last = Waiting(these.rows, these.dy, these.x, mean, these.rstd)
    shared rows | value | rows, dy, x, mean, rstd = last -> rows, dy, x, mean, _ = last
    shared rows | deadlock | turn += 1 -> turn += 2
rows.row_offsets
    far rows | overflow | rows * strides.inner * V -> rows.to(tl.int32) * strides.inner * V
    rows along axes | bounds | (rows - rest * axes.n_inner) * -> rows *
    rows along axes | bounds | (rest - outer * axes.n_middle) * -> rest *
    rows along axes | bounds | outer * strides.outer -> outer * strides.middle
rows_backward.load_gradient
    expanded rows | bounds | cols * 0 -> cols
rows_backward.normalized
    short rows | value | x_hat - mean -> x_hat
rows_backward.weighted
    weight offset | value | dy *= weight + OFFSET -> dy *= weight
rows_backward.slots_of
    shared rows | race | turn % TURNS -> 0
rows_backward.publish
    shared rows | race | 2 * team.index + turn % 2 -> 2 * team.index
rows_backward.collect
    shared rows | race | (turn + 1) // 2 * n_peers -> turn // 2 * n_peers
    shared rows | value | here = in_group == row -> here = in_group >= 0
rows_backward.rows_backward_finalise_kernel
    short rows | bounds | column_mask = cols < n_cols -> column_mask = cols <= n_cols
    short rows | value | (rows < n_sums) & column_mask -> (rows < n_sums - 1) & column_mask
""")

BOTH = _read(r"""
moments.divide
    off-centre rows | off-centre | tl.fma(tl.fma(-quotient, b, a), inverse, quotient) -> quotient
moments.centre
    off-centre rows | off-centre | return tl.where(mask, centred - correction, 0.0), mean, -> return centred, mean,
    off-centre long rows | off-centre | (first - mean) + correction -> first * 0.0
moments.moments_of
    off-centre sums | value | tile_sum(centred * centred, AXIS) -> tile_sum(x * x, AXIS) - count * mean * mean
    off-centre flat | off-centre | tile_sum(centred * centred, AXIS) -> tile_sum(x * x, AXIS) - count * mean * mean
moments.scaled_from
    off-centre last, two launches | off-centre | x * 0.25 - shift * 0.25 -> x * 0.25 - shift * 0.0
moments.take_in
    last, two launches | value | delta * (values - mean) -> delta * delta
    last, two launches | value | tl.where(mask, values - mean, 0.0) -> values - mean
moments.merge_places
    last, two launches | value | 16.0 * m2 -> 4.0 * m2
    off-centre last, two launches | off-centre | (shift - (moved - taken)) + (step - taken) -> step * 0.0
    last, two launches | value | 4.0 * (first + correction) -> 4.0 * correction
    last, two launches | value | m2 + delta * (delta * counts) -> m2 + delta * delta * 0.0
moments.merge
    long rows | value | delta * (delta * (count_a * fraction)) -> delta * (delta * (count_b * fraction))
    off-centre flat | off-centre | mean_lo = ((a.mean - mean) + step) + (a.mean_lo + -> mean_lo = (a.mean_lo +
moments.merge_all
    last | value | sets.m2 + delta * (delta * counts) -> sets.m2 + delta * delta
    off-centre flat | off-centre | (sets.mean - base) + sets.mean_lo -> sets.mean - base
exchange.take_place
    flat | race | tl.atomic_add(sync_ptr, 1, -> tl.atomic_add(sync_ptr, 0,
exchange.arrive
    flat | barrier | tl.debug_barrier() -> pass
    flat | race | acq_rel -> relaxed
    last, two launches | race | acq_rel -> acquire
    folded, two launches | race | acq_rel -> release
exchange.wait
    shared rows | race | acquire -> relaxed
    flat | race | < arrivals -> < arrivals - 1
    flat | deadlock | < arrivals -> <= arrivals
exchange.close
    running statistics | count | tl.load(count_ptr) + 1 -> tl.load(count_ptr)
    running statistics | zeros | tl.store(sync_ptr + 2 + team, 0) -> pass
    running statistics | zeros | tl.store(sync_ptr, 0) -> pass
    running statistics, two launches | zeros | == n_teams - 1 -> == n_teams
""")

CHANNELS = _read(r"""
tiles.span
    flat | bounds | tl.minimum(first + groups_per_split, n_groups) -> (first + groups_per_split)
tiles.lanes_of
    last | bounds | n_column_vecs * TILE.V // layout.columns_per_channel
        -> n_column_vecs * TILE.V // layout.columns_per_channel + 1
    last | bounds | in_range = columns < layout -> in_range = columns <= layout
tiles.channels_of
    folded | bounds | (index < lanes.n_channels) -> (index <= lanes.n_channels)
tiles.group_offsets
    far samples | overflow | (first_sample + group // layout.groups_per_sample).to(tl.int64)
        -> first_sample + group // layout.groups_per_sample
tiles.view_of
    far channels | overflow | channels.index.to(tl.int64) * strides.channel * TILE.V
        -> channels.index * strides.channel * TILE.V
tiles.by_channel
    folded | value | column < columns_per_channel, gathered -> column <= columns_per_channel, gathered
tiles.fold_moments
    folded | value | < columns_per_channel, count, 0.0) -> < columns_per_channel, count, count)
tiles.load_statistics
    evaluation | value | .to(COMPUTE) + EPS) -> .to(COMPUTE)) + EPS
channels.merge_splits
    last | value | tl.minimum(total - splits * split_size, split_size) -> (splits * 0 + split_size)
channels.move_running
    running statistics | moved | (1.0 - factor) * running -> (1.0 - factor) * (1.0 - factor) * running
channels.factor_of
    cumulative statistics | moved | tl.load(num_batches_tracked_ptr) + 1 -> tl.load(num_batches_tracked_ptr) + 2
    cumulative clusters | moved | tl.load(num_batches_tracked_ptr) + 1 -> tl.load(num_batches_tracked_ptr) + 2
    fp64 statistics | moved | to_float(momentum_rest, COMPUTE) -> 0.0
channels.finalise_statistics
    flat | value | moments.m2.dtype) + EPS) -> moments.m2.dtype)) + EPS
channels.channels_forward_kernel
    running statistics, two launches | moved | to_float(total - 1, COMPUTE) -> to_float(total, COMPUTE)
    folded, two launches | value | to_float(start - first, COMPUTE) -> to_float(start - first + T, COMPUTE)
    last, two launches | value | T / (seen + T) -> T / (seen + T + T)
    flat | value | to_float(tl.minimum(end - start, T), COMPUTE) -> to_float(T, COMPUTE)
    last, two launches | value | tl.maximum(end - first - tl.arange(0, T)[:, None], 0) -> end - first
    flat | race | split.to(tl.int64) * channels.n_channels + channels -> channels
    flat | unwritten | slots + 2 * kind, moments.m2 -> slots + kind, moments.m2
    last, two launches | race | arrive(sync_ptr, block) == n_splits - 1 -> arrive(sync_ptr, block) == n_splits - 2
    running statistics, two launches | barrier | tl.debug_barrier() -> pass
    flat | race | wait(sync_ptr, block, n_splits + 1) -> wait(sync_ptr, block, n_splits)
    last | unwritten | else end - first, T) -> else end - first - T, T)
    whole tiles | unwritten | (end - 1 - first) // T * T -> (end - first) // T * T
    folded | value | if not TOGETHER or swept > 0 -> if not TOGETHER
    off-centre flat | off-centre | (raw.to(COMPUTE) - mean) - mean_lo -> raw.to(COMPUTE) - mean
channels_backward.channels_backward_kernel
    last | value | channel_sum(dz * centred, -> channel_sum(dz * raw_x.to(COMPUTE),
    last, two launches | value | tile_sum(sum_dz_centred, AXIS) -> tile_sum(sum_dz, AXIS)
    flat | value | if sweep == 0 or swept > 0 -> if sweep == 0
    folded | race | wait(sync_ptr, block, n_splits + 1) -> wait(sync_ptr, block, n_splits)
    last, two launches | value | dx *= scale -> dx *= rstd
    flat, relu of a sum | value | dresidual = dz.to -> dresidual = raw_dy.to
    off-centre flat | off-centre | (raw_x.to(COMPUTE) - mean) - mean_lo -> raw_x.to(COMPUTE) - mean
    whole tiles | unwritten | (end - 1 - first) // T * T -> (end - first) // T * T
    groups apart | different | (dz * weight - mean_dz -> (dz - mean_dz
    groups apart | different | centred * slope) * rstd -> centred * slope)
    groups apart, last | race | offsets += instance_offset( -> offsets += 0 * instance_offset(
    groups of rows | different | sum_dz *= weight -> sum_dz *= 1.0
    groups of rows | different | sum_dz_centred *= weight -> sum_dz_centred *= 1.0
    groups of rows | different | sum_dz_centred * rstd, row -> sum_dz_centred, row
    shared rows of groups | race | instance.to(tl.int64) * n_splits + split -> instance.to(tl.int64) * n_splits
channels_backward.store_columns
    groups of rows | race | row * columns.n_channels + -> 0 * row +
tiles.instance_offset
    groups apart | race | instance.to(tl.int64) * instance_vecs -> 0 * instance_vecs
tiles.parameters_of
    shared groups | different | run // parameter_runs -> 0 * run
    shared groups | different | index = group * -> index = 0 * group *
    shared groups, last | bounds | within % layout.groups_per_sample -> within
tiles.of_instance
    groups apart | bounds | index // PER_STATISTIC -> index
    instances apart | race | channels.index + instance * channels.n_channels -> channels.index
groups.elements_of
    groups | bounds | exists = group < n_groups -> exists = group < n_groups + 1
    groups | bounds | (vec < n_rows * row_size) -> (vec <= n_rows * row_size)
    groups of rows | different | row = vec // row_size -> row = 0 * vec
    odd channels | different | (place - start * V) -> (0 * place)
groups.pointers_to
    groups | different | elements.sample.to(tl.int64) * sample_vecs -> elements.sample.to(tl.int64) * 0
    groups of rows | different | elements.row.to(tl.int64) * position_vecs -> elements.row.to(tl.int64) * 0
groups.channels_in
    groups | different | index = elements.within * -> index = 0 * elements.within *
    groups | different | run // parameter_runs -> 0 * run
groups.groups_forward_kernel
    groups | different | to_float(total, COMPUTE) -> to_float(total + 1, COMPUTE)
    groups of rows | different | y_row_vecs * n_rows -> y_row_vecs
groups.move_by_samples_kernel
    instances | different | (samples < n_samples) & -> (samples < n_samples - 1) &
    instances | different | - first + tl.load( -> + tl.load(
    instances | different | to_float(n_positions - 1, COMPUTE) -> to_float(n_positions, COMPUTE)
groups_backward.rows_of
    groups | bounds | (group < n_groups) & -> (group < n_groups + 1) &
    shared groups | race | member // n_chunks * R + row % R -> row % R
    groups of clusters | different | group = block + tl.zeros -> group = 0 * block + tl.zeros
    parts of channels | race | chunk * W + -> 0 * chunk +
    parts of channels | race | sample * n_chunks + chunk -> sample * n_chunks
    parts of channels | different | exists & (vec < channel_size) -> exists & (vec < channel_size - 1)
groups_backward.pointers_to
    groups | different | rows.sample.to(tl.int64) * sample_vecs -> rows.sample.to(tl.int64) * 0
windows.in_window
    odd channels | different | (place >= first) & -> (place >= 0) &
    odd channels | different | (place < end) -> (place < end - 1)
windows.store_window
    shared groups | race | (vec * V >= first) & -> (vec >= 0) &
    shared groups | race | (vec * V + V <= end) -> (vec * V < end)
    odd channels | different | & (is_whole == 0) -> & (is_whole == 2)
groups_backward.load_gradient
    groups, expanded | different | rows.index.to(tl.int64) * channel_stride -> rows.index.to(tl.int64) * 0
    groups, expanded | different | tl.where(rows.in_range, of_channels, 0.0) -> tl.where(rows.exists, of_channels, 0.0)
groups_backward.by_group
    groups of clusters | different | total = tl.sum(values, 0, keep_dims=True) -> total = values
groups_backward.sum_members
    shared groups | different | mask=member < n_members -> mask=member < n_members - 1
groups_backward.groups_fused_backward_kernel
    groups | different | slots = rows.row.to(tl.int64) * n_channels + -> slots = 0 * rows.row.to(tl.int64) +
    groups | different | sum_dz_centred * rstd, -> sum_dz_centred,
    groups | different | by_group(sum_dz * weight, M, -> by_group(sum_dz, M,
    groups | different | by_group(sum_dz_centred * weight, M, -> by_group(sum_dz_centred, M,
    groups | different | rstd * rstd -> rstd
    shared groups | race | wait(sync_ptr, block, n_members) -> wait(sync_ptr, block, n_members - 1)
    shared groups | race | own = team + member.to(tl.int64) * n_groups -> own = team
groups_backward.sum_group
    groups apart | different | value *= tl.load(weight_ptr -> value += 0 * tl.load(weight_ptr
groups_backward.add_rows
    groups | different | total += tl.load( -> total = tl.load(
groups_backward.groups_backward_kernel
    groups apart | different | slope * tl.load( -> slope + 0 * tl.load(
    groups apart | different | program % (n_channels // PER_GROUP) * PER_GROUP -> 0
channels_backward.merge_sums
    flat | value | (splits < n_splits) & -> (splits < n_splits - 1) &
channels_backward.finalise_sums
    folded | value | dweight * fraction * rstd -> dweight * fraction
activations.bytes_of
    bits, last | bounds | (column < layout -> (column <= layout
    flat, relu of a sum | race | block.to(tl.int64) * per_channel + first -> first
    bits, last | bits | + column // PER_BYTE -> + (column // PER_BYTE + 1) % per_row
activations.pack
    flat, relu of a sum | value | tl.arange(0, PER_BYTE) -> (tl.arange(0, PER_BYTE) + 1)
activations.unpack
    last, leaky_relu of a sum | value | tl.arange(0, PER_BYTE) -> (PER_BYTE - 1 - tl.arange(0, PER_BYTE))
activations.activate
    flat, relu of a sum | value | tl.where(z < 0.0, 0.0, z) -> tl.where(z < 1.0, 0.0, z)
    kinks, relu6 | different | tl.where(z > 6.0, 6.0, z) -> z
    kinks, hardswish | different | tl.maximum(z + 3.0, 0.0) -> (z + 3.0)
    flat, gelu | value | z * distribution -> tl.abs(z) * distribution
    flat, gelu_tanh | value | z * sigmoid -> z
activations.activate_backward
    flat, silu | value | 1.0 + z * (1.0 - sigmoid) -> 1.0 + z * sigmoid
    flat, gelu | value | power * DENSITY_AT_ZERO -> power
    flat, gelu_tanh | value | 3.0 * TANH_CUBIC -> TANH_CUBIC
    far gelu_tanh | different | tl.minimum(z * z, 1e30) -> z * z
    kinks, hardswish | different | z <= -3.0 -> z < -3.0
    kinks, hardswish | different | z < 3.0 -> z <= 3.0
activations.mask_of
    kinks, relu6 of a sum | different | passing = (passing & (z < 6.0)) | (z != z) -> passing = passing | (z != z)
activations.gradient_by_mask
    flat, relu of a sum | value | tl.where(passing, dy, 0.0) -> dy
    last, leaky_relu of a sum | value | dy * SLOPE -> dy
exponentials.exp
    far silu | different | tl.fma(x, LOG2_E, -t) + x * LOG2_E_LO -> x * 0.0
exponentials.exp_of_sum
    far gelu | different | tl.fma(x, LOG2_E, -t) + (x * LOG2_E_LO -> (x * 0.0
    far gelu_tanh | different | x_lo * LOG2_E -> x_lo
exponentials.polynomial
    flat, gelu | value | (2, length_of(COEFFICIENTS)) -> (3, length_of(COEFFICIENTS))
exponentials.normal
    far gelu | different | tl.fma(a, a, -square) -> 0.0 * a
    far gelu | different | tl.minimum(tl.abs(z), FARTHEST) -> tl.abs(z)
    flat, gelu | value | tl.where(z < 0.0, tail, 1.0 - tail) -> 1.0 - tail
exponentials.tanh_sigmoids
    far gelu_tanh | different | tl.fma(a, p, -x) + a * p_lo -> tl.fma(a, p, -x)
    far gelu_tanh | different | square * TANH_CUBIC_LO + -> 0.0 * square +
    flat, gelu_tanh | value | (z < 0.0, larger, smaller) -> (z < 0.0, smaller, larger)
ranks.first_and_total
    shares of a batch | different | mask=ranks < n_ranks, other=0.0) -> mask=ranks < n_ranks)
ranks.shares_of
    shares of a batch | bounds | (counts > 0.0) & -> (counts > -1.0) &
ranks.merge_ranks_kernel
    shares of a batch | different | delta * (delta * counts) -> delta * delta
    shares of a batch | moved | tl.maximum(total - 1.0, 1.0) -> divisor
    shares of a batch | different | delta += tl.load(slots + n_channels, mask=there, other=0.0)\n -> delta += 0.0\n
    shares of a batch | different | mask=there, other=0.0) - mean_lo -> mask=there, other=0.0)
    shares of a batch | race | tl.zeros([1, 1], tl.int32) + block -> tl.zeros([1, 1], tl.int32)
    shares of a batch | barrier | tl.debug_barrier() -> pass
""")

MODULATED = _read(r"""
modulated.sigmoid_of
    gated rows | value | exp(-z) -> exp(z)
modulated.gate_of
    gated rows | value | gate = z * sigmoid -> gate = sigmoid
modulated.gate_backward
    gated rows | value | 1.0 + z * (1.0 - sigmoid) -> 1.0 + z * sigmoid
    gated rows, sigmoid | value | dgate *= sigmoid * (1.0 - sigmoid) -> dgate *= sigmoid
modulated.load_total
    modulated rows | value | wide *= load_modulation( -> wide += load_modulation(
    modulated rows, rounded total | value | total = wide.to(total_rows.dtype.scalar.element_ty) -> total = wide
modulated.gated_first
    gated rows, gate first | value | v *= gate_of -> v += gate_of
modulated.modulate
    modulated rows | value | y.dtype) + SCALE_OFFSET -> y.dtype)
    modulated rows | value | y += load_modulation( -> y *= load_modulation(
modulated.gated_last
    gated rows, gate first | value | and not GATE_FIRST ->
    rounded product | different | rounded(y, PRODUCT) -> y
modulated.modulated_forward_kernel
    modulated rows | value | numbers * scale_vecs * V -> numbers * 0
    gated rows | bounds | row_mask = rows < n_rows -> row_mask = rows <= n_rows
    modulated rows | unwritten | tl.store(statistics_ptr + rows, moments.mean, mask=row_mask) -> pass
    modulated rows | value | rows // n_tokens % n_modulations -> rows % n_modulations
    weights of heads | bounds | rows // n_tokens % n_modulations -> rows // n_tokens
    far modulations | overflow | rows = tl.program_id(0).to(tl.int64) * BLOCK_M -> rows = tl.program_id(0) * BLOCK_M
    long modulated rows | value | merge(to_float(start -> merge(to_float(start * 0
    long gated rows | value | moments.m2 + of_piece.m2 -> of_piece.m2
    long modulated rows | unwritten | range(0, last + 1, BLOCK_N) -> range(BLOCK_N, last + 1, BLOCK_N)
modulated_backward.load_row_sums
    long modulated rows | value | ptr + n_rows + rows -> ptr + rows
modulated_backward.modulated_row_sums_kernel
    long gated rows | bounds | row_mask = rows < n_rows -> row_mask = rows <= n_rows
    long modulated rows | value | wdy_sums += wdy -> wdy_sums = wdy
    long modulated rows | value | wdy_x_hat_sums += -> wdy_x_hat_sums =
    long modulated rows | value | wdy *= gate -> pass
    long modulated rows, gate first | value | v *= gate -> pass
    long modulated rows | value | V, COMPUTE) + SCALE_OFFSET -> V, COMPUTE)
modulated_backward.modulated_backward_kernel
    long modulated rows | race | program % n_pieces * BLOCK_N -> program * 0
    long modulated rows | race | program = program // n_pieces -> program = program * 0
    modulated rows | value | numbers = modulation\n -> numbers = 0 * modulation\n
    modulated rows | race | split = split % n_splits -> split = split * 0
    modulated rows | unwritten | n_splits.to(tl.int64) * BLOCK_M): -> (n_splits + 1).to(tl.int64) * BLOCK_M):
    modulated rows | race | (rows // n_tokens * n_modulations + modulation) -> (rows // n_tokens * n_modulations)
    weights of heads | race | rows // n_tokens * n_modulations -> rows // n_tokens
    modulated rows | value | modulated += load_columns( -> modulated *= load_columns(
    modulated rows | value | ungated *= scale -> ungated += scale
    modulated rows | value | ungated += load_modulation( -> ungated -= load_modulation(
    modulated rows | value | summed = dy if SUMMED else wdy -> summed = wdy
    modulated rows, one by one | value | summed = dy if SUMMED else wdy -> summed = dy
    modulated rows, one by one | value | (dy * modulated).to -> (dy * scaled).to
    modulated rows | value | wdy *= scale -> pass
    modulated rows | value | x_hat_sums += -> x_hat_sums =
    modulated rows | value | residual_gate_sums += -> residual_gate_sums =
    modulated rows | value | dtotal -= sums.wdy * inverse_total -> pass
    modulated rows | value | dtotal *= load_modulation( -> dtotal += load_modulation(
    modulated rows, gate first | value | gate_backward(dtotal * total, -> gate_backward(dtotal * v,
    modulated rows, gate first | value | dtotal *= gate_of(z, sigmoid, GATE) -> pass
    modulated rows | race | X_HAT_SUMS * n_programs + program -> X_HAT_SUMS * n_programs
    modulated rows | race | DY_SUMS * n_programs -> DY_SUMS
    rounded product | different | rounded(ungated, PRODUCT) -> ungated
    far modulations | overflow | (split // n_splits).to(tl.int64) -> (split // n_splits)
modulated_finalise.add_sums
    modulated rows | value | (rows < n_sums) -> (rows < n_sums - 1)
    modulated rows | value | (first + rows) * n_cols -> rows * n_cols
modulated_finalise.add_modulated_sums
    modulated rows | value | scale.to(COMPUTE) + OFFSET -> scale.to(COMPUTE)
    modulated rows | bounds | rows // n_splits * scale_vecs -> rows * scale_vecs
    modulated rows | value | (rows < n_sums) -> (rows < n_sums - 1)
modulated_finalise.modulated_backward_finalise_kernel
    modulated rows | value | dscale += dy * load_columns( -> dscale += 0 * load_columns(
    modulated rows | value | dscale *= load_columns( -> dscale += 0 * load_columns(
    modulated rows, weight offset | value | WEIGHT_OFFSET, dscale.dtype -> 0.0, dscale.dtype
    modulated rows | bounds | modulation < n_summed -> modulation <= n_summed
    modulated rows | value | first = modulation.to(tl.int64) * n_splits -> first = modulation.to(tl.int64) * 0
    modulated rows | value | dshift = add_sums(sums_ptr + DY_SUMS -> dshift = add_sums(sums_ptr + X_HAT_SUMS
    modulated rows | value | sums_ptr + RESIDUAL_GATE_SUMS -> sums_ptr + DY_SUMS
    modulated rows | value | dy_ptr = sums_ptr + DY_SUMS -> dy_ptr = sums_ptr + X_HAT_SUMS
""")

MUTANTS = [*ROWS, *BOTH, *CHANNELS, *_read(CLUSTERS), *MODULATED]
