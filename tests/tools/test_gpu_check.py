"""gpu_check: stages that pass, fail, hang or lack a tool, and the results that are read from their output."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.gpu_check import probe as gpu_probe
from tools.gpu_check import report, requirements
from tools.gpu_check import runner as runner_module
from tools.gpu_check.runner import ROOT, Missing, Runner, Stage


def python(*programs: str) -> list[list[str]]:
    return [[sys.executable, "-c", program] for program in programs]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "out", budget=60, rehearse=False)


class TestStages:
    def test_passed_and_failed(self, runner):
        assert runner.run(Stage("good", 30, lambda: python("print(1)", "print(2)"))).status == "passed"
        result = runner.run(Stage("bad", 30, lambda: python("print('why'); exit(3)", "print('never')")))
        assert result.status == "failed" and result.log == ["why"]
        written = json.loads((runner.out / "gpu_check.json").read_text())
        assert [stage["status"] for stage in written["stages"]] == ["passed", "failed"]
        assert "not passed: bad" in (runner.out / "gpu_check.md").read_text()

    def test_all_commands_run_after_a_failure(self, runner):
        stage = Stage("both", 30, lambda: python("exit(3)", "print('second')"), all_commands=True)
        result = runner.run(stage)
        assert result.status == "failed" and result.log == ["second"]

    def test_a_stage_that_hangs_is_stopped_with_its_children(self, runner, tmp_path, monkeypatch):
        monkeypatch.setattr(runner_module, "LEAST_SECONDS", 0.0)
        child = f"import time; time.sleep(2.5); open({str(tmp_path / 'alive')!r}, 'w')"
        program = (
            f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
        )
        result = runner.run(Stage("hangs", 1.5, lambda: python(program)))
        assert result.status == "unfinished" and result.log == ["begun"] and "stopped after" in result.note
        time.sleep(2)
        assert not (tmp_path / "alive").exists()

    def test_tools_beside_python_are_found(self, runner):
        program = "import os, sys; exit(os.environ['PATH'].split(os.pathsep)[0] != os.path.dirname(sys.executable))"
        assert runner.run(Stage("path", 30, lambda: python(program))).status == "passed"

    def test_verdict_names_everything_that_was_skipped(self, runner):
        def lacking() -> list[list[str]]:
            raise Missing("no such-tool")

        def left_out(log: str, status: int) -> tuple[dict[str, list[str]], bool]:
            return {"left_out": ["test_nms.py (no hypothesis)"]}, True

        def verdict() -> str:
            return (runner.out / "gpu_check.md").read_text().splitlines()[2].split("**")[1]

        runner.run(Stage("good", 30, lambda: python("print(1)")))
        assert verdict() == "passed"
        runner.run(Stage("racecheck", 30, lacking))
        runner.run(Stage("tests", 30, lambda: python("print(1)"), left_out))
        assert verdict() == "passed, but skipped: racecheck (no such-tool), test_nms.py (no hypothesis)"
        runner.run(Stage("build", 30, lacking))
        assert verdict() == "not passed: build"

    def test_old_setuptools_cannot_build(self, monkeypatch):
        requirements.need_setuptools()
        monkeypatch.setattr(requirements.importlib.metadata, "version", lambda name: "76.1.0")
        with pytest.raises(Missing, match=r"setuptools 76\.1\.0 is older than 77"):
            requirements.need_setuptools()

    def test_without_time_or_tool_nothing_is_run(self, runner):
        def lacking() -> list[list[str]]:
            raise Missing("no such-tool")

        assert runner.run(Stage("tool", 30, lacking)).status == "skipped"
        runner.deadline = time.monotonic()
        result = runner.run(Stage("late", 30, lambda: python("print(1)")))
        assert (result.status, result.note) == ("unfinished", "no time left")

    def test_output_that_cannot_be_read_fails(self, runner):
        stage = Stage("mute", 30, lambda: python("print('no JSON')"), lambda log, _: (report.last_json(log), True))
        assert runner.run(stage).status == "failed"

    def test_test_files_with_missing_imports_are_left_out(self, monkeypatch):
        files, left_out = requirements.op_tests()
        assert left_out == []
        assert {f"tests/ops/{path.name}" for path in (ROOT / "tests" / "ops").glob("test_*.py")} == set(files)
        find_spec = requirements.importlib.util.find_spec
        monkeypatch.setattr(
            requirements.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find_spec(name)
        )
        files, left_out = requirements.op_tests()
        assert "tests/ops/test_focal_loss.py" in files and "test_matching.py (no hypothesis)" in left_out


def sanitizer_log(*blocks: str, summary: str = "ERROR SUMMARY: 0 errors", end: str = "{}") -> str:
    return "\n".join(["========= COMPUTE-SANITIZER", *blocks, end, f"========= {summary}", ""])


def finding(kernel: str) -> str:
    return f"""=========
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}(int *)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: main in retinanet_ops/_cuda13.so
========="""


RACE = """=========
========= Error: Race reported between Write access at void retinanet::<unnamed>::nms_kernel<float>(T1)+0x70
=========     and Read access at void retinanet::<unnamed>::nms_kernel<float>(T1)+0x90 [12 hazards]
========="""


class TestReaders:
    @pytest.mark.parametrize(
        ("log", "status", "filtered", "all_kernels", "ours"),
        [
            (sanitizer_log(), 0, True, True, 0),
            (sanitizer_log(finding("at::native::copy"), summary="ERROR SUMMARY: 1 error"), 9, False, True, 0),
            (sanitizer_log(finding("nms_kernel<float>"), summary="ERROR SUMMARY: 1 error"), 9, False, True, 0),
            (sanitizer_log(finding("retinanet::nms_kernel"), summary="ERROR SUMMARY: 1 error"), 9, False, False, 1),
            (sanitizer_log(RACE, summary="RACECHECK SUMMARY: 1 hazard displayed (1 error)"), 9, False, False, 1),
            (sanitizer_log(), 9, False, True, 0),
            (sanitizer_log(end="Traceback"), 0, False, False, 0),
        ],
    )
    def test_sanitizer_findings(self, log, status, filtered, all_kernels, ours):
        results, verdict = report.sanitizer_findings(log, status, filtered=False)
        assert verdict == all_kernels and len(results["ours"]) == ours
        assert report.sanitizer_findings(log, status, filtered=True)[1] == filtered

    def test_sanitizer_that_does_not_work_on_the_device(self):
        assert report.sanitizer_findings("========= Error: Device not supported", 1, filtered=True)[0]["missing"]
        assert report.sanitizer_findings("Segmentation fault", -11, filtered=False)[1] is False

    def test_counts_of_tests(self, tmp_path):
        cases = """<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>
            <testcase classname="a" name="left"><skipped message="no tool"/></testcase>"""
        (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        counts = report.test_counts(tmp_path / "junit.xml")
        assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
        assert counts["failures"] == ["a::bad"] and counts["skip_reasons"] == ["no tool"]

    def test_counts_of_tests_that_were_stopped(self, runner, tmp_path):
        junit = tmp_path / "junit.xml"
        junit.write_text("<testsuites><testsuite>")
        stage = Stage("tests", 30, lambda: python("exit(1)"), lambda log, status: (report.test_counts(junit), True))
        result = runner.run(stage)
        assert result.status == "failed" and "junit.xml: no element found" in result.results["unreadable"]

    def test_bits_that_differ(self):
        x = torch.tensor([0.0, float("nan"), 1.0])
        assert gpu_probe.difference(x, x.clone()) is None
        assert gpu_probe.difference(-x, x).startswith("3 of 3 differ, the first at 0: -0.0 instead of 0.0")
        assert gpu_probe.difference(x, x.double()) is not None
        assert gpu_probe.difference(x[:0], x[:0]) is None
        assert gpu_probe.distance(x, x + 1e-6, 1e-5) is None and gpu_probe.distance(x, x + 1e-4, 1e-5) is not None

    def test_kernels_are_found_in_the_source(self):
        names = gpu_probe.kernels_in_source()
        assert {"nms_kernel", "focal_loss_rows_kernel", "select_level_kernel", "map_rows_kernel"} <= names
        sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.*"))
        assert len(names) == sources.count("__global__")


class TestProbe:
    @pytest.fixture
    def probe(self, monkeypatch, capsys):
        """Run a command of the probe in this process and return its exit status and the JSON of its last line."""

        def run(*arguments: str) -> tuple[int, dict[str, object]]:
            monkeypatch.setattr(sys, "argv", ["probe", *arguments])
            monkeypatch.setattr(sys, "path", sys.path[:])
            status = gpu_probe.main()
            return status, report.last_json(capsys.readouterr().out)

        return run

    def test_results_are_stored_and_compared(self, probe, tmp_path):
        file = tmp_path / "results.pt"
        options = (str(file), "--backend", "cpu", "--small")
        status, result = probe("results", *options)
        assert status == 0 and result["differences_between_runs"] == {} and result["cases"] > 30
        status, result = probe("compare", *options)
        assert status == 0 and result["differences"] == {} and result["integers_among_them"] > 10_000

        stored = torch.load(file)
        name = next(name for name in stored if name.startswith("matching"))
        stored[name][0]["labels"][0, 0] += 1
        torch.save({**stored, "gone": ({}, {})}, file)
        status, result = probe("compare", *options)
        assert status == 1 and result["differences"].keys() == {f"{name}, labels", "gone"}

    @pytest.mark.once  # kernel-coverage is to count what tests look at
    @pytest.mark.backends("emulated")
    def test_every_kernel_has_a_case(self, probe):
        status, result = probe("kernels", "--backend", "emulated")
        assert status == 0 and result["never_launched"] == []
        assert result["launches"].keys() == gpu_probe.kernels_in_source()


class TestProbeProcess:
    """The probe in a separate process, as gpu_check runs it. That process must load the emulated kernels itself."""

    @pytest.mark.once
    @pytest.mark.backends("emulated")
    @pytest.mark.parametrize("command", ("results", "small"))
    def test_a_rehearsal_runs_the_emulated_kernels(self, command, tmp_path):
        arguments = [str(tmp_path / "results.pt"), "--small"] if command == "results" else []
        program = [sys.executable, "-m", "tools.gpu_check.probe", command, *arguments, "--backend", "emulated"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        kernels = report.last_json(result.stdout)["kernels"]
        assert kernels["compiler"] == "emulation of CUDA"
        assert Path(kernels["package"]) == ROOT / "build" / "emulated" / "plain" / "retinanet_ops"
