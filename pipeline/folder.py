"""The study folder: where everything lies, what it was made with, and who is writing to it.

study/                  a folder, or a URL of an object store: s3://bucket/study
  embeddings.zarr       features, ROI masks and prototypes of each subject
  rois/ correspondences/ unmatched/ metrics/ failures/ runs/ units/    Parquet; cohort_rois/ after `samreg cohort rois`
  transforms/           one ITK transform per pair; inverses/ and jacobians/ when asked for
  sweeps/               one folder per `samreg sweep`
  baselines/            after `samreg baseline`, see pipeline/baselines.py
  atlas/                after `samreg atlas`, see pipeline/atlas_folder.py
  run.yaml              resolved configuration, versions, digests
  plan.json             the subjects, pairs and keys of the latest run, which `samreg status` compares with, and
                        its manifest, where `samreg report` finds the images
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import FolderError, UsageError
from pipeline.heartbeat import Heartbeat
from pipeline.lock import hold
from pipeline.object_lock import hold_object
from storage import tables
from storage.atomic import clear_abandoned, replace_file
from storage.cohort import subject_key
from storage.embeddings import EmbeddingStore
from storage.places import exists, place, read_bytes
from storage.redaction import has_credentials, redact
from storage.sources import is_remote

OUTPUTS = {"transforms": ".h5", "inverses": ".h5", "jacobians": ".nii.gz"}  # files of each pair, by folder
STAGES = ("encode", "prototypes", "match", "fit")


def study_root(out: str | Path) -> Path:
    """Where a study lies, as an absolute path, or a path over fsspec for a URL.

    Raises:
        FolderError: for a URL with credentials, which logs would show.
    """
    if is_remote(out) and has_credentials(str(out)):
        raise FolderError(
            f"{redact(str(out))} holds credentials. Give them by environment variables (AWS_ACCESS_KEY_ID, ...), the "
            "configuration files of fsspec, or a role of the nodes"
        )
    root = place(out)
    return root if is_remote(root) else root.absolute()


@dataclass(frozen=True)
class StudyFolder:
    """Paths of one study.

    Attributes:
        root: the folder.
        encoded: root of the study whose embeddings and prototypes this one reads; None is itself.
        pooled: folder of prototypes made otherwise than those beside the embeddings.
        keep_transforms: whether a fitted pair leaves its displacement field and the other files of `OUTPUTS`.
    """

    root: Path
    encoded: Path | None = None
    pooled: Path | None = None
    keep_transforms: bool = True

    @property
    def embeddings(self) -> Path:
        """Root of the embedding store."""
        return (self.encoded or self.root) / "embeddings.zarr"

    @property
    def store(self) -> EmbeddingStore:
        """The embeddings and prototypes of this study."""
        return EmbeddingStore(self.embeddings, self.pooled)

    @property
    def transforms(self) -> Path:
        """Folder of displacement fields."""
        return self.root / "transforms"

    def transform(self, pair: str) -> Path:
        """The displacement field of a pair; the name is safe whatever the pair is called."""
        return self.output("transforms", pair)

    def output(self, name: str, pair: str) -> Path:
        """A pair's file of `OUTPUTS`."""
        return self.root / name / f"{subject_key(pair)}{OUTPUTS[name]}"

    def clear_abandoned(self) -> None:
        """Delete what killed writers left half done; once at the start of a run, under the lock."""
        folders = [self.root, *(self.root / name for name in (*OUTPUTS, *tables.SCHEMAS))]
        clear_abandoned(folders)
        self.store.clear_abandoned()

    def read_run(self) -> dict[str, Any] | None:
        """The record of what the folder was made with, or None for a new folder.

        Raises:
            FolderError: for a record that cannot be read.
        """
        path = self.root / "run.yaml"
        if not exists(path):
            return None
        try:
            record = yaml.safe_load(read_bytes(path).decode())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FolderError(f"{path} cannot be read: {error}; use another --out, or --overwrite") from None
        if not isinstance(record, dict):
            raise FolderError(f"{path} is not the record of a study; use another --out, or --overwrite")
        return record

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Replace `run.yaml`."""
        text = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)
        self._write("run.yaml", text)

    def read_plan(self) -> dict[str, Any] | None:
        """The plan of the latest run, or None."""
        path = self.root / "plan.json"
        if not exists(path):
            return None
        plan: dict[str, Any] = json.loads(read_bytes(path))
        return plan

    def latest_run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of a study and the plan of its latest run.

        Raises:
            UsageError: for a folder that no run has written to.
            FolderError: for a record that cannot be read.
        """
        run = self.read_run()
        if run is None:
            raise self._no_study("run.yaml")
        return run, self.latest_plan()

    def latest_plan(self) -> dict[str, Any]:
        """The plan of the latest run.

        Raises:
            UsageError: for a folder that no run has written to.
        """
        plan = self.read_plan()
        if plan is None:
            raise self._no_study("plan.json")
        return plan

    def _no_study(self, missing: str) -> UsageError:
        return UsageError(f"{self.root} is not a study folder: it has no {missing}; start one with samreg run")

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Replace `plan.json`."""
        self._write("plan.json", json.dumps(plan, ensure_ascii=False))

    def _write(self, name: str, text: str) -> None:
        with replace_file(self.root / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def lock(self) -> AbstractContextManager[Heartbeat]:
        """Hold the folder for one driver; see `pipeline.lock.hold` and `pipeline.object_lock.hold_object`."""
        return hold_object(self.root) if is_remote(self.root) else hold(self.root)
