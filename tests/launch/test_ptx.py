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
