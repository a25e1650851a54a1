"""The kernels of rows made wrong, and what they share with those of channels, in the form that mutants.py reads."""

ROWS = r"""
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
"""

BOTH = r"""
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
"""

MODULATED = r"""
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
"""
