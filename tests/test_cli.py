"""The command: exit codes, one-line errors, and what each subcommand prints."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests import phantoms

QUICK = ["--set", f"fit={json.dumps(phantoms.QUICK_FIT)}", "--executor", "serial"]


def _samreg(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), ["a", "b"])


def test_run_then_status_then_run_again(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = _samreg("run", "--cohort", cohort, "--out", out, "--pairs", "star", *QUICK)
    assert done.exit_code == 0, done.output
    assert "Dice before" in done.stderr
    status = _samreg("status", out)
    assert status.exit_code == 0
    assert status.stdout.splitlines()[-1].split() == ["fit", "1", "0", "0"]
    assert json.loads(_samreg("status", out, "--json").stdout)["complete"]
    again = _samreg("run", "--cohort", cohort, "--out", out, "--pairs", "star", *QUICK)
    assert again.exit_code == 0
    (out / "metrics" / "0000-0000.parquet").unlink()
    missing = _samreg("status", out)
    assert missing.exit_code == 1
    assert missing.stdout.splitlines()[-1].split() == ["fit", "0", "0", "1"]


def test_a_run_until_match_is_all_that_was_asked_for(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    run = ["run", "--cohort", cohort, "--out", out, "--pairs", "star", *QUICK]
    assert _samreg(*run, "--until", "match").exit_code == 0
    status = _samreg("status", out)
    assert status.exit_code == 0
    assert status.stdout.splitlines()[-1].split() == ["fit", "0", "0", "0", "not", "asked", "for"]
    wrong = _samreg(*run, "--until", "matching")
    assert wrong.exit_code == 2
    assert "stages are encode, prototypes, match, fit" in wrong.stderr


HEAVY = {"torch", "torchvision", "ray", "matplotlib", "skimage", "segment_anything", "dask"}


def test_commands_that_compute_nothing_load_nothing_heavy(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    run = ["run", "--cohort", str(cohort), "--out", str(out), "--set", f"fit={json.dumps(phantoms.QUICK_FIT)}"]
    assert _samreg(*run).exit_code == 0
    for command in (run, ["plan", *run[1:]], ["status", str(out)], ["config", "show"]):
        packages = {name.split(".")[0] for name in _modules_loaded(*command)}
        assert "pipeline" in packages
        assert not packages & HEAVY, command
        if command[0] in ("status", "config"):  # pyarrow imports pandas where it makes a table
            assert "pandas" not in packages, command


def _modules_loaded(*arguments: str) -> set[str]:
    """Modules that a command imports before it ends well."""
    command = [sys.executable, "-X", "importtime", *phantoms.command(*arguments)[1:]]
    done = subprocess.run(command, env=phantoms.environment(), capture_output=True, encoding="utf-8", check=True)
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_a_terminal_that_cannot_show_every_letter_ends_no_command(tmp_path: Path) -> None:
    command = phantoms.command("demo", "--out", tmp_path, "--subjects", "2", "--depth", "2", "--size", "48")
    environment = {**phantoms.environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--set", "execution.executor=serial"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"subject-01__subject-02" in done.stdout
    assert done.stdout.isascii()


def test_a_failure_gives_exit_code_one(cohort: Path, tmp_path: Path) -> None:
    pairs = phantoms.write_csv(
        tmp_path / "pairs.csv", [{"moving": "a", "fixed": "b"}, {"moving": "ghost", "fixed": "b"}]
    )
    out = tmp_path / "study"
    done = _samreg("run", "--cohort", cohort, "--out", out, "--pairs", pairs, *QUICK)
    assert done.exit_code == 1
    assert "1 failures" in done.stderr
    assert "failed match ghost__b: row 3 of the pairs file: subject 'ghost'" in _samreg("status", out).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "match.epsilom=1"], "unknown setting 'match.epsilom'; did you mean 'match.epsilon'?"),
        (["--pairs", "nothing.csv"], "nothing.csv: no such file"),
        (["--set", "pairs=list"], "add --pairs FILE"),
        (["--set", "pairs.mode=star", "--set", "pairs.reference=z"], "'z', which is not a subject"),
        (["--executor", "slurm"], "execution.executor"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(
    cohort: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = _samreg("run", "--cohort", cohort, "--out", tmp_path / "study", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_or_broken_manifest_is_wrong_usage(tmp_path: Path) -> None:
    done = _samreg("run", "--cohort", tmp_path / "none.csv", "--out", tmp_path / "study")
    assert (done.exit_code, "none.csv" in done.stderr) == (2, True)
    twice = phantoms.write_csv(tmp_path / "twice.csv", [{"subject": "a", "image": "a.nii"}] * 2)
    done = _samreg("run", "--cohort", twice, "--out", tmp_path / "study")
    assert done.exit_code == 2
    assert "'a' appears before in row 2" in done.stderr


def test_ctrl_c_where_there_is_nothing_to_go_on_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.config.load_config", stop)
    for command in (["config", "validate"], ["doctor"]):
        done = _samreg(*command)
        assert done.exit_code == 130
        assert done.stderr.endswith("Run the same command again to go on\n")


def test_a_full_disk_is_a_line_wherever_it_fills(cohort: Path, tmp_path: Path) -> None:
    command = phantoms.command("cohort", "scan", cohort.parent, "--out", tmp_path / "found.csv")
    full: Any = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # noqa: E731
    done = subprocess.run(
        command, env=phantoms.environment(), preexec_fn=full, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("samreg: no space left: ")
    assert done.stderr.endswith("what is written is kept. Free space and run it again\n")


def test_status_of_another_folder_is_wrong_usage(tmp_path: Path) -> None:
    done = _samreg("status", tmp_path)
    assert done.exit_code == 2
    assert "is not a study folder" in done.stderr


def test_plan_counts_without_running(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = _samreg("plan", "--cohort", cohort, "--out", out)
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["subjects"].split()[1] == "2"
    assert lines["slices"].split()[1] == "10"
    assert lines["pairs"].split()[1] == "2"
    assert "takes 60 (6x)" in lines["encodes"]
    assert lines["store"].count("MiB") == 2
    assert not out.exists()


def test_plan_names_images_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"subject": name, "image": f"{name}.nii"} for name in ("a", "b")]
    done = _samreg("plan", "--cohort", phantoms.write_csv(tmp_path / "c.csv", rows))
    assert done.stdout.count("problem ") == 2


def test_scan_writes_a_manifest_that_run_reads(cohort: Path, tmp_path: Path) -> None:
    done = _samreg("cohort", "scan", cohort.parent, "--out", tmp_path / "found.csv")
    assert done.exit_code == 0, done.output
    assert "2 subjects" in done.stdout
    assert _samreg("plan", "--cohort", tmp_path / "found.csv").exit_code == 0


def test_config_show_validate_and_schema(tmp_path: Path) -> None:
    shown = _samreg("config", "show", "--set", "match.epsilon=0.66")
    assert yaml.safe_load(shown.stdout)["match"]["epsilon"] == 0.66
    path = tmp_path / "c.yaml"
    path.write_text(shown.stdout, encoding="utf-8")
    assert _samreg("config", "validate", path).exit_code == 0
    path.write_text("match: {epsilom: 1}", encoding="utf-8")
    wrong = _samreg("config", "validate", path)
    assert (wrong.exit_code, "match.epsilon" in wrong.stderr) == (2, True)
    assert "properties" in json.loads(_samreg("config", "schema").stdout)


def test_every_command_has_help() -> None:
    for command in (["run"], ["plan"], ["status"], ["report"], ["demo"], ["cohort", "scan"], ["config", "show"]):
        assert _samreg(*command, "--help").exit_code == 0
