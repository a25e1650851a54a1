"""The kernels of clusters with whole channels made wrong, in the form that mutants.py reads."""

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
