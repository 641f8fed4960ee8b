"""The table of the kernels' resources: parsing the output of cuobjdump, and the faults of a build."""

import pytest

from tools.pages import kernel_resources as resources

SYMBOL = "_ZN9retinanet12_GLOBAL__N_117focal_loss_kernelIN3c104HalfENS_12ClassTargetsIiEEEEvPKT_T0_"
NAME = "focal_loss_kernel<Half, ClassTargets<int>>"

USAGE = f"""
Fatbin elf code:
================
arch = sm_90
compressed

Resource usage:
 Common:
  GLOBAL:46 CONSTANT[4]:368
 Function {SYMBOL}:
  REG:48 STACK:8 SHARED:1088 LOCAL:0 CONSTANT[0]:1008 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
arch = sm_90
\t\tFunction : {SYMBOL}
        /*0000*/       LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*0010*/  @!P0 LDG.E R4, desc[UR4][R2.64] ;                   /* 0x0 */
        /*0020*/       LDS.U.128 R8, [R3] ;                           /* 0x0 */
        /*0030*/       STS.64 [R3], R8 ;                              /* 0x0 */
        /*0040*/       STL [R1], R9 ;                                 /* 0x0 */
        /*0050*/       LDL.LU.64 R9, [R1] ;                           /* 0x0 */
        /*0060*/       LDC.128 R9, c[0x0][0x28] ;                     /* 0x0 */
        /*0070*/       STG.E.128 desc[UR4][R2.64], R4 ;               /* 0x0 */
"""


def usage(**changes: int) -> object:
    return resources.Usage(
        **{"registers": 48, "shared": 1088, "global_loads_128": 2, "global_stores_128": 1, **changes}
    )


def test_reads_registers_stack_and_wide_accesses() -> None:
    table = resources.parse_usage(USAGE.splitlines())
    resources.count_accesses(SASS.splitlines(), table)
    expected = usage(stack=8, local_loads=1, local_stores=1, shared_loads_128=1, global_loads_128=1)
    assert table == {(SYMBOL, "sm_90"): expected}


def test_names_are_short_and_foreign_kernels_left_out() -> None:
    assert resources.short_names([SYMBOL, "_ZN3cub6detail11EmptyKernelIvEEvv"]) == {SYMBOL: NAME}


def test_table_survives_writing_and_reading() -> None:
    table = {(NAME, "sm_90"): usage(stack=8), (NAME, "sm_100"): usage()}
    assert resources.load_table(resources.dump_table("13.2.86", table)) == ("13.2.86", table)
    text = resources.page("13.2.86", table)
    assert f"| `{NAME}` | sm_90 | 8 | 0 | 0 |" in text and "1 of the 2 builds" in text


def test_marks_of_streaming_kernels_are_read_from_the_sources() -> None:
    kernels = resources.streaming_kernels()
    assert kernels["focal_loss_backward_kernel"] == (2, 1)  # the logits and the gradient of the losses
    assert kernels["decode_candidates_kernel"] == (0, 1) and kernels["nms_kernel"] == (2, 2)
    marks = "".join(path.read_text() for path in (resources.ROOT / "csrc").rglob("*.*")).count("// 128-bit accesses: ")
    assert len(kernels) == marks >= 11


def test_a_streaming_kernel_needs_wide_accesses() -> None:
    complete = {
        (f"{name}<float>", "sm_90"): usage(global_loads_128=loads, global_stores_128=stores)
        for name, (loads, stores) in resources.streaming_kernels().items()
    }
    assert resources.streaming_faults(complete) == []
    narrow = {**complete, (NAME, "sm_90"): usage(global_stores_128=0)}
    assert len(resources.streaming_faults(narrow)) == 1
    backward = next(key for key in complete if key[0].startswith("focal_loss_backward_kernel"))
    one_of_two_loads = {**complete, backward: usage(global_loads_128=1)}
    assert len(resources.streaming_faults(one_of_two_loads)) == 1
    del complete["nms_kernel<float>", "sm_90"]
    assert resources.streaming_faults(complete) == ["nms_kernel: no such kernel in the library"]


@pytest.mark.parametrize(
    ("new", "compiler", "fault"),
    [
        (usage(), "1.0", None),
        (usage(registers=50), "1.0", "registers=50"),
        (usage(registers=50), "2.0", None),
        (usage(global_loads_128=1), "2.0", "(1, 1, 0, 0), the table: (2, 1, 0, 0)"),
        (usage(global_loads_128=3), "2.0", None),
        (usage(global_loads_128=3), "1.0", "global_loads_128=3"),
        (usage(stack=16), "2.0", "16 bytes of stack (the table: 8 bytes)"),
        (usage(stack=0), "2.0", None),
        (usage(stack=8, local_loads=2), "2.0", "2 loads"),
    ],
)
def test_faults_against_the_table(new: object, compiler: str, fault: str | None) -> None:
    old = {(NAME, "sm_90"): usage(stack=8) if fault or compiler == "2.0" else usage()}
    faults = resources.table_faults(compiler, {(NAME, "sm_90"): new}, "1.0", old)
    assert len(faults) == (fault is not None) and (fault is None or fault in faults[0])


def test_kernels_missing_on_one_side_are_faults() -> None:
    assert resources.table_faults("1.0", {}, "1.0", {(NAME, "sm_90"): usage()})
    assert resources.table_faults("1.0", {(NAME, "sm_90"): usage()}, "1.0", {})
    new_and_spilling = resources.table_faults("1.0", {(NAME, "sm_90"): usage(stack=8)}, "1.0", {})
    assert len(new_and_spilling) == 2 and "spills" in new_and_spilling[1]
