"""`python -m perf code`: which changes of a kernel it notices, and which it takes for none."""

import json

import pytest

from perf import assembly
from support import processes

pytestmark = pytest.mark.unguarded

POINTS = ("--op", "layer_norm", "--dtype", "bf16", "--points", "2")  # a forward, and a backward of two kernels
EDITED = """
import sys
from perf import __main__ as cli
from triton_norm.kernels import rows

old, new, *arguments = sys.argv[1:]
source = rows.normalize.src
assert source.count(old) == 1, source
rows.normalize._unsafe_update_src(source.replace(old, new))
sys.exit(cli.main(["code", *arguments]))
"""
PTX = """
	// .globl	a_kernel
.visible .entry a_kernel(
	.param .u64 .ptr .global .align 1 a_kernel_param_0
)
{
	.loc	1 {line} 0                         // rows.py:{line}:0
$L__func_begin0:
// %bb.0:                               // %.{block}
	mov.u32 	%r1, %ctaid.x;
$L__tmp{label}:
	.loc	1 {line} 26                        // rows.py:{line}:26
	shl.b32 	%r2, %r1, {shift};
$L__BB0_1:
	ret;
$L__func_end0:
                                        // -- End function
}
	.file	1 "{folder}/rows.py"
	.section	.debug_info
	{
.b64 $L__tmp{label}                     // DW_AT_low_pc
	}
	.section	.debug_macinfo	{	}
"""
AMD = """
	.text
a_kernel:                   ; @a_kernel
	.file	1 "{folder}" "rows.py"
	.loc	1 {line} 0 prologue_end             ; rows.py:{line}:0
.Ltmp{label}:
	s_lshl_b32 s1, s2, {shift}
	.section	.debug_info,"",@progbits
	.long	{line}                             ; DW_AT_call_line
	.section	".note.GNU-stack","",@progbits
	.amdgpu_metadata
    .vgpr_count:     150
	.end_amdgpu_metadata
	.section	.debug_line,"",@progbits
"""


def filled(text, **values):
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


@pytest.mark.parametrize(("text", "comment"), [(PTX, "//"), (AMD, ";")])
def test_debug_information_is_left_out_and_no_more(text, comment):
    some = filled(text, line=125, label=0, block="loop", folder="/a", shift=3)
    moved = filled(text, line=131, label=7, block="exit", folder="/b", shift=3)
    other = filled(text, line=125, label=0, block="loop", folder="/a", shift=4)
    some, moved, other = (assembly.without_debug(version, comment).split("\n") for version in (some, moved, other))
    assert some == moved
    (line,) = set(some) - set(other)
    assert "shl" in line
    assert "150" in assembly.without_debug(AMD, ";")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("code") / "code.json"
    done = processes.run("-m", "perf", "code", *POINTS, "--save", str(file))
    assert done.returncode == 0, done.stderr
    return file


def compared(file, old, new, *options):
    """The exit status and the lines said of the kernels with an edit in the function that the forward ends with."""
    done = processes.run("-c", EDITED, old, new, *POINTS, "--compare", str(file), *options)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_hashes_are_stored_beside_versions(stored):
    import torch
    import triton

    result = json.loads(stored.read_text())
    assert (result["torch"], result["triton"]) == (torch.__version__, triton.__version__)
    assert [list(kernels) for kernels in result["code"].values()] == [
        ["0 rows_forward_kernel"],
        ["0 rows_backward_kernel", "1 rows_backward_finalise_kernel"],
    ]
    hashes = [text for kernels in result["code"].values() for text in kernels.values()]
    assert len(set(hashes)) == 3
    assert all(len(bytes.fromhex(text)) == 32 for text in hashes)


def test_names_and_lines_make_no_difference(stored):
    status, said = compared(stored, "    y = rounded(", "    # moved by a line\n\n    y = rounded(")
    assert (status, said) == (0, ["3 kernels equal, 0 different"])


def test_other_code_is_noticed_where_it_is(stored):
    status, said = compared(stored, "y = rounded(centred * rstd", "y = rounded(centred * rstd * 2.0")
    assert status == 1
    (line, last) = said
    assert line.startswith("sm_90 layer_norm forward bf16 ")
    assert line.endswith(": 0 rows_forward_kernel differs")
    assert last == "2 kernels equal, 1 different"


def test_kernels_that_are_new_or_gone_differ(stored, tmp_path):
    result = json.loads(stored.read_text())
    forward, backward = result["code"]
    del result["code"][backward]["0 rows_backward_kernel"]
    result["code"][forward]["1 another_kernel"] = "0" * 64
    result["code"]["sm_90 rms_norm"] = {}
    file = tmp_path / "code.json"
    file.write_text(json.dumps(result))
    done = processes.run("-m", "perf", "code", *POINTS, "--compare", str(file))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{forward}: 1 another_kernel is gone",
        f"{backward}: 0 rows_backward_kernel is new",
        "2 kernels equal, 2 different; 1 stored points were not compiled",
    ]


def test_hashes_of_another_triton_are_refused(stored, tmp_path):
    import triton

    file = tmp_path / "code.json"
    file.write_text(json.dumps(json.loads(stored.read_text()) | {"triton": "3.0.0"}))
    done = processes.run("-m", "perf", "code", *POINTS, "--compare", str(file))
    assert done.returncode == 2
    assert done.stderr.strip() == f"perf code: {file} is of Triton 3.0.0, and this is {triton.__version__}"
