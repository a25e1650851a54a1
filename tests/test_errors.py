"""Wrong calls: torch's exception types, words that name the argument and both shapes, nothing written."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import triton_norm

X = torch.ones(2, 3, 4)


LAYER_NORM = [
    (lambda f: f(X, (5,)), r"normalized_shape=\[5\].*\[\*, 5\].*\[2, 3, 4\]"),
    (lambda f: f(X, (2, 4)), r"normalized_shape=\[2, 4\].*\[2, 3, 4\]"),
    (lambda f: f(torch.tensor(1.0), (1,)), r"normalized_shape=\[1\].*size \[\]"),
    (lambda f: f(X, ()), "normalized_shape to have at least one dimension"),
    (lambda f: f(X, 4), "'normalized_shape' must be tuple of ints, not int"),
    (lambda f: f(X, (4.0,)), "'normalized_shape' must be tuple of ints.*float"),
    (lambda f: f(X, (4,), torch.ones(3)), r"weight.*\[3\].*normalized_shape=\[4\]"),
    (lambda f: f(X, (3, 4), torch.ones(12)), r"weight.*\[12\].*normalized_shape=\[3, 4\]"),
    (lambda f: f(X, (4,), None, torch.ones(4, 1)), r"bias.*\[4, 1\].*normalized_shape=\[4\]"),
    (lambda f: f([1.0], (1,)), "'input' must be Tensor, not list"),
    (lambda f: f(X, (4,), [1.0] * 4), "'weight' must be Tensor, not list"),
    (lambda f: f(X, (4,), eps=None), "'eps' must be float, not NoneType"),
    (lambda f: f(X, (4,), eps="small"), "'eps' must be float, not str"),
    (lambda f: f(X.long(), (4,)), "input of torch.int64"),
    (lambda f: f(X.to(torch.complex64), (4,)), "input of torch.complex64"),
    (lambda f: f(X, (4,), torch.ones(4).long()), "weight.*torch.int64"),
    (lambda f: f(X, (4,), torch.ones(4, device="meta")), "input is on cpu and weight is on meta"),
]


RMS_NORM = [
    (lambda f: f(X, (5,)), r"normalized_shape=\[5\].*\[\*, 5\].*\[2, 3, 4\]"),
    (lambda f: f(torch.tensor(1.0), (1,)), r"at least one dimension.*size \[\]"),
    (lambda f: f(X, ()), "normalized_shape to have at least one dimension"),
    (lambda f: f(X, 4), "'normalized_shape' must be tuple of ints, not int"),
    (lambda f: f(X, (4,), torch.ones(3)), r"weight.*\[3\].*normalized_shape=\[4\]"),
    (lambda f: f([1.0], (1,)), "'input' must be Tensor, not list"),
    (lambda f: f(X, (4,), [1.0] * 4), "'weight' must be Tensor, not list"),
    (lambda f: f(X, (4,), eps="small"), "'eps' must be float, not str"),
    (lambda f: f(X.long(), (4,)), "input of torch.int64"),
    (lambda f: f(X, (4,), torch.ones(4, device="meta")), "input is on cpu and weight is on meta"),
]


@pytest.mark.parametrize(("call", "words"), RMS_NORM)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_rms_norm(call, words, backend):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        call(F.rms_norm)
    with triton_norm.backend(backend), pytest.raises(theirs.type, match=words):
        call(triton_norm.rms_norm)


@pytest.mark.parametrize(("call", "words"), LAYER_NORM)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_layer_norm(call, words, backend):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        call(F.layer_norm)
    with triton_norm.backend(backend), pytest.raises(theirs.type, match=words):
        call(triton_norm.layer_norm)


def running(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n), torch.ones(n)


BATCH_NORM = [
    (lambda f, m, v: f(X, None, None), "must be defined in evaluation mode"),
    (lambda f, m, v: f(X, m, None, training=True), "either both be None or neither"),
    (lambda f, m, v: f(X, None, v, training=True), "either both be None or neither"),
    (lambda f, m, v: f(torch.ones(2, 4), m, v, training=True), r"running_mean.*4 elements.*\[2, 4\].*\[3\]"),
    (lambda f, m, v: f(X, m, torch.ones(4), training=True), r"running_var.*3 elements.*\[2, 3, 4\].*\[4\]"),
    (lambda f, m, v: f(X, m, v, torch.ones(4), training=True), r"weight.*3 elements.*\[2, 3, 4\].*\[4\]"),
    (lambda f, m, v: f(X, m, v, None, torch.ones(2), True), r"bias.*3 elements.*\[2, 3, 4\].*\[2\]"),
    (lambda f, m, v: f(torch.ones(3), m, v), r"at least 2 dimensions.*\[3\]"),
    (lambda f, m, v: f(torch.tensor(1.0), m, v), r"at least 2 dimensions.*\[\]"),
    (lambda f, m, v: f(torch.ones(1, 3), m, v, training=True), r"more than 1 value per channel.*\[1, 3\]"),
    (lambda f, m, v: f(torch.ones(1, 3, 1, 1), m, v, training=True), r"more than 1 value per channel.*\[1, 3, 1, 1\]"),
    (lambda f, m, v: f(X, m, v, training=True, eps=-1e-5), "eps must be positive"),
    (lambda f, m, v: f(X, m, v, training=True, eps=0), "eps must be positive"),
    (lambda f, m, v: f(X, m, v, training=True, momentum=None), "'momentum' must be float, not NoneType"),
    (lambda f, m, v: f(X, m, v, training=True, momentum="0.1"), "'momentum' must be float, not str"),
    (lambda f, m, v: f(X.long(), m, v, training=True), "input of torch.int64"),
    (lambda f, m, v: f(X.to(torch.complex64), m, v, training=True), "input of torch.complex64"),
    (lambda f, m, v: f("x", m, v), "'input' must be Tensor, not str"),
    (lambda f, m, v: f(X, m, [1.0] * 3, training=True), "'running_var' must be Tensor, not list"),
    (lambda f, m, v: f(X, m, v, torch.ones(3, device="meta"), training=True), "input is on cpu and weight is on meta"),
]


@pytest.mark.parametrize(("call", "words"), BATCH_NORM)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_batch_norm(call, words, backend):
    mean, var = running()
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        call(F.batch_norm, mean.clone(), var.clone())
    with triton_norm.backend(backend), pytest.raises(theirs.type, match=words):
        call(triton_norm.batch_norm, mean, var)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


@pytest.mark.parametrize("counter", [torch.zeros(2, dtype=torch.int64), torch.tensor(0.0)])
def test_a_counter_that_cannot_count(counter):
    with pytest.raises(RuntimeError, match="num_batches_tracked must be one integer"):
        triton_norm.batch_norm(X, *running(), training=True, num_batches_tracked=counter)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda norms: norms.BatchNorm1d(3), torch.ones(2, 4, 5)),
        (lambda norms: norms.BatchNorm1d(3), torch.ones(2, 3, 4, 5)),
        (lambda norms: norms.BatchNorm1d(3), torch.ones(1, 3)),
        (lambda norms: norms.BatchNorm2d(3), torch.ones(2, 3)),
        (lambda norms: norms.BatchNorm2d(3), torch.ones(2, 2, 3, 3)),
        (lambda norms: norms.BatchNorm3d(3), torch.ones(2, 3, 3, 3)),
        (lambda norms: norms.BatchNorm3d(3), torch.ones(2, 3, 3, 3, 3, dtype=torch.int32)),
    ],
)
def test_a_module_that_rejects_has_moved_nothing(make, x, momentum):
    """torch's own has counted the batch by then."""
    theirs, ours = make(nn), make(triton_norm)
    theirs.momentum = ours.momentum = momentum
    with pytest.raises((RuntimeError, ValueError)) as error:
        theirs(x)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    with pytest.raises(error.type):
        ours(x)
    assert all(torch.equal(before[name], buffer) for name, buffer in ours.named_buffers())


def test_numbers_of_any_kind_as_torch_takes_them():
    expected = F.layer_norm(X, (4,), eps=0.5)
    for eps in (np.float32(0.5), torch.tensor(0.5), np.float64(0.5)):
        torch.testing.assert_close(triton_norm.layer_norm(X, (np.int64(4),), eps=eps), expected)
    mean, var = running()
    triton_norm.batch_norm(X, mean, var, training=True, momentum=torch.tensor(1.0))
    assert torch.equal(mean, torch.ones(3))
