"""Facts that are read from PTX, of a kernel written by hand."""

from perf import ptx
from support.bars import wanting

SIGNATURE = {"x_ptr": "*bf16", "n_cols": "i32", "y_ptr": "*fp32", "sync_ptr": "*i32", "BLOCK": "constexpr"}
KERNEL = """
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_2];
    ld.param.b64 %rd3, [kernel_param_3];
    mad.wide.s32 %rd4, %r1, 2, %rd1;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    add.s64 %rd5, %rd2, 16;
    @%p1 st.global.v2.b32 [ %rd5 + 0 ], { %r2, %r3 };
    st.shared.b64 [%r6], %rd4;
    ld.shared.v2.b64 {%rd6, %rd7}, [%r6];
    @%p2 ld.global.b16 { %rs1 }, [ %rd6 + 0 ];
    @%p3 atom.global.gpu.acq_rel.add.u32 %r7, [ %rd3 + 0 ], %r8;
"""


def test_accesses_by_argument():
    """An address that has been in shared memory may be any argument's."""
    assert ptx.accesses(KERNEL, SIGNATURE) == {
        "x": {"load": {128: 1}},
        "y": {"store": {64: 1}},
        ptx.UNKNOWN: {"load": {16: 1}},
    }


BARRIER = "    bar.sync 0;\n"
LOAD, STORE = "ld.global.b32 { %r2 }, [ %rd1 + 0 ];\n", "@%p1 st.global.b32 [ %rd1 + 0 ], { %r2 };\n"


def test_what_is_stored_before_a_barrier_and_loaded_behind_it():
    """Also through an address that has been in shared memory, behind a cluster's barrier, and in a loop."""
    for text, expected in (
        (STORE + BARRIER + LOAD, ["x"]),
        (STORE + "barrier.cluster.arrive.aligned;\n" + LOAD, ["x"]),
        (STORE + LOAD + BARRIER, []),
        (LOAD + BARRIER + STORE, []),
        ("$L__1:\n" + LOAD + BARRIER + STORE + "@%p2 bra $L__1;\n", []),
        ("$L__1:\n" + LOAD + STORE + BARRIER + "@%p2 bra \t$L__1;\n", ["x"]),
        (KERNEL + BARRIER + LOAD, []),
        (BARRIER + STORE + BARRIER + KERNEL, ["x"]),
        (STORE.replace("%rd1", "%rd7") + BARRIER + LOAD.replace("%rd1", "%rd7"), [ptx.UNKNOWN]),
    ):
        declared = "ld.param.b64 %rd1, [kernel_param_0];\n"
        assert ptx.loaded_back(declared + text, SIGNATURE) == expected, text


def test_order_of_loads_barriers_and_atomics():
    """A cluster's barrier is its `wait`; another argument's load and one block's barrier are not told."""
    wait = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    atomic = "@%p3 atom.global.gpu.acq_rel.add.u32 %r7, [ %rd1 + 0 ], %r8;\n"
    text = "ld.param.b64 %rd1, [kernel_param_0];\nld.param.b64 %rd2, [kernel_param_2];\n"
    text += LOAD + LOAD.replace("%rd1", "%rd2") + BARRIER + wait + wait + STORE + atomic + LOAD
    assert ptx.order(text, SIGNATURE, "x") == ["load", "barrier", "atomic", "load"]
    assert ptx.order(text, SIGNATURE, "y") == ["load", "barrier", "atomic"]


def test_atomics_by_type():
    assert ptx.atomics(KERNEL) == ["u32"]
    for kind, added in (("f32", "add.f32"), ("bf16", "add.noftz.bf16"), ("f16x2", "add.noftz.f16x2")):
        summed = KERNEL + f"    @%p3 atom.global.gpu.acq_rel.{added} %r7, [ %rd3 + 0 ], %r8;\n"
        assert ptx.atomics(summed) == sorted({"u32", kind})
        summed = KERNEL + f"    @%p3 red.global.gpu.relaxed.{added} [ %rd3 + 0 ], %r8;\n"
        assert ptx.atomics(summed) == sorted({"u32", kind})


def test_sums_by_atomics_of_floats_are_wanting():
    record = {"status": "ok", "spill_stores": 0, "spill_loads": 0, "resident_warps": 8, "possible_warps": 64}
    record |= {"accesses": {}, "atomics": ["u32"]}
    assert wanting(record, 128) == []
    (why,) = wanting(record | {"atomics": ["f32", "u32"]}, 128)
    assert "atomics of ['f32']" in why
