"""Secrets never reach a log, a table or a record of a study."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import make_config
from pipeline.dispatch import Failure, attempt
from pipeline.errors import FolderError
from pipeline.record import refuse_credentials
from storage.cohort import Cohort, Subject
from storage.redaction import RedactingFormatter, has_credentials, redact
from tests import phantoms


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:pass/word@bucket/a", "s3://***@bucket/a"),
        ("s3://key:p@ssword@bucket/a", "s3://***@bucket/a"),
        ("http://head:8265/jobs/me@here", "http://head:8265/jobs/me@here"),
        ("s3://bucket/a:b/c@d.nii.gz", "s3://bucket/a:b/c@d.nii.gz"),
        ("AccountName=a;AccountKey=bc/d==", "AccountName=a;AccountKey=***"),
        ("s3://key:password@bucket/a b", "s3://***@bucket/a b"),
        ("https://b/c?X-Amz-Signature=abc&versionId=3", "https://b/c?X-Amz-Signature=***&versionId=3"),
        ("https://b/c?v=1&token=abc", "https://b/c?v=1&token=***"),
        ("me@example.org wrote to /data/a@b", "me@example.org wrote to /data/a@b"),
    ],
)
def test_credentials_of_uris_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert has_credentials(text) == (text != shown)


class _Unit:
    unit = "u"


def test_secret_variables_are_hidden_in_failures_and_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")

    def fail(unit: _Unit) -> None:
        raise OSError("refused 0123456789abcdef at /home/me/token")

    failure = attempt(fail, _Unit())
    assert isinstance(failure, Failure)
    assert failure.message == "refused *** at /home/me/token"
    assert "0123456789abcdef" not in failure.traceback
    record = logging.LogRecord("samreg", logging.INFO, "", 0, "token %s", ("0123456789abcdef",), None)
    assert RedactingFormatter("%(message)s").format(record) == "token ***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE_STORAGE_ACCOUNT_KEY", "/begins/with+a/slash=="),
        ("AZURE_STORAGE_CONNECTION_STRING", "Endpoint=a;Key=b;c"),
        ("db_passwd", "in lower case"),
    ],
)
def test_whatever_a_variable_of_such_a_name_holds_is_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"got {value}!") == "got ***!"


def test_a_plan_with_credentials_in_its_uris_is_refused_without_showing_them(tmp_path: Path) -> None:
    rows = [{"subject": "a", "image": "s3://key:hidden/word@bucket/a.nii.gz"}]
    cohort = phantoms.write_csv(tmp_path / "cohort.csv", rows)
    done = CliRunner().invoke(app, ["plan", "--cohort", str(cohort), "--out", str(tmp_path / "study")])
    assert done.exit_code == 2
    assert "s3://***@bucket/a.nii.gz holds credentials" in done.output
    assert "word" not in done.output


def test_a_study_with_credentials_in_its_uris_is_refused(tmp_path: Path) -> None:
    cohort = Cohort((Subject("a", "s3://key:password@bucket/a.nii.gz"),))
    with pytest.raises(FolderError, match=r"s3://\*\*\*@bucket/a\.nii\.gz holds credentials") as caught:
        refuse_credentials(make_config({}), cohort)
    assert "password" not in str(caught.value)
    named = make_config({"segmenter": {"name": "sam_vit_b", "checkpoint": "https://u:password@h/w.pth"}})
    with pytest.raises(FolderError, match="a setting holds credentials"):
        refuse_credentials(named, Cohort(()))
    refuse_credentials(make_config({}), Cohort((Subject("a", "s3://bucket/a.nii.gz"),)))
