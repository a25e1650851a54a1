"""Chooses launch configurations: the candidates for each kernel, and the one that was measured to be fastest.

- `limits`: the GPU, and the thresholds that decide between launches.
- `configs`: block sizes, warps and stages of a launch; the configs of one kernel and key.
- `row_spaces`, `channel_spaces`: the configs for a call's work on a GPU, and how programs share the work.
- `choices`: the config of each kernel and key that was measured, searched for, or guessed.
- `memory`: caches results that follow from limits and choices, until these change.

Keys never hold the number of rows or samples: another batch size compiles and searches nothing, and rounds as before.
"""
