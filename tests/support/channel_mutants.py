"""The kernels of channels and groups made wrong, in the form that mutants.py reads."""

CHANNELS = r"""
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
    groups of clusters | race | group = block + tl.zeros -> group = 0 * block + tl.zeros
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
"""

CLUSTERS = r"""
clusters.own_lanes
    folded clusters | value | lane < first + columns -> lane <= first + columns
clusters.channel_sum
    folded clusters | value | rows, 0.0) -> rows, rows)
clusters.to_lanes
    folded clusters | value | values, 0.0) -> values, values)
clusters.moments_of_tiles
    clusters | value | tl.where(masks[place], tiles -> tl.where(masks[place] | True, tiles
    folded clusters | value | - shift) - rest -> - shift) - shift
    off-centre folded clusters | off-centre | (shift - of_lanes) + rest -> shift * 0.0
channels.channels_forward_kernel
    cumulative clusters | barrier | tl.debug_barrier() -> pass
    clusters | value | raw = tiles[TILES - 1 - place] -> raw = tiles[place]
    clusters | race | if block == 0: -> if block >= 0:
    folded clusters | value | load_parameter(weight_ptr, channels, 1.0 -> load_parameter(bias_ptr, channels, 1.0
    folded clusters | value | bias = to_lanes(load_parameter(bias_ptr -> bias = to_lanes(load_parameter(weight_ptr
channels_backward.channels_backward_kernel
    folded clusters | value | scale = to_lanes(scale, -> scale = to_lanes(rstd,
    folded clusters | value | slope = to_lanes(slope, -> slope = to_lanes(mean_dz,
    folded clusters | value | mean_dz = to_lanes(mean_dz, -> mean_dz = to_lanes(slope,
"""
