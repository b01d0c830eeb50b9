"""What a study folder was made with: `run.yaml`, `plan.json`, and the refusal to mix two studies."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pipeline.config import StudyConfig
from pipeline.errors import FolderError
from pipeline.folder import StudyFolder
from pipeline.inputs import InputDigests
from pipeline.keys import PlannedPair, SubjectKeys, encode_settings
from pipeline.usage import Usage
from storage import tables
from storage.cohort import Cohort, Pair, Subject
from storage.redaction import has_credentials, redact
from storage.signature import SignatureMismatch, check_signature, digest

if TYPE_CHECKING:
    from pipeline.study import StageCount

PACKAGES = ("samreg", "ray", "torch", "numpy", "scipy", "SimpleITK", "zarr", "pyarrow")


def check_settings(folder: StudyFolder, config: StudyConfig, segmenter: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder whose embeddings were made with other input or segmenter settings.

    Other changes are no conflict: whatever depends on them is made again. These would throw away the expensive
    embeddings of every subject, so that has to be asked for.

    Raises:
        FolderError: naming both values.
    """
    record = folder.read_run() if not overwrite else None
    if record is None:
        return
    try:
        check_signature(f"study {folder.root}", record.get("encode", {}), encode_settings(config, segmenter))
    except SignatureMismatch as error:
        raise FolderError(
            f"{error}. Choose another --out, go back to the stored settings, or add --overwrite to encode again"
        ) from None


def refuse_credentials(config: StudyConfig, cohort: Cohort) -> None:
    """Refuse URIs with credentials, which `run.yaml`, `plan.json` and the report would show.

    Raises:
        FolderError: naming the URI without them.
    """
    texts = [json.dumps(config.resolved()), *(v for s in cohort.subjects for v in dataclasses.asdict(s).values())]
    for text in texts:
        if isinstance(text, str) and has_credentials(text):
            shown = redact(text) if len(text) < 300 else "a setting"
            raise FolderError(
                f"{shown} holds credentials, which the study folder would keep. Give them by environment variables "
                "(AWS_ACCESS_KEY_ID, ...), the configuration files of fsspec, or a role of the nodes"
            )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def chose_pairs_alike(folder: StudyFolder, config: StudyConfig) -> bool:
    """Whether the last run chose its pairs by the same settings: those that go then, go because the cohort changed."""
    run = folder.read_run()
    return run is not None and bool(run["config"].get("pairs") == config.resolved()["pairs"])


def write_run(
    folder: StudyFolder,
    config: StudyConfig,
    segmenter: Mapping[str, Any],
    inputs: Mapping[str, InputDigests],
) -> dict[str, Any]:
    """Write `run.yaml`: no paths, no times, so equal studies have equal records."""
    settings = config.resolved()
    results = {name: value for name, value in settings.items() if name not in ("execution", "preset")}
    record = {
        "config": settings,
        "digests": {
            "config": digest(results),
            "inputs": digest({name: dataclasses.asdict(found) for name, found in inputs.items()}),
        },
        "encode": encode_settings(config, segmenter),
        "versions": versions(),
    }
    folder.write_run(record)
    return record


def write_plan(
    folder: StudyFolder,
    cohort: Cohort,
    keys: Mapping[str, SubjectKeys],
    pairs: Sequence[Pair] | None,
    planned: Sequence[PlannedPair],
    until: str,
    outputs: Sequence[str],
) -> None:
    """Write `plan.json`: every subject and pair of this run with its keys, which are null where an input is unreadable.

    Pairs are listed by column, which a million of them need. It also keeps the last stage that was asked for, and
    the manifest's rows, with absolute paths, so that a report finds the images again.
    """
    folder.write_plan(
        {
            "until": until,
            "outputs": list(outputs),
            "subjects": {
                name: {"encode": keys[name].encode, "prototypes": keys[name].prototypes} if name in keys else None
                for name in cohort.by_name()
            },
            "pairs": None if pairs is None else _pair_columns(pairs, planned),
            "manifest": {subject.subject: _manifest_row(subject) for subject in cohort.subjects},
        }
    )


def _pair_columns(pairs: Sequence[Pair], planned: Sequence[PlannedPair]) -> dict[str, list[str | None]]:
    keys = {pair.pair: (pair.match_key, pair.fit_key) for pair in planned}
    both = [keys.get(pair.pair, (None, None)) for pair in pairs]
    return {
        **{name: [getattr(pair, name) for pair in pairs] for name in Pair._fields},
        "match": [match for match, _ in both],
        "fit": [fit for _, fit in both],
    }


def planned_subjects(plan: Mapping[str, Any]) -> tuple[Subject, ...]:
    """The manifest that a plan remembers."""
    return tuple(Subject(subject=name, **fields) for name, fields in (plan.get("manifest") or {}).items())


def planned_pairs(plan: Mapping[str, Any]) -> tuple[Pair, ...] | None:
    """The pairs of a plan, None where they were not chosen yet."""
    if plan["pairs"] is None:
        return None
    return tuple(map(Pair, *(plan["pairs"][name] for name in Pair._fields)))


def _manifest_row(subject: Subject) -> dict[str, str]:
    row = dataclasses.asdict(subject)
    del row["subject"]
    return row


def run_id(start: float) -> str:
    """Name of a run of this process that started so many seconds after the epoch."""
    return f"{datetime.fromtimestamp(start, UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}"


def append_units(folder: StudyFolder, run: str, stage: str, number: int, used: Sequence[Usage]) -> None:
    """Add a part to the units table: a row for each unit."""
    rows = [
        {
            "run": run,
            "stage": stage,
            **{name: getattr(usage, name) for name in Usage.__slots__},
            "started": datetime.fromtimestamp(usage.started, UTC),
        }
        for usage in used
    ]
    tables.write_part(folder.root, "units", f"{run}-{stage}-{number:04d}", tables.table_from_rows("units", rows))


def append_run(
    folder: StudyFolder,
    record: Mapping[str, Any],
    run: str,
    span: tuple[float, float | None],
    stages: Sequence[StageCount],
) -> None:
    """Add one row per stage to the runs table.

    Args:
        record: of `write_run`.
        span: start and end of the run, seconds after the epoch; no end when it was cut short.
    """
    started, finished = (None if moment is None else datetime.fromtimestamp(moment, UTC) for moment in span)
    shared = {
        "run": run,
        "started": started,
        "finished": finished,
        "config_digest": record["digests"]["config"],
        "samreg_version": record["versions"]["samreg"],
        "python": record["versions"]["python"],
        "packages": json.dumps(record["versions"]),
        "executor": record["config"]["execution"]["executor"],
    }
    rows = [
        {
            **shared,
            "stage": stage.stage,
            "workers": stage.workers,
            "units_done": stage.done,
            "units_failed": stage.failed,
            "seconds": stage.seconds,
            "peak_memory_bytes": stage.peak_memory_bytes,
        }
        for stage in stages
    ]
    tables.write_part(folder.root, "runs", run, tables.table_from_rows("runs", rows))
