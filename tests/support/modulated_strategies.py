"""Calls with a gate or a modulation, as property tests draw them."""

import math
from typing import Any

from hypothesis import strategies as st

from support.modulated import CUTS, LIKE_X, NAMES, OUTER, Modulated
from support.oracle import DTYPES
from support.strategies import EPSILONS, F16, HARD, Shape, Type, layouts, types


@st.composite
def modulation_shapes(draw: Any, outer: Shape, row: Shape) -> Shape:
    """Draws a shape whose leading axes are x's or 1, of which the last ones may be missing."""
    present = draw(st.integers(0, len(outer)))
    return (*(draw(st.sampled_from((1, length, length))) for length in outer[:present]), *row)


@st.composite
def modulated(draw: Any, by_torch: bool = False) -> Modulated:
    """Draws a call of any shape, types, strides and options."""
    outer = tuple(draw(st.lists(st.integers(1, 4), max_size=4).filter(lambda lengths: math.prod(lengths) <= 24)))
    row = draw(st.one_of(st.tuples(st.integers(1, 70)), st.tuples(st.integers(1, 4), st.integers(1, 9))))
    outer = outer if len(outer) + len(row) <= 5 else outer[:3]
    shape, function = (*outer, *row), draw(st.sampled_from(("layer_norm", "rms_norm")))
    x = draw(st.sampled_from(DTYPES))

    def dtype() -> Type:
        if not draw(st.booleans()):
            return None
        return draw(st.sampled_from((x, x, x, *DTYPES)))

    dtypes: dict[str, Type] = {"x": x} | {name: dtype() for name in NAMES if name != "x"}
    per_head = bool(outer) and dtypes["scale"] is not None and draw(st.integers(0, 3)) == 0
    if per_head:
        dtypes["weight"] = dtypes["bias"] = None
    if function == "rms_norm":
        dtypes["bias"] = None
    if dtypes["residual"] is None:
        dtypes["residual_gate"] = None
    if all(dtypes[name] is None for name in ("gate", *OUTER)):
        dtypes["gate"] = x
    one = draw(modulation_shapes(outer, row))
    differ = draw(st.integers(0, 3)) == 0
    shapes = {name: draw(modulation_shapes(outer, row)) if differ else one for name in OUTER}
    if per_head:
        shapes["scale"] = shape[len(outer) - 1 :]
    placements, chunks = {name: draw(layouts(len(shape))) for name in ("x", "dy", *LIKE_X)}, set()
    for name in OUTER:
        kind = draw(st.sampled_from(("plain", "chunk", "drawn")))
        if kind == "drawn":
            placements[name] = draw(layouts(len(shapes[name])))
        elif kind == "chunk":
            chunks.add(name)
    gate, residual = dtypes["gate"], dtypes["residual"]
    gate_first = gate is not None and draw(st.booleans())
    needs = draw(st.one_of(st.just(frozenset(NAMES)), st.frozensets(st.sampled_from(NAMES), min_size=1)))
    there = frozenset(name for name in NAMES if dtypes[name] is not None)
    total = None if residual is None else draw(types(x))
    narrow = F16 in (*dtypes.values(), total)
    has_offset = per_head or dtypes["weight"] is not None
    out = draw(types(x))
    return Modulated(
        function,
        shape,
        len(row),
        dtypes,
        shapes,
        placements,
        frozenset(chunks),
        eps=draw(st.sampled_from(EPSILONS[1:3] if narrow or out == F16 else EPSILONS)),
        hard=draw(st.sampled_from(HARD)),
        seed=draw(st.integers(0, 99)),
        cut=draw(st.sampled_from(tuple(CUTS))),
        gate_activation=draw(st.sampled_from(("silu", "silu", "sigmoid", None))),
        gate_first=gate_first,
        product=None if gate is None or gate_first else draw(types(x)),
        x_hat=draw(types(x)),
        out=out,
        total=total,
        offset=draw(st.sampled_from((0.0, 1.0))) if has_offset else 0.0,
        per_head=per_head,
        needs=needs & there or there,
        used="both" if residual is None else draw(st.sampled_from(("both", "both", "y", "total"))),
        by_torch=by_torch,
    )
