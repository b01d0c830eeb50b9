"""`samreg submit`: what it sends, what it refuses, and jobs on a real Ray head that succeed, fail and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import submit
from pipeline.cli import app
from pipeline.errors import Terminated
from storage import tables
from tests import phantoms, ray_head

SMALL = (2, 40, 40)


def test_only_code_and_the_configuration_are_sent(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("preset: paper\n", encoding="utf-8")
    submit.pack(tmp_path / "sent", config)
    sent = {str(path.relative_to(tmp_path / "sent")) for path in (tmp_path / "sent").rglob("*") if path.is_file()}
    code = {str(path.relative_to(phantoms.REPO)) for name in submit.CODE for path in _code(name)}
    assert sent == code | {submit.SENT_CONFIG}
    assert sum((tmp_path / "sent" / name).stat().st_size for name in sent) < 2**21


def _code(package: str) -> Iterator[Path]:
    return (phantoms.REPO / package).rglob("*.py")


def test_the_command_is_run_with_the_configuration_sent() -> None:
    command = submit.run_command(
        "python3.11", ["./a b.yaml", "--cohort", "/d/c.csv", "--out", "/d/s"], Path("a b.yaml")
    )
    assert command == "python3.11 -m pipeline.cli run study.yaml --cohort /d/c.csv --out /d/s"


class _Client:
    """A cluster that takes a job, whose following is ended."""

    def __init__(self, stop: type[KeyboardInterrupt]) -> None:
        self.stop = stop
        self.commands: list[str] = []

    def submit_job(self, entrypoint: str, runtime_env: Mapping[str, object]) -> str:
        self.commands.append(entrypoint)
        return "job-1"

    def get_job_status(self, job: str) -> object:
        raise self.stop


def _submit_to(client: _Client, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setattr("pipeline.submit.connect", lambda address: client)
    given = ["submit", "--address", "http://head:8265", *arguments, "--cohort", "/c.csv", "--out", "/mnt/s"]
    return CliRunner().invoke(app, given)


@pytest.mark.parametrize(
    ("arguments", "executor"),
    [
        ((), "ray"),
        (("--executor=serial",), None),
        (("--executor", "ray"), None),
        (("--set", "execution.executor=serial"), None),
        (("serial.yaml",), None),
    ],
)
def test_the_job_runs_on_ray_unless_another_executor_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], executor: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("serial.yaml").write_text("execution: {executor: serial}\n", encoding="utf-8")
    client = _Client(KeyboardInterrupt)
    assert _submit_to(client, monkeypatch, "--no-wait", *arguments).exit_code == 0
    assert client.commands[0].endswith("--out /mnt/s" if executor is None else "--out /mnt/s --executor ray")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ending_the_following_says_how_to_take_it_up(
    monkeypatch: pytest.MonkeyPatch, stop: type[KeyboardInterrupt], code: int
) -> None:
    done = _submit_to(_Client(stop), monkeypatch)
    assert done.exit_code == code, done.output
    said = done.stderr.partition("no longer following; the job goes on")[2]
    assert "samreg status /mnt/s    (where /mnt/s is mounted" in said


@pytest.mark.parametrize("text", ["s3://key:hidden@bucket/c.csv", "https://b/c?X-Amz-Signature=hidden"])
def test_secrets_are_not_sent(text: str) -> None:
    with pytest.raises(submit.SubmitError, match="holds a secret") as caught:
        submit.run_command("python", ["--cohort", text])
    assert "hidden" not in str(caught.value)
    with pytest.raises(submit.SubmitError, match="looks like a secret"):
        submit.check_environment([f"WHERE={text}"])


def test_a_configuration_with_a_secret_is_not_sent(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("segmenter: {name: sam_vit_b, checkpoint: 's3://key:hid/den@bucket/w.pth'}\n", encoding="utf-8")
    with pytest.raises(submit.SubmitError, match=r"my\.yaml holds a secret") as caught:
        submit.pack(tmp_path / "sent", config)
    assert "den@" not in str(caught.value)
    assert not (tmp_path / "sent").exists()


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWD", "AZURE_CONNECTION_STRING"])
def test_variables_named_as_secrets_are_refused(name: str) -> None:
    with pytest.raises(submit.SubmitError, match=f"--env {name} looks like a secret") as caught:
        submit.check_environment([f"{name}=hidden"])
    assert "hidden" not in str(caught.value)


def test_threads_are_set_and_other_variables_named_one_by_one() -> None:
    assert submit.check_environment(["SAMREG_WEIGHTS=/m"]) == {**submit.THREADS, "SAMREG_WEIGHTS": "/m"}
    with pytest.raises(submit.SubmitError, match="expected NAME=VALUE"):
        submit.check_environment(["SAMREG_WEIGHTS"])


def _submit(variables: Mapping[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = phantoms.command("submit", "--python", sys.executable, *arguments)
    return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", timeout=240, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cohort", "c.csv", "--out", "/s"), "--cohort c.csv is relative"),
        (("--cohort", "/c.csv", "--out", "study/"), "--out study is relative"),
        (("--cohort", "/c.csv", "--out", "/s", "--pairs", "p.csv"), "--pairs p.csv is relative"),
        (("no.yaml", "--cohort", "/c.csv", "--out", "/s"), "no.yaml: no such configuration file here"),
        (("--cohort", "/c.csv", "--oot", "/s"), "No such option: --oot"),
        (("--cohort", "/c.csv", "--out", "/s", "--pairs", "star"), "no Ray cluster answers at http://127.0.0.1:1"),
    ],
)
def test_what_cannot_work_is_refused_here(arguments: tuple[str, ...], message: str) -> None:
    done = _submit({**phantoms.environment(), "RAY_ADDRESS": "http://127.0.0.1:1"}, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[ray_head.Head]:
    with ray_head.started() as head:
        yield head


def _quick(cohort: Path, out: Path) -> tuple[str | Path, ...]:
    return ("--cohort", cohort, "--out", out, "--pairs", "star", "--until", "match")


@pytest.mark.ray
def test_a_job_with_a_failure_says_so_and_submitting_again_does_the_rest(head: ray_head.Head, tmp_path: Path) -> None:
    cohort, out = phantoms.write_cohort(tmp_path / "data", ("a", "b", "bad"), SMALL), tmp_path / "study"
    broken = tmp_path / "data" / "2.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    failed = _submit(head.environment, "--address", head.address, *_quick(cohort, out))
    assert failed.returncode == 1, failed.stderr
    assert "encode: bad failed: " in failed.stdout
    assert f"ray job logs --address {head.address} --follow raysubmit_" in failed.stderr
    broken.write_bytes(whole)
    started = _submit(head.environment, "--address", head.address, "--no-wait", *_quick(cohort, out))
    assert started.returncode == 0, started.stderr
    job = started.stdout.splitlines()[0]
    assert f"follow: ray job logs --address {head.address} --follow {job}" in started.stdout
    assert _follow(head, job) == 0
    assert tables.read_table(out, "failures").num_rows == 0
    runs = [row for row in tables.read_table(out, "runs").to_pylist() if row["stage"] == "encode"]
    assert sorted(row["units_done"] for row in runs) == [1, 2]


def _follow(head: ray_head.Head, job: str) -> int:
    """Exit code of a job by the function that `submit` follows it with, in an authenticated process."""
    code = "import sys; from pipeline import submit; c = submit.connect(sys.argv[1]); print(submit.follow(c, sys.argv[2], sys.stderr.write).code)"  # noqa: E501
    command = [sys.executable, "-c", code, head.address, job]
    return int(subprocess.run(command, env=head.environment, capture_output=True, encoding="utf-8", check=True).stdout)


def _driver(out: Path) -> int | None:
    """Process id of the study's driver on the cluster."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(out).encode() in words and b"run" in words and words[0].endswith(b"python"):
            return int(entry.name)
    return None


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_is_told_from_a_failure_and_can_be_taken_up(head: ray_head.Head, tmp_path: Path) -> None:
    cohort = phantoms.write_cohort(tmp_path / "data", ("a", "b", "c", "d"))
    out, calm = tmp_path / "study", tmp_path / "calm"
    command = phantoms.command("submit", "--python", sys.executable, "--address", head.address, *_quick(cohort, out))
    with subprocess.Popen(command, env=head.environment, stderr=subprocess.PIPE, encoding="utf-8") as following:
        while not list(out.glob("embeddings.zarr/*/zarr.json")):
            assert following.poll() is None
            time.sleep(0.02)
        driver = _driver(out)
        assert driver is not None
        os.kill(driver, signal.SIGKILL)
        _, log = following.communicate(timeout=120)
    assert following.returncode == submit.LOST, log
    assert "the driver was killed or crashed" in log
    assert "submit the same command again to go on" in log
    assert _submit(head.environment, "--address", head.address, *_quick(cohort, out)).returncode == 0
    assert phantoms.samreg("run", *_quick(cohort, calm), "--executor", "serial").returncode == 0
    assert phantoms.study_tables(out) == phantoms.study_tables(calm)


@pytest.mark.ray
def test_a_wrong_token_is_refused_with_what_to_set(head: ray_head.Head, tmp_path: Path) -> None:
    variables = {**head.environment, "RAY_AUTH_TOKEN": "0" * 32}
    done = _submit(variables, "--address", head.address, "--cohort", "/c.csv", "--out", tmp_path / "s")
    assert done.returncode == 2, done.stderr
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its nodes" in done.stderr
    assert "Traceback" not in done.stderr
