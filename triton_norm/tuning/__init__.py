"""Picks launches: what each kernel may be launched with, and which of it was measured to be fastest.

- `limits`: the numbers that decide, and the GPU that they are for.
- `configs`: a launch's block sizes, warps and stages; the configs that one kernel may have for one key.
- `row_spaces`, `channel_spaces`: the configs for a call's work on a GPU, and how programs share the work.
- `choices`: the config of each kernel and key that was measured, searched for, or guessed.
- `memory`: forgets what follows from the limits and choices when these change.

Keys never hold the number of rows or samples: another batch size compiles nothing, searches nothing, and rounds every
row as before.
"""
