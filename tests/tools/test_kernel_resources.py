"""The table of the kernels' resources: parsing of machine code, the loops of a kernel, and the faults of a build."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.pages.kernel_resources import __main__ as program
from tools.pages.kernel_resources import library, loops, marks, page, table
from tools.pages.kernel_resources.library import Usage
from tools.pages.kernel_resources.loops import Loop
from tools.toolchain import toolkit_bin

SYMBOL = "_ZN9retinanet12_GLOBAL__N_117focal_loss_kernelIN3c104HalfENS_12ClassTargetsIiEEEEvPKT_T0_"
NAME = "focal_loss_kernel<Half, ClassTargets<int>>"
PLANTED = Path(__file__).parent / "planted"

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
                                                                      /* 0x0 */
        /*0010*/  @!P0 LDG.E R4, desc[UR4][R2.64] ;                   /* 0x0 */
        /*0020*/       LDS.U.128 R8, [R3] ;                           /* 0x0 */
        /*0030*/       STS.64 [R3], R8 ;                              /* 0x0 */
        /*0040*/       STL [R1], R9 ;                                 /* 0x0 */
        /*0050*/       LDL.LU.64 R9, [R1] ;                           /* 0x0 */
        /*0060*/       LDC.128 R9, c[0x0][0x28] ;                     /* 0x0 */
        /*0070*/       STG.E.128 desc[UR4][R2.64], R4 ;               /* 0x0 */
        /*0080*/       NOP ;                                          /* 0x0 */
"""
LOOPS = [Loop(0, 25, 0, 0, 1, 0), Loop(1, 100, 1, 1, 0, 0, 80)]


def usage(**changes: object) -> Usage:
    defaults = {"registers": 48, "shared": 1088, "global_loads_128": 2, "global_stores_128": 1, "instructions": 200}
    return Usage(**{**defaults, "loops": LOOPS, **changes})


def assemble(text: str) -> list[loops.Instruction]:
    """Return instructions from one line each. A label such as `L:` names the next line's address, as in `BRA L`."""
    lines, labels = [], {}
    for line in text.strip().splitlines():
        label, _, rest = line.strip().rpartition(":")
        labels[label] = f"{16 * len(lines):#06x}"
        lines.append(rest)
    code = []
    for number, line in enumerate(lines):
        for label, address in labels.items():
            line = line.replace(f" {label}", f" {address}") if label else line
        code.append(loops.parse_instruction(f"        /*{16 * number:04x}*/  {line.strip()} ;  /* 0x0 */"))
    return code


def test_reads_registers_stack_and_wide_accesses() -> None:
    parsed = library.parse_usage(USAGE.splitlines())
    ((key, code),) = library.parse_functions(SASS.splitlines())
    library.count_instructions(code, parsed[key])
    expected = usage(
        stack=8, local_loads=1, local_stores=1, shared_loads_128=1, global_loads_128=1, instructions=8, loops=[]
    )
    assert parsed == {(SYMBOL, "sm_90"): expected}


def test_names_are_short_and_foreign_kernels_left_out() -> None:
    assert library.short_names([SYMBOL, "_ZN3cub6detail11EmptyKernelIvEEvv"]) == {SYMBOL: NAME}


def test_a_missing_disassembler_is_a_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(library, "toolkit_bin", lambda *programs: None)
    with pytest.raises(library.ToolError, match=r"nothing was checked.*pip install 'nvidia-cuda-cuobjdump>=13.2'"):
        list(library.cuobjdump(Path("_cuda13.so"), "-elf"))


# ---- Loops -------------------------------------------------------------------------------------


def test_nested_loops_and_code_out_of_line() -> None:
    """The inner loop's rare path lies behind the end of the kernel's straight code."""
    code = assemble("""
        S2R R0, SR_TID.X
        OUTER: LDG.E.128 R4, desc[UR4][R2.64]
        INNER: FADD R4, R4, R5
        @P1 BRA RARE
        BACK: @P0 BRA INNER
        @!P2 STG.E.128.SYS [R2], R4
        BRA P3, OUTER
        STG.E [R2], R4
        EXIT
        RARE: CALL.REL.NOINC 0x9990
        FMUL R4, R4, R5
        BRA BACK
        END: BRA END
        NOP
    """)
    assert loops.find_loops(code) == [Loop(0, 3, 0, 0, 1, 0), Loop(1, 3, 1, 1, 0, 0), Loop(2, 6, 0, 0, 0, 0)]


def test_a_jump_backwards_into_straight_code_is_no_loop() -> None:
    code = assemble("""
        @P0 BRA RARE
        JOIN: EXIT
        RARE: FADD R4, R4, R5
        BRA JOIN
    """)
    assert loops.find_loops(code) == [Loop(0, 4, 0, 0, 0, 0)]


def test_the_shortest_way_round_a_loop() -> None:
    """The way of most iterations skips the rare path, a loop within it, and a load that some threads leave out."""
    code = assemble("""
        S2R R0, SR_TID.X
        LOOP: @!P1 LDG.E.128 R4, desc[UR4][R2.64]
        @P2 BRA RARE
        BACK: FADD R4, R4, R5
        NOP
        @P0 BRA LOOP
        EXIT
        RARE: STG.E [R2], R4
        INNER: FMUL R4, R4, R5
        @P1 BRA INNER
        BRA BACK
    """)
    outer = loops.hot_loop(loops.find_loops(code))
    assert outer is not None
    assert (outer.instructions, outer.shortest, outer.accesses, outer.per_access) == (6, 4, 1, 4)


def test_the_shortest_of_several_ways_with_packs() -> None:
    """Whole steps load two packs at once. The others load each pack on a way of its own."""
    code = assemble("""
        S2R R0, SR_TID.X
        LOOP: @P1 BRA WHOLE
        FADD R4, R4, R5
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R4, R4, R5
        BRA BACK
        WHOLE: LDG.E.128 R4, desc[UR4][R2.64]
        LDG.E.128 R8, desc[UR4][R2.64]
        BACK: @P0 BRA LOOP
        EXIT
    """)
    outer = loops.hot_loop(loops.find_loops(code))
    assert outer is not None
    assert (outer.shortest, outer.accesses, outer.per_access) == (4, 2, 2)


@pytest.mark.parametrize(("more", "is_a_loop"), [("NOP", False), ("FADD R4, R4, R5", True)])
def test_a_loop_that_only_waits_is_a_part_of_the_one_around_it(more: str, is_a_loop: bool) -> None:
    code = assemble(f"""
        S2R R0, SR_TID.X
        LOOP: LDG.E.128 R4, desc[UR4][R2.64]
        WAIT: VOTE.ANY R0, PT, P0
        YIELD
        {more}
        @P1 BRA WAIT
        @P0 BRA LOOP
        EXIT
    """)
    found = loops.find_loops(code)
    assert len(found) == (3 if is_a_loop else 2)
    assert (loops.hot_loop(found) is None) == is_a_loop


@pytest.mark.parametrize(
    "body",
    [
        "FADD R4, R4, R5",  # no wide access
        "LDG.E.128 R4, desc[UR4][R2.64]; CALL.REL.NOINC 0x9990",
        "LDG.E.128 R4, desc[UR4][R2.64]; INNER: FADD R4, R4, R5; @P1 BRA INNER",
    ],
)
def test_loops_without_a_shortest_way(body: str) -> None:
    """The shortest way has to pass a wide load, and neither calls a function nor enters an inner loop."""
    code = assemble("\n".join(["S2R R0, SR_TID.X", *f"LOOP: {body}".split("; "), "@P0 BRA LOOP", "EXIT"]))
    assert loops.hot_loop(loops.find_loops(code)) is None


def test_one_loop_is_hot() -> None:
    hot = Loop(1, 100, 2, 1, 0, 0, 80, 2)
    assert loops.hot_loop([LOOPS[0], hot, Loop(2, 9, 0, 0, 0, 0)]) == hot
    assert hot.per_access == 40  # per load, although it also stores
    assert Loop(1, 100, 0, 4, 0, 0, 80, 4).per_access == 20
    assert loops.hot_loop([LOOPS[0], hot, hot]) is None


@pytest.mark.parametrize(
    ("stores", "split"),
    [
        (["STG.E [R2], R4"] * 4, 4),
        (["@P0 STG.E [R2], R4"] * 4, 4),
        (["STG.E.U16.SYS [R2], R4"] * 6 + ["STG.E.SYS [R2], R4"], 7),
        (["STG.E.64 [R2], R4"] * 2, 2),
        # A few results of different tensors.
        (["STG.E [R2], R4"] * 3, 0),
        # The elements of an incomplete pack, each under its own condition.
        ([f"@P{k} STG.E [R2], R4" for k in range(4)], 0),
        (["ISETP.GE.AND P0, PT, R3, R2, PT", "@P0 STG.E [R2], R4"] * 4, 0),
        (["LOP3.LUT P0, RZ, R3, 0x1, RZ, 0xc0, !PT", "@!P0 STG.E [R2], R4"] * 4, 0),
        (["IADD3 R3, P0, R3, R2, RZ", "@P0 STG.E [R2], R4"] * 4, 0),
        (["STG.E.128 [R2], R4", "STS.64 [R2], R4", "STL [R1], R4"], 0),
    ],
)
def test_packs_that_are_stored_in_pieces(stores: list[str], split: int) -> None:
    assert loops.find_loops(assemble("\n".join([*stores, "EXIT"])))[0].split_stores == split


# ---- Marks -------------------------------------------------------------------------------------


def test_marks_are_read_from_the_sources(tmp_path: Path) -> None:
    (tmp_path / "sum_cuda.cu").write_text("""
// Adds.
// 128-bit accesses: 2 loads, 0 stores (backward also stores)
// 128-bit loops: loads
// Hot loop: one loop over packs takes nearly all of the time
// Not part of the mark.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const T* x);

// 128-bit accesses: 0 loads, 1 store
__global__ void fill_kernel(float* x);

__global__ void other_kernel(float* x);
""")
    assert marks.streaming_kernels(tmp_path) == {
        "sum_kernel": (2, 0, True, False, True),
        "fill_kernel": (0, 1, False, False, False),
    }
    assert marks.streaming_kernels(PLANTED)["wide_kernel"] == (1, 1, True, True, False)
    # Every mark in csrc is understood.
    kernels = marks.streaming_kernels()
    text = "".join(path.read_text() for path in (marks.ROOT / "csrc").rglob("*.*"))
    assert len(kernels) == text.count("// 128-bit accesses: ") >= 8
    loop_marks = sum(mark.loops_load or mark.loops_store for mark in kernels.values())
    assert loop_marks == text.count("// 128-bit loops: ") >= 3
    assert sum(mark.hot for mark in kernels.values()) == text.count("// Hot loop: ") >= 2


def test_a_streaming_kernel_needs_wide_accesses() -> None:
    complete = {
        (f"{name}<float>", "sm_90"): usage(global_loads_128=mark.loads, global_stores_128=mark.stores)
        for name, mark in marks.streaming_kernels(PLANTED).items()
    }
    key = ("wide_kernel<float>", "sm_90")
    assert marks.streaming_faults(complete, PLANTED) == []
    assert len(marks.streaming_faults({**complete, key: usage(global_loads_128=0)}, PLANTED)) == 1
    assert len(marks.streaming_faults({**complete, key: usage(global_stores_128=0)}, PLANTED)) == 1
    (fault,) = marks.streaming_faults({**complete, key: usage(loops=[LOOPS[0], Loop(1, 100, 2, 1, 7, 7)])}, PLANTED)
    assert "wide_kernel<float> on sm_90: loop 1 of 1 stores 16 bytes or more in 7 pieces" in fault
    del complete[key]
    assert marks.streaming_faults(complete, PLANTED) == ["wide_kernel: no such kernel in the library"]


@pytest.mark.parametrize(
    ("code", "mark", "fault"),
    [
        ([Loop(1, 9, 1, 0, 0, 0)], (True, True), None),  # a sum stores nothing in its loop
        ([Loop(1, 9, 1, 1, 4, 0)], (True, True), None),  # the ends of a row are stored element by element
        ([Loop(1, 9, 0, 0, 1, 0), Loop(1, 9, 1, 1, 0, 0)], (True, True), None),
        ([Loop(1, 9, 0, 0, 4, 4)], (False, False), None),
        ([Loop(1, 9, 0, 1, 0, 0)], (True, False), "no loop loads 128 bits"),
        ([Loop(1, 9, 1, 0, 4, 0)], (True, True), "loop 1 of 1 loads 128 bits, but its 4 stores are narrower"),
        (
            [Loop(1, 9, 1, 1, 0, 0), Loop(1, 9, 1, 1, 4, 4)],
            (True, True),
            "loop 2 of 2 stores 16 bytes or more in 4 pie",
        ),
        ([], (True, False), "no loop loads 128 bits"),
    ],
)
def test_marks_of_loops(code: list[Loop], mark: tuple[bool, bool], fault: str | None) -> None:
    faults = marks.loop_faults(marks.Mark(0, 0, *mark), usage(loops=[LOOPS[0], *code]))
    assert len(faults) == (fault is not None) and (fault is None or fault in faults[0])


def test_a_mark_of_a_hot_loop_needs_one() -> None:
    mark = marks.Mark(hot=True)
    assert marks.loop_faults(mark, usage()) == []
    (fault,) = marks.loop_faults(mark, usage(loops=[LOOPS[0], LOOPS[1]._replace(shortest=0)]))
    assert "expected one loop with 128-bit accesses and a way round it" in fault


# ---- The table ---------------------------------------------------------------------------------


def test_table_survives_writing_and_reading() -> None:
    rows = {(NAME, "sm_90"): usage(stack=8), (NAME, "sm_100"): usage(loops=[])}
    assert table.load_table(table.dump_table("13.2.86", rows)) == ("13.2.86", rows)
    text = page.page("13.2.86", rows)
    assert f"| `{NAME}` | sm_90 | 8 | 0 | 0 | none |" in text and "1 of the 2 builds" in text
    assert "| 80–100 (10–12) |" in text  # at least 80 instructions for 16 bytes of float16


@pytest.mark.parametrize(
    ("new", "compiler", "fault"),
    [
        (usage(), "1.0", None),
        (usage(registers=50), "1.0", "registers 50, the table: 48"),
        (usage(registers=50), "2.0", None),
        (usage(global_loads_128=1), "2.0", "(1, 1, 0, 0), the table: (2, 1, 0, 0)"),
        (usage(global_loads_128=3), "2.0", None),
        (usage(global_loads_128=3), "1.0", "global_loads_128 3"),
        (usage(stack=16), "2.0", "(16, 0, 0), the table: (8, 0, 0)"),
        (usage(stack=0), "2.0", None),
        (usage(stack=8, local_loads=2), "2.0", "(8, 2, 0)"),
        (usage(instructions=210), "1.0", "out of date: instructions 210, the table: 200"),
        (usage(instructions=240), "1.0", "the kernel has 240 instructions, the table: 200 (+20%, allowed: +10%)"),
        (usage(instructions=240), "2.0", None),
        (usage(loops=[LOOPS[0], LOOPS[1]._replace(instructions=120)]), "1.0", "loop 1 of 1 has 120 instructions"),
        (usage(loops=[LOOPS[0], LOOPS[1]._replace(instructions=120)]), "2.0", None),
        (usage(loops=[LOOPS[0], LOOPS[1]._replace(shortest=96)]), "1.0", "shortest way round loop 1 of 1 has 96"),
        (usage(loops=[LOOPS[0]._replace(instructions=29), LOOPS[1]]), "1.0", "out of date: loops"),
        (usage(loops=[LOOPS[0]._replace(instructions=30), LOOPS[1]]), "1.0", "the code outside loops has 30"),
        (usage(loops=[LOOPS[0], LOOPS[1]._replace(wide_stores=0)]), "1.0", "loop 1 of 1 has 1 loads and 0 stores of"),
        (usage(loops=[*LOOPS, LOOPS[1]._replace(instructions=20)]), "1.0", "all loops has 120 instructions"),
        (usage(loops=[*LOOPS, LOOPS[1]._replace(instructions=10)]), "1.0", "out of date: loops"),
    ],
)
def test_faults_against_the_table(new: Usage, compiler: str, fault: str | None) -> None:
    old = {(NAME, "sm_90"): usage(stack=8) if new.stack or (compiler == "2.0" and not fault) else usage()}
    faults = table.table_faults(compiler, {(NAME, "sm_90"): new}, "1.0", old)
    assert len(faults) == (fault is not None) and (fault is None or fault in faults[0]), faults


def test_kernels_missing_on_one_side_are_faults() -> None:
    assert table.table_faults("1.0", {}, "1.0", {(NAME, "sm_90"): usage()})
    assert table.table_faults("1.0", {(NAME, "sm_90"): usage()}, "1.0", {})


def test_spills_need_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(table, "SPILLS", {(NAME, "sm_90"): "a value stored once"})
    spilling = usage(stack=8, local_loads=1, local_stores=1)
    assert table.spill_faults({(NAME, "sm_90"): spilling, (NAME, "sm_75"): usage()}) == []
    (fault,) = table.spill_faults({(NAME, "sm_90"): spilling, (NAME, "sm_75"): spilling})
    assert "on sm_75: spills" in fault and "(8, 1, 1)" in fault
    (fault,) = table.spill_faults({(NAME, "sm_90"): usage()})
    assert "on sm_90: does not spill" in fault


# ---- Planted kernels ---------------------------------------------------------------------------


needs_nvcc = pytest.mark.skipif(toolkit_bin("nvcc", "cuobjdump", "nvdisasm") is None, reason="needs nvcc and cuobjdump")


def compile_planted(folder: Path, arch: str) -> Path:
    built = folder / "planted.fatbin"
    nvcc = toolkit_bin("nvcc", "cuobjdump", "nvdisasm") / "nvcc"
    options = ["-fatbin", "-w", f"-arch={arch}", "-o", str(built)]
    subprocess.run([str(nvcc), *options, str(PLANTED / "streams_cuda.cu")], check=True)
    return built


@needs_nvcc
@pytest.mark.parametrize("arch", library.LOOP_ARCHS)
def test_planted_kernels(tmp_path: Path, arch: str) -> None:
    """A kernel that lost its wide stores and one with 20 % more instructions are faults in compiled code."""
    rows = library.read_library(compile_planted(tmp_path, arch))
    (fault,) = marks.streaming_faults(rows, PLANTED)
    assert fault == f"split_kernel on {arch}: loop 1 of 1 loads 128 bits, but its 4 stores are narrower"
    right, split, longer = (rows[f"{name}_kernel", arch] for name in ("wide", "split", "longer"))
    faults = table.row_faults(split, right, same_compiler=True)
    assert any("loop 1 of 1 has 1 loads and 0 stores of 128 bits" in fault for fault in faults), faults
    faults = table.row_faults(longer, right, same_compiler=True)
    assert 1.15 < longer.loops[1].instructions / right.loops[1].instructions < 1.3
    assert any("loop 1 of 1 has" in fault and "allowed: +10%" in fault for fault in faults), faults
    assert table.row_faults(right, right, same_compiler=True) == []


@needs_nvcc
def test_the_check_fails_on_planted_kernels(tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["kernel_resources", "--library", str(compile_planted(tmp_path, "sm_90")), "--sources"]
    monkeypatch.setattr(program, "TABLE", tmp_path / "kernels.json")
    monkeypatch.setattr(program, "PAGE", tmp_path / "kernels.md")
    monkeypatch.setattr(table, "SPILLS", {})

    def check(sources: Path, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*arguments, str(sources), *options])
        status = program.main()
        return status, capsys.readouterr().err

    assert check(tmp_path) == (0, "")
    assert check(tmp_path, "--check") == (0, "")
    status, errors = check(PLANTED, "--check")
    assert status == 1 and "split_kernel on sm_90: loop 1 of 1 loads 128 bits, but its 4 stores are narrower" in errors
    # The kernel becomes longer than the table says.
    compiler, rows = table.load_table(program.TABLE.read_text())
    rows["longer_kernel", "sm_90"] = rows["wide_kernel", "sm_90"]
    program.TABLE.write_text(table.dump_table(compiler, rows))
    program.PAGE.write_text(page.page(compiler, rows))
    status, errors = check(tmp_path, "--check")
    assert status == 1 and "longer_kernel on sm_90: loop 1 of 1 has" in errors and "allowed: +10%" in errors
    monkeypatch.setattr(library, "toolkit_bin", lambda *programs: None)
    status, errors = check(tmp_path, "--check")
    assert status == 2 and "nothing was checked, because there is no disassembler" in errors
