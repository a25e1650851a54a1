"""GPUs that are not there, for launches to be chosen for."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from triton_norm.tuning.limits import INTERPRETED, Gpu, assumed, gpu_of

H100 = Gpu(name=None, multiprocessors=132, l2_bytes=50 * 2**20)

OWN = {field.name for field in fields(Gpu)} - {"limits"}


def changed(gpu: Gpu, **numbers: Any) -> Gpu:
    """Returns the GPU with these numbers, which are its own or its limits'."""
    own = {name: number for name, number in numbers.items() if name in OWN}
    limits = {name: number for name, number in numbers.items() if name not in OWN}
    return replace(gpu, **own, limits=replace(gpu.limits, **limits))


@contextlib.contextmanager
def with_numbers(**numbers: Any) -> Iterator[None]:
    """Gives the GPU in force, or its stand-in, these numbers within this context."""
    present = torch.cuda.is_available() and not INTERPRETED
    with assumed(changed(gpu_of(torch.device("cuda" if present else "cpu")), **numbers)):
        yield
