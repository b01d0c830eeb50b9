"""Run or resume a study as a job of an existing Ray cluster: what is sent, how it is followed, how it ended.

Only code travels. The job's driver is `samreg run` on the cluster, so submitting the same command again is the resume.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.errors import UsageError
from pipeline.pairs import Mode
from storage.redaction import SECRET_NAME, has_secret, redact
from storage.sources import is_remote

CODE = ("pipeline", "actors", "storage")
SENT_CONFIG = "study.yaml"
LOST = 3  # exit code of a job whose driver ended without one of its own
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
UNREACHABLE_SECONDS = 120.0
_POLL_SECONDS = 1.0
_OWN_CODES = frozenset({0, 1, 2, 130, 143})
_UNREACHABLE = (RuntimeError, ConnectionError, OSError, aiohttp.ClientError, asyncio.TimeoutError)


class SubmitError(UsageError):
    """The job cannot be submitted as asked; the message says what to change."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit code to leave with, and a sentence where the driver's own log does not say."""

    code: int
    message: str = ""


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Refuse what the cluster could not find.

    Args:
        paths: of the options that name files, by option.

    Raises:
        SubmitError: for a relative path.
    """
    for option, path in paths.items():
        if path is not None and not path.startswith("/") and not is_remote(path) and path not in get_args(Mode):
            raise SubmitError(
                f"{option} {path} is relative; the job runs elsewhere, give an absolute path that every node has"
            )


def check_environment(given: Sequence[str]) -> dict[str, str]:
    """Variables of the job from NAME=VALUE texts, numerical threads first.

    Raises:
        SubmitError: for another form, or a secret, which the dashboard would show to everybody.
    """
    variables = dict(THREADS)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SubmitError(f"--env {redact(text)}: expected NAME=VALUE, for example SAMREG_WEIGHTS=/models")
        if SECRET_NAME.search(name) or has_secret(value):
            raise SubmitError(
                f"--env {name} looks like a secret, which the cluster's dashboard would show. "
                "Set it on the nodes, for example by a Kubernetes secret"
            )
        variables[name] = value
    return variables


def pack(folder: Path, config: Path | None = None) -> None:
    """Copy the program into `folder`, and the configuration as SENT_CONFIG: Python files only, no data, no weights.

    Raises:
        SubmitError: for a configuration with a secret in it.
    """
    if config is not None and has_secret(config.read_text(encoding="utf-8", errors="replace")):
        raise SubmitError(
            f"{config} holds a secret, which the cluster would keep; "
            "give the nodes the credentials by environment variables or a role"
        )
    source = Path(__file__).resolve().parents[1]
    for package in CODE:
        for path in sorted((source / package).rglob("*.py")):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if config is not None:
        shutil.copyfile(config, folder / SENT_CONFIG)


def run_command(python: str, arguments: Sequence[str], config: Path | None = None) -> str:
    """The job's command line, with the configuration by the name that it travels under.

    Raises:
        SubmitError: for a secret in an argument, which every process list on the cluster would show.
    """
    for argument in arguments:
        if has_secret(argument):
            raise SubmitError(
                f"{redact(argument)} holds a secret, which the cluster's dashboard and process lists would show. "
                "Give the nodes the credentials by environment variables or a role"
            )
    words = list(arguments)
    if config is not None:
        words[[Path(word) for word in words].index(config)] = SENT_CONFIG
    return shlex.join([python, "-m", "pipeline.cli", "run", *words])


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`; RAY_AUTH_MODE and RAY_AUTH_TOKEN authenticate.

    Raises:
        SubmitError: when it does not answer, or refuses the token.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise SubmitError(
            f"the cluster at {address} refuses: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its nodes"
        ) from None
    except _UNREACHABLE:
        raise SubmitError(
            f"no Ray cluster answers at {address}; the address is that of the dashboard, http://head-node:8265"
        ) from None


def submit(client: JobSubmissionClient, command: str, folder: Path, variables: Mapping[str, str]) -> str:
    """Send the folder and start the job; its id.

    Raises:
        SubmitError: when the cluster refuses it.
    """
    environment = {"working_dir": str(folder), "env_vars": dict(variables)}
    try:
        return client.submit_job(entrypoint=command, runtime_env=environment)
    except _UNREACHABLE as error:
        raise SubmitError(f"the cluster did not take the job: {_first_line(error)}") from None


def how_to_follow(job: str, address: str, out: str) -> str:
    """What to type to see or stop a job that goes on by itself."""
    return (
        f"follow: ray job logs --address {address} --follow {job}\n"
        f"stop:   ray job stop --address {address} {job}\n"
        f"state:  samreg status {out}    (where {out} is mounted; the same submit command again resumes)"
    )


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> Outcome:
    """Copy the job's log to `write` until the job ends.

    A connection that breaks is taken up again where the log was left; the job does not mind.
    """
    shown, unreachable_since = 0, None
    while True:
        try:
            if client.get_job_status(job).is_terminal():
                write(client.get_job_logs(job)[shown:])
                return _outcome(client.get_job_info(job))
            unreachable_since = None
            shown = asyncio.run(_tail(client, job, write, shown))
        except _UNREACHABLE as error:
            unreachable_since = unreachable_since or time.monotonic()
            if time.monotonic() - unreachable_since > UNREACHABLE_SECONDS:
                return Outcome(LOST, f"the cluster no longer answers ({_first_line(error)}); {_RESUME}")
        time.sleep(_POLL_SECONDS)


_RESUME = "what is finished is kept, submit the same command again to go on"


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], object], shown: int) -> int:
    """Write what comes after the first `shown` characters of the log; how many there are when the stream ends."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            seen += len(text)
            write(text[max(0, len(text) - max(0, seen - shown)) :])
            shown = max(seen, shown)
    except _UNREACHABLE:
        if seen == 0:
            raise
    return shown


def _outcome(job: JobDetails) -> Outcome:
    if job.status == JobStatus.SUCCEEDED:
        return Outcome(0)
    if job.status == JobStatus.STOPPED:
        return Outcome(LOST, f"the job was stopped; {_RESUME}")
    if job.driver_exit_code in _OWN_CODES:
        return Outcome(job.driver_exit_code)
    if job.driver_exit_code is not None:
        return Outcome(LOST, f"the driver was killed or crashed (exit code {job.driver_exit_code}); {_RESUME}")
    return Outcome(LOST, f"the job was lost: {_first_line(job.message)}; {_RESUME}")


def _first_line(message: object) -> str:
    return redact(str(message).strip().split("\n", 1)[0][:300]) or type(message).__name__
