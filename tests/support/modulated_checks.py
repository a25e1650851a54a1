"""Checks of few elements that right kernels of gated and modulated rows pass, for the mutants of these kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import triton_norm
from support.modulated import NAMES, Bound, Modulated
from support.strategies import BF16, F32


def call(names: str, shape: tuple[int, ...], modulation: tuple[int, ...] = (), **others: Any) -> Modulated:
    """Returns a call with these tensors beside x; scale, shift and residual_gate have one shape.

    Launches are cut up so that two programs share the six rows of a modulation, each of which takes two at a time.
    """
    there = {"x", *names.split()}
    dtypes = {name: F32 if name in there else None for name in NAMES}
    shapes = dict.fromkeys(("scale", "shift", "residual_gate"), modulation)
    needs = frozenset(there)
    function = "layer_norm" if "bias" in there else "rms_norm"
    return Modulated(function, shape, 1, dtypes, shapes, cut="splits", needs=needs, **others)


EVERY = "residual weight bias gate scale shift residual_gate"
CALLS = {
    "gated rows": call("weight gate", (7, 33)),
    "gated rows, sigmoid": call("weight gate", (7, 33), gate_activation="sigmoid"),
    "gated rows, gate first": call("weight gate", (7, 33), gate_first=True),
    "modulated rows": call(EVERY, (3, 6, 33), (3, 33)),
    "modulated rows, gate first": call(EVERY, (3, 6, 33), (3, 33), gate_first=True),
    "modulated rows, one by one": call(EVERY, (2, 3, 33), (2, 3, 33)),
    "modulated rows, weight offset": call("weight scale shift", (3, 6, 33), (3, 33), offset=1.0),
    "modulated rows, rounded total": dataclasses.replace(
        call("residual residual_gate gate", (3, 6, 33), (3, 33)), total=BF16, out=F32
    ),
    **{
        f"long {name}": dataclasses.replace(each, cut="pieces")
        for name, each in {
            "gated rows": call("weight gate", (7, 33)),
            "modulated rows": call(EVERY, (3, 6, 33), (3, 33)),
            "modulated rows, gate first": call(EVERY, (3, 6, 33), (3, 33), gate_first=True),
        }.items()
    },
    "weights of heads": call("scale", (2, 3, 4, 33), (4, 33), per_head=True, offset=0.5),
}


def check_call(name: str, numbers: Any, monkeypatch: Any) -> None:
    case = CALLS[name]
    tensors = case.drawn("cpu")
    result = case.run(tensors)
    if result["total"] is not None:
        Bound(case, tensors, None).check_total(result["total"])
    case.check(tensors, result)


def check_product(numbers: Any, monkeypatch: Any) -> None:
    """y and the gate's gradient are those of a product that is rounded before it is gated."""
    x, gate, dy = torch.randn(3, 9, 40)
    leaf = gate.clone().requires_grad_()
    y = triton_norm.layer_norm(x, (40,), gate=leaf, gate_activation=None, product_dtype=BF16)
    rounded = F.layer_norm(x, (40,)).bfloat16().float()
    (dgate,) = torch.autograd.grad(y, leaf, dy)
    for result, exact in ((y, rounded * gate), (dgate, rounded * dy)):
        assert (~torch.isclose(result, exact, rtol=1e-6, atol=1e-6)).double().mean() < 0.01, "not close"


def reserved(n_rows: int, n_cols: int) -> torch.Tensor:
    """Returns drawn rows that are more than 2³¹ elements apart, in a storage that is not touched between them."""
    stride = 2**31 + 64
    memory = torch.UntypedStorage(2 * ((n_rows - 1) * stride + n_cols))
    rows = torch.empty(0, dtype=torch.float16).set_(memory, 0, (n_rows, n_cols), (stride, 1))
    return rows.copy_(torch.randn(n_rows, n_cols))


def check_far(name: str, numbers: Any, monkeypatch: Any) -> None:
    """Offsets of x and gate, or of modulations of two samples, do not fit 32 bits."""
    x, gate, scale = torch.randn(3, 2, 64).half()
    x, gate, modulation = (reserved(2, 64), reserved(2, 64), scale) if name == "rows" else (x, gate, reserved(2, 64))
    named = {"gate": gate, "residual": x, "residual_gate": modulation, "scale": modulation, "shift": modulation}
    if name != "rows":  # a modulation of three tokens
        named |= {key: named[key][:, None].expand(2, 3, 64) for key in ("gate", "residual")}
        x = named["residual"]
    leaves = {"x": x, **named}
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in leaves.items()}
    y, total = triton_norm.layer_norm(leaves["x"], (64,), **{key: leaves[key] for key in named})
    torch.autograd.grad((y, total), list(leaves.values()), (torch.ones_like(y), torch.ones_like(total)))


MODULATED_CHECKS: dict[str, Callable[..., None]] = {
    **{name: functools.partial(check_call, name) for name in CALLS},
    "rounded product": check_product,
    "far gated rows": functools.partial(check_far, "rows"),
    "far modulations": functools.partial(check_far, "modulations"),
}
