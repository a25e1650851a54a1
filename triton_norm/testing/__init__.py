"""Makes Triton's interpreter, for tests on CPUs, round as a GPU does, and check every access to memory.

With TRITON_INTERPRET=1 in the environment before anything imports triton_norm or triton, kernels run on CPU tensors,
interpreted. Triton's own interpreter truncates fp32 to bf16 where a GPU rounds, and garbles bf16 arithmetic. It does
not report accesses out of bounds, uninitialised memory, races or integer overflow.

    correct_rounding()   repairs the arithmetic in a block of code; its docstring has the formulas
    install()            the same until the process ends
    guarded()            correct_rounding, and errors for wrong accesses, races and overflow
    interleaved()        lets programs of a launch wait for each other, which hangs otherwise
    fast_launches()      makes interpreting faster, with the same results

The module `triton_norm.testing.stub_driver`, which is imported by that name, measures the host's time without a GPU.

In a conftest.py, whose first lines set the variable, for all tests:

    @pytest.fixture(autouse=True)
    def interpreter():
        with triton_norm.testing.guarded():
            yield

All of these also work for kernels of your own. They change Triton for the whole process, see `correct_rounding`.

Interpreted kernels can't, repaired or not:
- use `tl.inline_asm_elementwise`, `libdevice` or atomics on bf16, assign to several names (`a = b = 1`), have a
  docstring a line of which begins with "def ", or be tuned by `triton.autotune` over more than one config: an error;
- be compiled in the same process, neither just in time nor ahead of time;
- run in Triton 3.6 with NumPy 2.4 or later;
- show a GPU's speed: an operation takes some 40 µs a program, a `tl.reduce` with your own function 0.2 ms an element;
- have a GPU's every bit: NumPy adds in another order, its division and square root are correctly rounded, its exp and
  log are other approximations, and `tl.dot` has no TF32.
"""

try:
    import numpy  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "triton_norm.testing needs NumPy, as Triton's interpreter does: pip install numpy", name="numpy"
    ) from error

import atexit
import functools
from contextlib import ExitStack

from triton_norm.testing.guards import Guard, RaceError, guarded
from triton_norm.testing.interleave import DeadlockError, interleaved
from triton_norm.testing.interpreter import correct_rounding, fast_launches

__all__ = [
    "DeadlockError",
    "Guard",
    "RaceError",
    "correct_rounding",
    "fast_launches",
    "guarded",
    "install",
    "interleaved",
]


@functools.cache
def install() -> None:
    """Applies `correct_rounding` until the process ends. Calling it again changes nothing.

    Raises:
        RuntimeError: the interpreter is off, see `correct_rounding`.
    """
    installed = ExitStack()
    installed.enter_context(correct_rounding())
    atexit.register(installed.close)
