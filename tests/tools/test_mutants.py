"""The mutants that are proposed for kernels, the keys of their results, and the page about them."""

import json
import sys
from pathlib import Path

import pytest

import tools.mutants.__main__ as program
from tools.mutants import mutations, sources, tree
from tools.mutants.report import page as report_page

ROOT = Path(__file__).resolve().parents[2]

SAMPLE = """\
#include <vector>
// A comment: if (a < b) __syncthreads();
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const T* x, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (i + 1 < n && active) sum += x[i];  // stays: i < n
  }
  __syncthreads();
  best = __shfl_down_sync(kFullMask, best, 1);
  const bool mine = ratio >= T(0) ? true : false;
}
HOST_DEVICE int twice(int v) { return v == 0 ? 1 : 2 * v; }
#ifdef __CUDA_ARCH__
HOST_DEVICE bool hidden(int v) { return v < 0; }
#else
HOST_DEVICE bool shown(int v) { return v < 0; }
#endif
void host(int n) {
  if (n <= 0) return;
}
"""


def proposed() -> dict[int, list[str]]:
    changes: dict[int, list[str]] = {}
    for mutant in mutations.mutants("sample.cu", SAMPLE):
        assert SAMPLE.splitlines()[mutant.number] == mutant.before
        changes.setdefault(mutant.number + 1, []).append(mutant.after.strip())
    return changes


def test_each_line_of_device_code_has_its_mutants() -> None:
    assert proposed() == {
        6: [
            "for (int i = threadIdx.x; i <= n; i += kThreads) {",
            "for (int i = threadIdx.x; i + 1 < n; i += kThreads) {",
        ],
        7: [
            "if (i + 1 <= n && active) sum += x[i];  // stays: i < n",
            "if (i + 1 + 1 < n && active) sum += x[i];  // stays: i < n",
            "if (true && active) sum += x[i];  // stays: i < n",
            "if (true) sum += x[i];  // stays: i < n",
            "if (i + 1 < n && true) sum += x[i];  // stays: i < n",
        ],
        9: [";"],
        10: ["best = __shfl_down_sync(0x0000ffffu, best, 1);"],
        11: ["const bool mine = ratio > T(0) ? true : false;", "const bool mine = true ? true : false;"],
        13: [
            "HOST_DEVICE int twice(int v) { return v != 0 ? 1 : 2 * v; }",
            "HOST_DEVICE int twice(int v) { return true ? 1 : 2 * v; }",
        ],
        17: [
            "HOST_DEVICE bool shown(int v) { return v <= 0; }",
            "HOST_DEVICE bool shown(int v) { return v + 1 < 0; }",
            "HOST_DEVICE bool shown(int v) { return true; }",
        ],
    }


@pytest.mark.parametrize(
    ("line", "guard"),
    [
        ("for (int i = 0; i < size && j < columns; ++i)", "for (int i = 0; i < size && true; ++i)"),
        ("while (l + 1 < count && e >= level[l + 1].first) ++l;", "while (l + 1 < count && true) ++l;"),
        ("const int64_t i = c >= count ? -1 : order ? 1 : 2;", "const int64_t i = true ? -1 : order ? 1 : 2;"),
        ("if (!(v >= lowest)) continue;", "if (!(true)) continue;"),
        ("reached |= best[i] >= so_far;", "reached |= true;"),
        ("const bool off = rule != Rule::kOff;", "const bool off = true;"),
        ("f(key, [&](auto&& visit) { visit(key); });", None),
        ("sum += x << shift;", None),
    ],
)
def test_guards(line: str, guard: str | None) -> None:
    text = f"__device__ void f() {{\n  {line}\n}}\n"
    guards = [mutant.after.strip() for mutant in mutations.mutants("f.h", text) if mutant.kind == "guard"]
    assert guard in guards if guard else guards == []


@pytest.mark.parametrize(
    ("line", "shifted"),
    [
        ("const bool active = a < batch.num_anchors;", "const bool active = a + 1 < batch.num_anchors;"),
        ("if (threadIdx.x < size) {}", "if (threadIdx.x + 1 < size) {}"),
        ("if (threadIdx.x < kWarp)", "if (threadIdx.x + 1 < kWarp)"),
        ("f(threadIdx.x < kThreads / kWarp ? x : 0);", "f(threadIdx.x + 1 < kThreads / kWarp ? x : 0);"),
        ("for (int w = 0; w < kWords; ++w) g(w);", "for (int w = 0; w + 1 < kWords; ++w) g(w);"),
        ("for (int b = 0; active && b < 32; ++b) {}", "for (int b = 0; active && b + 1 < 32; ++b) {}"),
        ("for (int w = 0; w < t / 32; ++w) g(w);", "for (int w = 0; w + 1 < t / 32; ++w) g(w);"),
        ("for (int w = 0; w < warp; ++w) g(w);", "for (int w = 0; w + 1 < warp; ++w) g(w);"),
        ("return int64_t(count) > limit ? limit : 0;", "return int64_t(count) - 1 > limit ? limit : 0;"),
        ("if (c >= count) return;", "if (c + 1 >= count) return;"),
        ("return b < a ? b : a;", None),
        ("return low > limit ? limit : low;", None),
        ("return w > T(0) && h < inf;", None),
        ("return x < 0 ? e : 1;", None),
        ("const T bounded = p.softplus > kMax ? kMax : p.softplus;", None),
    ],
)
def test_comparisons_of_indices_are_shifted(line: str, shifted: str | None) -> None:
    text = f"__device__ void f() {{\n  {line}\n}}\n"
    shifts = [mutant.after.strip() for mutant in mutations.mutants("f.h", text) if mutant.kind == "shift"]
    assert shifts == ([shifted] if shifted else [])


@pytest.mark.parametrize(
    ("line", "compares"),
    [
        ("const int n = left < most ? left : most;", False),
        ("const int n = int(left < most ? int(left) : most);", False),
        ("const int n = left >= most ? most : left;", False),
        ("const int n = left < most ? most : other;", True),
        ("const T x = a < b ? a : b;", True),  # floats: differs for NaN and signed zeros
        ("static_assert(kRows < 4);", None),
        ("if constexpr (kRows < 4) f();", None),
    ],
)
def test_equivalent_mutants_and_constant_expressions_are_left_out(line: str, compares: bool | None) -> None:
    kinds = {m.kind for m in mutations.mutants("f.h", f"__device__ void f() {{\n  {line}\n}}\n")}
    assert kinds == set() if compares is None else ("compare" in kinds) == compares and kinds


def chosen(code: str, number: int) -> str:
    """Return the code of `mutations.switched` with the mutant of this number selected."""
    while "mutant_is(" in code:
        # The last switch is innermost, so neither of its alternatives contains another switch.
        start = code.rindex("mutant_is(")
        this = int(code[start + len("mutant_is(") :].split(")")[0]) == number
        rest = code[code.index(")", start) + 1 :]
        end = mutations.closing(rest, rest.index("(")) if "(" in rest else None
        if code[:start].endswith("{ if (!"):
            statement, after = rest[2:].split(" }", 1)
            code = code[: start - len("{ if (!")] + (";" if this else statement) + after
            continue
        assert code[start - 1] == "(" and end is not None
        first = rest[rest.index("(") + 1 : end]
        tail = rest[end + 1 :]
        if rest.startswith(" || "):
            code = code[: start - 1] + ("true" if this else first) + tail[1:]
        else:
            close = mutations.closing(tail, tail.index("("))
            assert rest.startswith(" ? ") and close is not None
            code = code[: start - 1] + (first if this else tail[tail.index("(") + 1 : close]) + tail[close + 2 :]
    return code


def test_a_switched_file_can_become_each_of_its_mutants() -> None:
    numbers = {mutant: number for number, mutant in enumerate(mutations.mutants("sample.cu", SAMPLE), 1)}
    text = mutations.switched(SAMPLE, numbers)
    assert chosen(text, 0) == SAMPLE
    for mutant, number in numbers.items():
        assert chosen(text, number) == mutations.apply(SAMPLE, mutant)


def test_ids_do_not_depend_on_line_numbers_and_differ() -> None:
    before = mutations.mutants("sample.cu", SAMPLE)
    after = mutations.mutants("sample.cu", "\n\n" + SAMPLE)
    assert [mutant.id for mutant in before] == [mutant.id for mutant in after]
    twice = mutations.mutants("sample.cu", SAMPLE + SAMPLE)
    assert len({mutant.id for mutant in twice}) == len(twice) == 2 * len(before)
    assert {mutant.id for mutant in before} < {mutant.id for mutant in twice}


def test_a_mutant_changes_one_line() -> None:
    for mutant in mutations.mutants("sample.cu", SAMPLE):
        changed = mutations.apply(SAMPLE, mutant)
        pairs = zip(SAMPLE.splitlines(), changed.splitlines(), strict=True)
        assert sum(a != b for a, b in pairs) == 1
    with pytest.raises(ValueError, match="line 6 of sample.cu is not"):
        mutations.apply("\n" * 20, mutations.mutants("sample.cu", SAMPLE)[0])


def test_page_lists_survivors_and_faults() -> None:
    everything = mutations.mutants("sample.cu", SAMPLE)
    judged = {mutant.id: {"stage": "races", "by": "test_nms.py::test"} for mutant in everything[2:]}
    judged[everything[1].id] = {"stage": "", "by": ""}
    text, faults = report_page(everything, judged, {"gone": "no proof", everything[2].id: "wrong"})
    assert [fault.split(":")[0] for fault in faults] == [
        "survives",
        "proof of a mutant that does not exist",
        "killed, though proven equivalent",
        "not run",
    ]
    assert "## Survivors" in text and "races: test_nms.py::test" in text
    judged[everything[0].id] = judged[everything[1].id]
    proofs = {mutant.id: "changes nothing" for mutant in everything[:2]}
    text, faults = report_page(everything, judged, proofs)
    assert faults == [] and "## Survivors" not in text and text.count("changes nothing") == 2


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make tools.mutants work on a project with one kernel and two headers."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "csrc" / "sample_cuda.cu").write_text('#include "sample.h"\n' + SAMPLE)
    (tmp_path / "csrc" / "sample.h").write_text('#include "more.h"\n')
    (tmp_path / "csrc" / "more.h").write_text("// nothing\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    for name in ("RESULTS", "EQUIVALENT", "PAGE"):
        monkeypatch.setattr(program, name, tmp_path / "docs" / getattr(program, name).name)
    return tmp_path


def keys(project: Path) -> dict[str, str]:
    texts = sources.sources_of("sample_cuda.cu", project / "csrc")
    proposals = mutations.mutants("sample_cuda.cu", texts["sample_cuda.cu"])
    return {mutant.id: sources.key_of(mutant, texts) for mutant in proposals}


def test_results_hold_until_a_source_of_the_op_changes(project: Path) -> None:
    before = keys(project)
    assert len(set(before.values())) == len(before) and keys(project) == before
    (project / "csrc" / "other.h").write_text("// not included\n")
    assert keys(project) == before
    (project / "csrc" / "more.h").write_text("constexpr int kMore = 1;\n")
    after = keys(project)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_results_survive_changes_of_comments_and_layout(project: Path) -> None:
    before = keys(project)
    path = project / "csrc" / "sample_cuda.cu"
    text = path.read_text()
    head = "__global__ void __launch_bounds__(kThreads)"
    for old, new in (
        ("// A comment: if (a < b) __syncthreads();", '/* Other words,\n   "quoted". */\n\n'),
        ("// stays: i < n", ""),
        (f"{head}\n    sample_kernel(", f"{head} sample_kernel(\n    "),
    ):
        assert old in text
        path.write_text(path.read_text().replace(old, new))
    (project / "csrc" / "more.h").write_text("\n// Still nothing.\n")
    assert keys(project) == before


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("int f( int a,\n      int b );", "int f(int a, int b);", True),
        ("x = a; // b", "x = a;", True),
        ('s = "// no comment";', 's = "";', False),
        ('s = "two  spaces";', 's = "two   spaces";', False),
        ("a - -b;", "a--b;", False),
        ("#define A 1 \\\n  + 2\nint a;", "#define A 1 \\\n  + 2 // two\n\nint  a;", True),
        ("#define A 1\nint a;", "#define A\n1 int a;", False),
        ("c = '\"'; // \"", "c = '\"';", True),
    ],
)
def test_layout_is_removed_and_nothing_else(one: str, other: str, same: bool) -> None:
    assert (sources.without_layout(one) == sources.without_layout(other)) == same


def test_report_fails_until_every_mutant_is_killed_or_proven_equivalent(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(option: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["tools.mutants", option])
        return program.main(), capsys.readouterr().err.splitlines()

    names = keys(project)
    assert ends("--check") == (1, [f"not run: {len(names)} mutants", "mutants.md is out of date"])
    assert not program.PAGE.exists()
    results = {key: {"stage": "races", "by": "test_nms.py::test"} for key in names.values()}
    program.store(results)
    assert ends("--report") == (1, ["mutants.md is out of date"])
    assert ends("--report") == ends("--check") == (0, [])
    first = next(iter(names))
    program.store({**results, names[first]: {"stage": "", "by": "", "passed": ["plain fifo"]}})
    assert ends("--check") == (1, ["not run: 1 mutants", "mutants.md is out of date"])
    passed = ["plain fifo", "asan", "races", *(stage.name for stage in tree.ORDERS), "plain fifo, once"]
    program.store({**results, names[first]: {"stage": "", "by": "", "passed": passed}})
    page = program.PAGE.read_text()
    assert ends("--check") == (1, [f"survives: {first}", "mutants.md is out of date"])
    assert program.PAGE.read_text() == page
    assert ends("--report")[0] == 1 and ends("--report") == (1, [f"survives: {first}"])
    program.EQUIVALENT.write_text(json.dumps({first: "changes nothing"}))
    assert ends("--report") == (1, ["mutants.md is out of date"]) and ends("--report") == (0, [])


def test_kernels_have_mutants_and_proofs_belong_to_them() -> None:
    csrc = ROOT / "csrc"
    files = sources.mutated_files(csrc)
    by_file = {name: mutations.mutants(name, (csrc / name).read_text()) for name in files}
    assert all(by_file[name] for name in files if name.endswith(".cu"))
    barriers = sum(mutant.kind == "barrier" for name in files for mutant in by_file[name])
    texts = [(csrc / name).read_text() for name in files]
    calls = ("__syncthreads();", "__syncwarp();", "__threadfence();")
    assert barriers == sum(text.count(call) for text in texts for call in calls)
    ids = {mutant.id for name in files for mutant in by_file[name]}
    assert len(ids) == sum(map(len, by_file.values()))
    assert set(json.loads(program.EQUIVALENT.read_text())) <= ids
    assert sources.ops_of("soft_nms.h", csrc) == ["soft_nms"]
    assert set(sources.ops_of("matching.h", csrc)) == {"matching", "assign_points"}
    assert set(sources.ops_of("box_coding.h", csrc)) == {"box_coding", "dense_box_loss", "detect"}
