"""The sections of a report on what failed and on how the study was made."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
import yaml

from pipeline.report_data import ReportData
from pipeline.report_page import Html, element, folded, section
from pipeline.report_tables import Column, data_table, table

_ADVICE = {
    "SubjectFailed": "follows from the failure of the subject",
    "UnknownSubject": "correct the list of pairs or add the subject to the manifest",
    "WorkerLost": "most often too little memory: fewer workers, or more memory a worker",
    "NoRoiError": "no region was found: check the image and its intensity window, or relax `rois`",
    "NoSharedClassError": "the two segmentations share no class",
    "NotInvertedError": "the field folds: raise fit.smoothness, or fit.diffeomorphic=false",
}
_STAGES = {
    "encode": "correct or replace the file that the message names",
    "prototypes": "check the image and what the segmenter found in it",
    "match": "see the message",
    "fit": "see the message; labels and landmarks must be on the grid of their image",
}


def failures_section(data: ReportData) -> Html:
    """What failed: first by kind, with advice, then every failure."""
    failures = data.failures
    if not failures.num_rows:
        return section("Failures", element("p", "Nothing failed in the latest run."))
    groups = failures.group_by(["stage", "error"], use_threads=False).aggregate(
        [("unit", "count"), ("message", "first"), ("traceback", "first")]
    )
    rows = sorted(groups.to_pylist(), key=lambda row: (row["error"] == "SubjectFailed", -row["unit_count"]))
    kinds = table(
        "failure-kinds",
        f"{failures.num_rows:,} failures of {len(rows)} kinds; the same command again tries them again",
        ("error", "stage", "count", "what to do", "first message", "where"),
        [_kind(row) for row in rows],
        wide=("what to do", "first message"),
    )
    names = failures.select(["pair", "unit", "subject", "stage", "error", "message", "attempt"]).to_pydict()
    columns = [
        Column("unit", [pair or unit for pair, unit in zip(names["pair"], names["unit"], strict=True)]),
        *(Column(name, [value or "" for value in names[name]]) for name in ("stage", "subject", "error")),
        Column("message", [value or "" for value in names["message"]], wide=True),
        Column("attempt", pc.fill_null(failures.column("attempt"), 1).cast("float64").to_numpy(), 0, "attempt"),
    ]
    return section("Failures", kinds, data_table("failures-table", f"{failures.num_rows:,} failures", columns))


def _kind(row: dict[str, Any]) -> tuple[object, ...]:
    advice = _ADVICE.get(row["error"]) or _STAGES.get(row["stage"], "see the message")
    trace = row["traceback_first"]
    where = folded("traceback", element("pre", trace)) if trace else ""
    return row["error"], row["stage"], row["unit_count"], advice, row["message_first"], where


def provenance_section(data: ReportData) -> Html:
    """Units and time of every stage, the latest run, versions, digests and settings."""
    stages = [(s.stage, s.done, s.failed, s.missing, "" if s.asked else "not asked for") for s in data.status.stages]
    rows = data.runs.to_pylist()
    latest = max((row["run"] for row in rows), default=None)
    cells = [
        (
            row["stage"],
            row["units_done"],
            row["units_failed"],
            row["seconds"],
            None if row["peak_memory_bytes"] is None else round(row["peak_memory_bytes"] / 2**20),
            row["workers"],
        )
        for row in rows
        if row["run"] == latest
    ]
    spans = {(row["started"], row["finished"]) for row in rows if row["run"] == latest and row["started"]}
    span = "".join(f": {a:%Y-%m-%d %H:%M:%S} to {b:%Y-%m-%d %H:%M:%S} UTC" for a, b in spans if b)
    header = ("stage", "units done", "failed", "seconds", "peak memory of a worker (MiB)", "workers")
    known = [
        *data.run.get("versions", {}).items(),
        *((f"digest of {k}", v) for k, v in data.run.get("digests", {}).items()),
    ]
    record = yaml.safe_dump(data.run, sort_keys=False, allow_unicode=True)
    return section(
        "How it was made",
        table("stages", "State of every stage", ("stage", "done", "failed", "missing", "note"), stages),
        table("runs", f"Latest of {len({row['run'] for row in rows})} runs{span}", header, cells),
        table("versions", "Versions and digests", ("what", "value"), [(k, str(v)) for k, v in known]),
        folded("All settings (run.yaml)", element("pre", record)),
    )
