"""benchmarks/gpu_check.py without a GPU: its commands are answered by a stand-in."""

import importlib.util
import json
import sys
from pathlib import Path

import compiler
import pytest

SPEC = importlib.util.spec_from_file_location("gpu_check", compiler.ROOT / "benchmarks" / "gpu_check.py")
assert SPEC is not None and SPEC.loader is not None
gpu_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_check)

FACTS = {"device": "NVIDIA H200", "torch": "2.11.0+cu130", "kernels": {"CUDA": "libncpvae_cuda.so"}}
TESTED = "....\nFAILED tests/ops/test_a.py::test_one - AssertionError\n=== 1 failed, 653 passed, 2 skipped in 12.3s ==="
ANSWERS = {  # a word of the command → (exit status, output)
    "cmake": (0, "built"),
    "-c": (0, json.dumps(FACTS)),
    "nvidia-smi": (0, "580.65.06, 1980 MHz, 700.00 W\n"),
    "nvcc": (0, "release 13.0"),
    "memcheck": (0, "12 passed in 9s\n========= ERROR SUMMARY: 0 errors\n"),
    "racecheck": (0, "12 passed in 9s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"),
    "pytest": (0, "=== 654 passed, 2 skipped in 12.3s ==="),
    "benchmarks/": (0, 'warming up\n{"op": "sir_resample", "median_us": {"ncpvae": 3.5}}\n{"op": "other"}\n'),
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """gpu-check with answers of ours, on a machine that has every tool: (all is well, the file's content, its name)."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")

    def run_it(**changed):
        answers, commands = {**ANSWERS, **changed}, []

        def run(command):
            commands.append(list(command))
            answer = next(answer for word, answer in answers.items() if any(word in part for part in command))
            if "--output" in command:
                Path(command[command.index("--output") + 1]).write_text(answer[1])
            return answer

        ok, path = gpu_check.check(gpu_check.STEPS, run, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        return ok, json.loads(path.read_text()), path.name, commands

    return run_it


def test_all_is_written_where_all_is_well(check):
    ok, result, name, commands = check()
    steps = result["steps"]
    assert ok and result["ok"] and name == "gpu-check-nvidia-h200.json"
    assert list(steps) == ["build", "machine", "tests", "memcheck", "racecheck", "benchmarks"]
    assert steps["machine"]["device"] == "NVIDIA H200" and steps["machine"]["driver"].startswith("580.65.06")
    assert steps["tests"]["passed"] == 654 and steps["tests"]["failed_tests"] == []
    assert steps["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert steps["racecheck"]["summary"].startswith("RACECHECK SUMMARY: 0 hazards")
    files = sorted(path.name for path in (compiler.ROOT / "benchmarks").glob("bench_*.py"))
    assert files == [command[1].removeprefix("benchmarks/") for command in commands if "--output" in command]
    assert [record["op"] for record in steps["benchmarks"]["records"]] == ["sir_resample", "other"] * len(files)
    assert any("-DNCPVAE_CUDA=ON" in command for command in commands)


@pytest.mark.parametrize(
    ("step", "word", "answer"),
    [
        ("build", "cmake", (2, "nvcc fatal")),
        ("tests", "pytest", (1, TESTED)),
        ("tests", "pytest", (0, "no tests ran in 0.01s")),
        ("memcheck", "memcheck", (86, "========= ERROR SUMMARY: 3 errors")),
        ("racecheck", "racecheck", (86, "========= RACECHECK SUMMARY: 1 hazard displayed")),
        ("benchmarks", "benchmarks/", (1, '{"op": "half"}\nTraceback …')),
        ("benchmarks", "benchmarks/", (0, "not a record")),
    ],
)
def test_a_failing_step_is_named_and_costs_the_others_nothing(step, word, answer, check):
    ok, result, name, _ = check(**{word: answer})
    assert not ok and not result["ok"] and name == "gpu-check-nvidia-h200.json"
    assert {name: record["ok"] for name, record in result["steps"].items()} == {
        name: name != step for name in gpu_check.STEPS
    }


def test_what_failed_can_be_read_from_the_file(check):
    _, result, *_ = check(pytest=(1, TESTED), racecheck=(86, "========= RACECHECK SUMMARY: 1 hazard displayed"))
    tests, racecheck = result["steps"]["tests"], result["steps"]["racecheck"]
    assert tests["failed"] == 1 and tests["passed"] == 653 and tests["skipped"] == 2
    assert tests["failed_tests"] == ["tests/ops/test_a.py::test_one"] and "AssertionError" in tests["output_tail"]
    assert racecheck["summary"] == "RACECHECK SUMMARY: 1 hazard displayed" and racecheck["exit_status"] == 86


@pytest.mark.parametrize("facts", [{"device": None}, {"device": "H200", "kernels": {"CPU": "libncpvae_cpu.so"}}])
def test_no_device_and_no_cuda_kernels_are_failures(facts, check):
    ok, result, name, _ = check(**{"-c": (0, json.dumps(facts))})
    assert not ok and not result["steps"]["machine"]["ok"]
    assert name == ("gpu-check-h200.json" if facts["device"] else "gpu-check-unknown.json")


def test_a_sanitizer_that_is_not_installed_is_left_out_and_said_so(check, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    ok, result, *_ = check()
    assert ok and "not installed" in result["steps"]["racecheck"]["left_out"]
    assert result["steps"]["machine"]["driver"] is None


def test_a_step_that_raises_is_a_failed_step(tmp_path):
    def broken(run):
        raise ValueError("of its own making")

    steps = {"one": broken, "two": lambda run: {"ok": True, "value": 3}}
    ok, path = gpu_check.check(steps, lambda command: (0, ""), tmp_path)
    result = json.loads(path.read_text())["steps"]
    assert not ok and result["one"]["error"] == "ValueError: of its own making" and result["two"]["value"] == 3


def test_commands_really_run(capsys):
    command = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"]
    status, output = gpu_check.run_and_echo(command)
    assert status == 3 and sorted(output.split()) == ["err", "out"] and "out" in capsys.readouterr().out
