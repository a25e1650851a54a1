"""Stores adjacent elements that don't begin or end where an aligned access does.

A window is the aligned accesses that have such elements: the first and the last may have some of others, too. They are
loaded by whole accesses, of which a neighbour loads the first or the last again.

    elements    ...0 0 0 0 0|1 1 1 1 1 1 1 1 1 1|2 2 2 2 2 ...
    accesses      |. . . .|. . . .|. . . .|. . . .|. . . .|
    window of 1           |. . . .|. . . .|. . . .|            first = 1, end = 11
"""

import triton
import triton.language as tl


@triton.jit
def in_window(vec, first, end, V: tl.constexpr):
    """Returns the mask [n, W, V] of the elements from `first` on, before `end`, of the accesses `vec` of windows."""
    place = vec * V + tl.arange(0, V)[None, None, :]
    return (place >= first) & (place < end)


@triton.jit
def store_window(pointers, values, vec, first, end, in_range, V: tl.constexpr):
    """Stores the elements of windows: by whole accesses, and one by one in a first or last access with others.

    Args:
        pointers, values: [n, W, V].
        vec: [1, W, 1], the accesses of the windows.
        first, end: [n, 1, 1], the elements, from the start of the window.
        in_range: [n, W, 1], mask of the accesses that exist.
    """
    is_whole = (vec * V >= first) & (vec * V + V <= end)
    tl.store(pointers, values, mask=in_range & is_whole)
    tl.store(pointers, values, mask=in_range & in_window(vec, first, end, V) & (is_whole == 0))
