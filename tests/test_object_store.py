"""Studies in an object store: a local S3 server with injected errors and latency, and fsspec's store in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import heartbeat, results
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.doctor import check_objects, check_uri
from pipeline.errors import FolderError
from pipeline.folder import StudyFolder, study_root
from pipeline.object_lock import hold_object
from pipeline.progress import SilentReporter
from pipeline.status import read_status
from pipeline.study import StudySummary, run_study
from storage import places, tables
from storage.cohort import Pair, read_cohort, subject_key
from storage.places import ObjectStoreError, place
from tests import object_server, phantoms

PAIRS = (Pair("a__b", "a", "b"), Pair("b__a", "b", "a"))


@pytest.fixture(scope="module")
def server() -> Iterator[object_server.Faults]:
    with pytest.MonkeyPatch.context() as patch, object_server.serve(patch) as faults:
        yield faults


@pytest.fixture
def faults(server: object_server.Faults) -> Iterator[object_server.Faults]:
    """The server's faults, none to begin with and none left behind."""
    yield server
    server.every, server.delay_s, server.stall_s, server.refuse = 0, 0.0, 0.0, lambda method, path: False


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), ("a", "b"))


@pytest.fixture(scope="module")
def local(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tables of the same study in a folder."""
    out = tmp_path_factory.mktemp("local") / "study"
    assert _run(cohort, out).n_failures == 0
    return _tables(out)


@pytest.fixture(scope="module")
def study(server: object_server.Faults, cohort: Path) -> str:
    """A finished study in S3; not to be changed."""
    url = f"s3://{object_server.BUCKET}/finished/study"
    assert _run(cohort, url).n_failures == 0
    return url


def _run(cohort: Path, out: Path | str, until: str = "fit") -> StudySummary:
    config = make_config({"execution": {"executor": "serial"}, "fit": phantoms.QUICK_FIT})
    return run_study(config, read_cohort(cohort), out, PAIRS, until=until, reporter=SilentReporter())


def _tables(out: Path | str) -> dict[str, Any]:
    names = ("rois", "correspondences", "unmatched", "metrics", "failures")
    found = {name: tables.read_table(out, name) for name in names}
    timings = [name for name in found["metrics"].column_names if name.startswith("seconds")]
    return {**found, "metrics": found["metrics"].drop_columns(timings)}


def _counts(summary: StudySummary) -> dict[str, tuple[int, int, int]]:
    return {stage.stage: (stage.done, stage.reused, stage.failed) for stage in summary.stages}


def test_a_study_in_s3_equals_the_one_in_a_folder(study: str, local: dict[str, Any]) -> None:
    assert _tables(study) == local
    assert read_status(study_root(study)).complete


def test_a_finished_study_is_not_done_again(study: str, cohort: Path) -> None:
    counts = _counts(_run(cohort, study))
    assert counts == {"encode": (0, 2, 0), "prototypes": (0, 2, 0), "match": (0, 2, 0), "fit": (0, 2, 0)}


def test_a_study_in_the_memory_store_goes_on_where_it_stopped(cohort: Path, local: dict[str, Any]) -> None:
    url = "memory://goes-on/study"
    _run(cohort, url, until="encode")
    counts = _counts(_run(cohort, url))
    assert counts["encode"] == (0, 2, 0)
    assert _tables(url) == local


def test_errors_latency_and_timeouts_are_survived(
    faults: object_server.Faults, cohort: Path, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(places.S3_SETTINGS, "read_timeout", 2)
    faults.every, faults.delay_s, faults.stall_s, faults.failed = 40, 0.005, 4.0, 0
    url = f"s3://{object_server.BUCKET}/errors/study"
    assert _run(cohort, url).n_failures == 0
    assert faults.failed >= 3
    assert faults.stall_s == 0
    assert _tables(url) == local


def test_a_run_that_the_store_stops_says_which_object_and_goes_on_later(
    faults: object_server.Faults, cohort: Path, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(places.S3_SETTINGS, "retries", {"max_attempts": 1, "mode": "standard"})
    url = f"s3://{object_server.BUCKET}/stopped/study"
    faults.refuse = lambda method, path: method == "PUT" and "/metrics/" in path
    with pytest.raises(ObjectStoreError, match=rf"{url}/metrics/.*parquet.*same command again"):
        _run(cohort, url)
    assert tables.part_names(url, "metrics") == []
    faults.refuse = lambda method, path: False
    counts = _counts(_run(cohort, url))
    assert counts["encode"] == counts["match"] == (0, 2, 0)
    assert _tables(url) == local


def test_an_error_is_not_taken_for_an_absence(
    faults: object_server.Faults, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(places.S3_SETTINGS, "retries", {"max_attempts": 1, "mode": "standard"})
    root = study_root(study)
    (part,) = tables.part_names(study, "correspondences")
    assert [tables.has_part(study, "correspondences", name) for name in (part, "other")] == [True, False]
    assert not places.exists(root / "correspondences")
    faults.refuse = lambda method, path: method == "HEAD" and "/correspondences/" in path
    with pytest.raises(ObjectStoreError, match=rf"{part}\.parquet: OSError.*Internal Server Error"):
        results.rows_of(root, "correspondences", part, ["a__b"])
    fresh = tables.table_from_rows("correspondences", [])
    with pytest.raises(ObjectStoreError, match=part):
        results.merge_rows(root, "correspondences", part, fresh, ["a__b"])


def test_a_subject_whose_marker_was_not_written_is_absent_and_done_again(
    faults: object_server.Faults, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(places.S3_SETTINGS, "retries", {"max_attempts": 1, "mode": "standard"})
    url = f"s3://{object_server.BUCKET}/half/study"
    key = subject_key("a")
    faults.refuse = lambda method, path: method == "PUT" and path.endswith(f"/{key}/zarr.json")
    assert _counts(_run(cohort, url, until="encode"))["encode"] == (1, 0, 1)
    store = StudyFolder(study_root(url)).store
    assert "features" in places.names(store.root / key)
    assert store.subjects() == ["b"]
    faults.refuse = lambda method, path: False
    assert _counts(_run(cohort, url, until="encode"))["encode"] == (1, 1, 0)
    assert store.subjects() == ["a", "b"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("url", [f"s3://{object_server.BUCKET}/locked", "memory://locked"])
def test_a_second_driver_is_refused_while_the_first_one_beats(server: object_server.Faults, url: str) -> None:
    folder = StudyFolder(study_root(url))
    with folder.lock(), pytest.raises(FolderError, match=r"being written by process .* which lives"), folder.lock():
        pass
    assert places.names(folder.root) == []
    with folder.lock() as again:
        again.check()


@pytest.mark.usefixtures("quick")
def test_a_dead_driver_is_taken_over_and_one_taken_over_stops(server: object_server.Faults) -> None:
    root = place(f"s3://{object_server.BUCKET}/dead")
    places.put_object(root / ".lock", b"process 1 on elsewhere 0123456789abcdef 7")
    with hold_object(root) as held:
        held.check()
        places.put_object(root / ".lock", b"process 2 on elsewhere fedcba9876543210 0")
        time.sleep(1.0)
        with pytest.raises(FolderError, match="taken over by process 2 on elsewhere"):
            held.check()
    assert places.read_bytes(root / ".lock").startswith(b"process 2"), "another driver's lock is not released"


def test_a_bucket_that_does_not_exist_is_named(server: object_server.Faults, cohort: Path) -> None:
    with pytest.raises(FolderError, match=r"s3://no-such-bucket/study.*bucket does not exist.*credentials"):
        _run(cohort, "s3://no-such-bucket/study")


def test_doctor_tries_the_object_store(server: object_server.Faults) -> None:
    check = check_objects(place(f"s3://{object_server.BUCKET}/doctor"))
    assert (check.state, "1 MiB written" in check.found) == ("ok", True)
    assert check_objects(place("s3://no-such-bucket/doctor")).state == "fail"


def test_doctor_leaves_no_probe_where_it_may_not_list(faults: object_server.Faults) -> None:
    root = place(f"s3://{object_server.BUCKET}/unlisted")
    faults.refuse = lambda method, path: method == "GET" and path == f"/{object_server.BUCKET}"
    assert check_objects(root).state == "fail"
    faults.refuse = lambda method, path: False
    assert places.names(root) == []


def test_an_object_without_credentials_is_a_failed_check(
    server: object_server.Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    _forget_clients()
    try:
        check = check_uri(f"s3://{object_server.BUCKET}/a.nii.gz")
    finally:
        _forget_clients()
    assert check.state == "fail"
    assert "could not be fetched (NoCredentialsError" in check.found


def _forget_clients() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("command", [["report"], ["query", "--subject", "a"], ["atlas"]])
def test_other_commands_say_what_takes_a_url(command: list[str]) -> None:
    done = CliRunner().invoke(app, [command[0], "s3://bucket/study", *command[1:]])
    assert done.exit_code == 2
    assert "needs a folder, not s3://bucket/study" in done.output
    assert "aws s3 sync" in done.output


def test_status_and_run_take_a_url(study: str, cohort: Path) -> None:
    assert CliRunner().invoke(app, ["status", study]).exit_code == 0
    refused = CliRunner().invoke(app, ["run", "--cohort", str(cohort), "--out", "s3://key:hidden-word@bucket/study"])
    assert refused.exit_code == 2
    assert "holds credentials" in refused.output
    assert "hidden-word" not in refused.output


def _command_lines(session: int) -> Iterator[str]:
    """Those of the processes of a session, as everybody sees them by ps."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                yield (entry / "cmdline").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue


def _shown(command: Sequence[str | Path]) -> tuple[int, str]:
    """Exit code of a command, and whatever it printed or showed as a command line of a process."""
    lines: set[str] = set()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=phantoms.environment(), stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None:
            lines.update(_command_lines(process.pid))
            time.sleep(0.1)
        output.seek(0)
        return process.returncode, "\n".join([output.read(), *lines])


def _kept(study: str) -> str:
    """All texts that a study keeps."""
    root = study_root(study)
    records = [places.read_bytes(root / name).decode() for name in ("run.yaml", "plan.json", ".digests.json")]
    return "\n".join([*records, *(str(tables.read_table(root, name).to_pylist()) for name in ("failures", "runs"))])


ONE_ATTEMPT = (
    "from storage import places; places.S3_SETTINGS['retries'] = {'max_attempts': 1}; "
    "from pipeline.cli import main; main()"
)


def test_a_run_that_fails_shows_no_secret(faults: object_server.Faults, cohort: Path) -> None:
    url = f"s3://{object_server.BUCKET}/secret/study"
    faults.refuse = lambda method, path: method == "PUT" and path.endswith(f"/{subject_key('b')}/zarr.json")
    options = ("run", "--cohort", cohort, "--out", url, "--executor", "serial", "--until", "match")
    code, shown = _shown([sys.executable, "-c", ONE_ATTEMPT, *map(str, options)])
    kept = _kept(url)
    assert code == 1, shown
    assert "encode: b failed" in shown
    for text in (shown, kept):
        assert "injected, ('***', '***')" in text
        assert not [secret for secret in object_server.SECRETS if secret in text]
    faults.refuse = lambda method, path: method == "PUT" and "/rois/" in path
    code, shown = _shown([sys.executable, "-c", ONE_ATTEMPT, *map(str, options)])
    assert code == 1, shown
    assert "injected, ('***', '***')" in shown
    assert not [secret for secret in object_server.SECRETS if secret in shown]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_workers_write_to_the_store_and_show_no_secret(
    faults: object_server.Faults, cohort: Path, local: dict[str, Any]
) -> None:
    url = f"s3://{object_server.BUCKET}/ray/study"
    settings = ("--set", f"fit={json.dumps(phantoms.QUICK_FIT)}", "--executor", "ray", "--workers", "2")
    code, shown = _shown(phantoms.command("run", "--cohort", cohort, "--out", url, *settings))
    assert code == 0, shown
    assert _tables(url) == local
    assert "raylet" in shown
    assert not [secret for secret in object_server.SECRETS if secret in shown + _kept(url)]
