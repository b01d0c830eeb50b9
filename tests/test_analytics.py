"""docs/analytics.md: every snippet runs on a study, and the snippets of one question agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.algorithms.metrics import log_jacobian
from pipeline.cohort_rois import write_cohort_rois
from pipeline.export_tables import export_tables
from pipeline.folder import StudyFolder
from pipeline.notebook import OpenStudy
from storage import tables
from storage.warping import from_analysis, write_image
from tests.phantoms import REPO
from tests.sample_study import write_study

PAGE = (REPO / "docs" / "analytics.md").read_text(encoding="utf-8")
QUESTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `study`, its cohort ROIs and Jacobians, `cohort.csv` and `exported`."""
    where = tmp_path_factory.mktemp("analytics")
    study = write_study(where)
    write_cohort_rois(study, 1.0)
    opened = OpenStudy(study)
    for name in tables.read_table(study, "metrics")["pair"].unique().to_pylist():
        pair = opened.pair(name)
        logarithm = log_jacobian(pair.ddf.compute(), pair.fixed.geometry.spacing_mm).astype(np.float32)
        path = StudyFolder(study).output("jacobians", name)
        path.parent.mkdir(exist_ok=True)
        write_image(from_analysis(logarithm, pair.fixed.geometry), path)
    export_tables(study, where / "exported", ("csv", "duckdb"))
    for name in ("metrics", "correspondences", "cohort_rois"):  # as a run leaves them that is writing, or was killed
        (study / name / ".part.parquet.0123abcd.parquet").write_bytes(b"PAR1")
    return where


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[pd.DataFrame]]:
    """What every snippet answers, by question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {title: [_run(snippet) for snippet in snippets] for title, snippets in QUESTIONS.items()}


def _run(snippet: str) -> pd.DataFrame:
    names: dict[str, Any] = {}
    exec(compile(snippet, "analytics.md", "exec"), names)
    answer = names["answer"]
    return answer if isinstance(answer, pd.DataFrame) else answer.to_pandas()


def test_there_are_snippets_for_every_engine() -> None:
    code = "\n".join(snippet for snippets in QUESTIONS.values() for snippet in snippets)
    for engine in ("import pandas", "import polars", "import duckdb", "import dask.dataframe", "import samreg"):
        assert engine in code
    assert PAGE.count("```python") == sum(map(len, QUESTIONS.values())) >= 16


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_snippets_of_a_question_agree(answers: dict[str, list[pd.DataFrame]], question: str) -> None:
    first, *others = (_sorted(answer) for answer in answers[question])
    assert len(first)
    assert first.notna().all(axis=None)
    for other in others:
        pd.testing.assert_frame_equal(other[first.columns], first, check_dtype=False, rtol=1e-6)


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    words = [name for name in frame.columns if frame[name].dtype.kind not in "f"]
    plain = frame.astype({name: object for name in words if frame[name].dtype.kind not in "iu"})
    return plain.sort_values(words).reset_index(drop=True)


def test_the_answers_are_right(answers: dict[str, list[pd.DataFrame]]) -> None:
    outliers, groups, structures, alike, slowest, jacobian, _ = (found[0] for found in answers.values())
    score = outliers.set_index("subject").score
    assert score.idxmax() == "subject-03"  # only in the pair of Dice .7
    assert score["subject-02"] == pytest.approx(0, abs=1e-9)
    assert sorted(groups.dice.round(6)) == [0.7, 0.7, 0.9, 0.9]  # two labels, a pair in each group
    assert structures.subjects.max() == 3
    assert set(alike.dice.round(6)) == {0.9, 0.7}
    assert list(slowest.seconds.round(6)) == [0.51, 0.51]
    assert jacobian.log_jacobian.abs().between(1e-4, 0.5).all()
