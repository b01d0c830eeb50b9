"""Sweeps: what an ordinary study would give for each combination, from the store alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.config import ConfigError, make_config
from pipeline.errors import UsageError
from pipeline.progress import Advance, Reporter, SilentReporter
from pipeline.study import run_study
from pipeline.sweep import SweepSummary, run_sweep
from pipeline.sweep_grid import Grid
from storage import tables
from storage.cohort import read_cohort
from tests import phantoms

EPSILON_AND_SMOOTHNESS = {"match.epsilon": [0.6, 0.8], "fit.smoothness": [0.001, 0.03]}
SERIAL = {"executor": "serial"}


def _config(**settings: Any) -> Any:
    return make_config({"execution": SERIAL, "pairs": "star", "fit": {**phantoms.QUICK_FIT}, **settings})


def _run(cohort: Path, out: Path, **settings: Any) -> Path:
    run_study(_config(**settings), read_cohort(cohort), out, reporter=SilentReporter())
    return out


def _sweep(study: Path, axes: dict[str, list[Any]], **more: Any) -> SweepSummary:
    options = {"execution": SERIAL, "reporter": SilentReporter(), **more}
    return run_sweep(study, Grid("test", axes, options.pop("base", {})), **options)


def _done(summary: SweepSummary, stage: str) -> list[tuple[int, int]]:
    """(done, reused) of a stage in each combination."""
    return [(counts[stage].done, counts[stage].reused) for _, counts in summary.results]


def _rows(summary: SweepSummary, name: str = "sweep", label: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(summary.root / f"{name}.parquet").to_pylist()
    return [row for row in found if row["label"] == label]


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and bytes of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study whose images are gone, so that nothing can be encoded; copy before changing it."""
    folder = tmp_path_factory.mktemp("encoded")
    study = _run(phantoms.write_cohort(folder), folder / "study")
    for path in folder.glob("?.nii.gz"):
        path.unlink()
    return study


@pytest.fixture(scope="module")
def swept(finished: Path) -> SweepSummary:
    """A sweep over two axes, which leaves the finished study as it is."""
    before = _content(finished / "embeddings.zarr")
    summary = _sweep(finished, EPSILON_AND_SMOOTHNESS)
    assert _content(finished / "embeddings.zarr") == before
    return summary


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("sweeps")))


def test_a_sweep_needs_no_image_and_matches_once_for_every_fit(swept: SweepSummary) -> None:
    assert swept.n_failures == 0
    assert _done(swept, "encode") == [(0, 3)] * 4
    assert _done(swept, "prototypes") == [(0, 3)] * 4
    assert _done(swept, "match") == [(2, 0), (0, 2), (2, 0), (0, 2)]
    assert _done(swept, "fit") == [(2, 0)] * 4
    assert not list(swept.root.rglob("*.h5"))


def test_matches_of_the_study_itself_are_not_made_again(study: Path) -> None:
    epsilon = make_config({}).match.epsilon
    assert _done(_sweep(study, {"match.epsilon": [epsilon, 0.6]}), "match") == [(0, 2), (2, 0)]


@pytest.mark.parametrize("number", [0, 3])
def test_a_combination_is_what_a_study_of_its_settings_gives(
    swept: SweepSummary, cohort: Path, tmp_path: Path, number: int
) -> None:
    settings = swept.results[number][0].settings
    fit = {**phantoms.QUICK_FIT, "smoothness": settings["fit.smoothness"]}
    fresh = phantoms.study_tables(_run(cohort, tmp_path / "s", match={"epsilon": settings["match.epsilon"]}, fit=fit))
    found = phantoms.study_tables(swept.root / "combinations" / swept.results[number][0].key)
    assert found["metrics"] == fresh["metrics"]
    assert found["correspondences"] == fresh["correspondences"]


def test_the_table_has_the_settings_and_the_means(swept: SweepSummary) -> None:
    rows, pairs = _rows(swept), _rows(swept, "pairs")
    assert [(row["match.epsilon"], row["fit.smoothness"]) for row in rows] == [
        (0.6, 0.001),
        (0.6, 0.03),
        (0.8, 0.001),
        (0.8, 0.03),
    ]
    assert len(pairs) == 8
    for row in rows:
        members = [pair for pair in pairs if pair["combination"] == row["combination"]]
        dice = sorted(pair["dice"] for pair in members)
        assert (row["n_pairs"], row["n_failed"]) == (2, 0)
        assert {pair["match.epsilon"] for pair in members} == {row["match.epsilon"]}
        assert row["dice"] == pytest.approx(sum(dice) / 2)
        assert row["dice_sd"] == pytest.approx((dice[1] - dice[0]) / 2)
        assert row["dice_p30"] == pytest.approx(dice[0] + 0.3 * (dice[1] - dice[0]))
        assert row["n_rois"] == pytest.approx(sum(pair["n_rois"] for pair in members) / 2)
        assert row["landmark_tre_mm"] is None
    assert {row["label"] for row in pq.read_table(swept.root / "sweep.parquet").to_pylist()} == {0, 1, 2, 3}
    assert yaml.safe_load((swept.root / "sweep.yaml").read_text(encoding="utf-8"))["grid"] == {
        "set": {},
        **EPSILON_AND_SMOOTHNESS,
    }


def test_other_rois_are_pooled_in_the_sweep_and_once(study: Path, cohort: Path, tmp_path: Path) -> None:
    before = _content(study / "embeddings.zarr") | _content(study / "rois")
    axes = {"rois.max_area": [0.1, 0.2], "fit.smoothness": [0.001, 0.03]}
    summary = _sweep(study, axes)
    assert _done(summary, "prototypes") == [(3, 0), (0, 3), (0, 3), (0, 3)]
    assert _content(study / "embeddings.zarr") | _content(study / "rois") == before
    fresh = phantoms.study_tables(_run(cohort, tmp_path / "s", rois={"max_area": 0.1}))
    found = phantoms.study_tables(summary.root / "combinations" / summary.results[0][0].key)
    assert found["correspondences"] == fresh["correspondences"]
    assert found["metrics"] == fresh["metrics"]
    assert _done(_sweep(study, axes), "prototypes") == [(0, 3)] * 4


def test_other_tracks_leave_the_study_as_it_is(study: Path) -> None:
    before = _content(study / "embeddings.zarr") | _content(study / "rois")
    summary = _sweep(study, {"match.epsilon": [0.6]}, base={"tracks.min_overlap": 0.2})
    assert _done(summary, "prototypes") == [(3, 0)]
    assert _content(study / "embeddings.zarr") | _content(study / "rois") == before
    assert _done(_sweep(study, {"tracks.min_overlap": [0.2, 0.9]}, name="axis"), "match") == [(2, 0), (2, 0)]


class _Interrupting(SilentReporter):
    """Ctrl-C after a number of stages that have something to do."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.left = stages

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        self.left -= bool(total)
        if self.left < 0:
            raise KeyboardInterrupt
        yield lambda count, failed=0, running=0: None


@pytest.mark.parametrize("stages", [1, 4])
def test_a_sweep_cut_short_goes_on_where_it_stopped(study: Path, swept: SweepSummary, stages: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        _sweep(study, EPSILON_AND_SMOOTHNESS, reporter=_Interrupting(stages))
    again = _sweep(study, EPSILON_AND_SMOOTHNESS)
    assert _done(again, "fit") == ([(2, 0)] * 4 if stages == 1 else [(0, 2), (0, 2), (2, 0), (2, 0)])
    assert _done(again, "match") == [(0, 2), (0, 2), (2, 0) if stages == 1 else (0, 2), (0, 2)]
    times = ("seconds_match", "seconds_fit")
    both = [
        [{name: value for name, value in row.items() if name not in times} for row in _rows(summary)]
        for summary in (again, swept)
    ]
    assert both[0] == both[1]
    assert _done(_sweep(study, EPSILON_AND_SMOOTHNESS), "fit") == [(0, 2)] * 4


def test_a_bad_combination_costs_only_itself(study: Path) -> None:
    summary = _sweep(study, {"rois.min_area": [0.19, 0.0015]})
    bad, good = _rows(summary)
    assert (bad["n_pairs"], bad["n_failed"], bad["dice"]) == (0, 2, None)
    assert (good["n_pairs"], good["n_failed"]) == (2, 0)
    failures = tables.read_table(summary.root / "combinations" / bad["combination"], "failures").to_pylist()
    assert {row["stage"] for row in failures} == {"prototypes", "match"}
    assert "passes the filters under rois" in failures[-1]["message"]
    assert summary.n_failures == len(failures)


def test_a_bad_file_costs_its_pairs_in_every_combination(study: Path, cohort: Path, tmp_path: Path) -> None:
    label = tmp_path / "labels.nii.gz"
    label.write_bytes(b"no image")
    plan = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    plan["manifest"]["b"]["label"] = str(label)
    (study / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    summary = _sweep(study, {"match.epsilon": [0.6, 0.8]})
    assert [(row["n_pairs"], row["n_failed"]) for row in _rows(summary)] == [(1, 1), (1, 1)]
    assert summary.n_failures == 2


def test_a_subject_without_embeddings_fails_and_is_not_encoded(study: Path) -> None:
    shutil.rmtree(study / "embeddings.zarr" / "c")
    summary = _sweep(study, {"match.epsilon": [0.6]})
    assert [(row["n_pairs"], row["n_failed"]) for row in _rows(summary)] == [(1, 1)]
    rows = tables.read_table(next((summary.root / "combinations").iterdir()), "failures").to_pylist()
    assert "a sweep never encodes, so finish the study with samreg run" in rows[0]["message"]


def test_transforms_are_kept_when_asked_for(study: Path) -> None:
    axes = {"match.epsilon": [0.6]}
    assert _done(_sweep(study, axes), "fit") == [(2, 0)]
    kept = _sweep(study, axes, keep_transforms=True)
    assert (_done(kept, "fit"), len(list(kept.root.rglob("*.h5")))) == ([(2, 0)], 2)
    assert _done(_sweep(study, axes, keep_transforms=True), "fit") == [(0, 2)]
    assert _done(_sweep(study, axes), "fit") == [(0, 2)]


@pytest.mark.parametrize(("pairs", "count"), [(None, 2), ("all", 6), ("knn", 6), ("file", 1)])
def test_pairs_are_those_of_the_run_or_those_asked_for(
    study: Path, tmp_path: Path, pairs: str | None, count: int
) -> None:
    if pairs == "file":
        listed = [{"moving": "c", "fixed": "b"}, {"moving": "ghost", "fixed": "b"}]
        pairs = str(phantoms.write_csv(tmp_path / "pairs.csv", listed))
    summary = _sweep(study, {"match.epsilon": [0.6]}, pairs=pairs, name="p")
    assert _rows(summary)[0]["n_pairs"] == count
    assert summary.n_failures == (1 if count == 1 else 0)


def test_settings_shared_by_all_combinations(study: Path) -> None:
    summary = _sweep(study, {"match.max_pairs": [1, 3]}, base={"match.epsilon": 0.6})
    assert [(row["match.max_pairs"], row["n_rois"]) for row in _rows(summary)] == [(1, 1), (3, 3)]
    assert {combination.config.match.epsilon for combination, _ in summary.results} == {0.6}


@pytest.mark.parametrize(
    ("axes", "base", "message"),
    [
        (
            {"input.slice_axis": ["axial"]},
            {},
            "input.slice_axis: .*prototypes, tracks, match and fit only: .*never encodes",
        ),
        ({"segmenter.name": ["sam_vit_b"]}, {}, "segmenter.name: .*it decides what is encoded"),
        ({"pairs.k": [1, 2]}, {}, "pairs.k: .*choose those with --pairs"),
        ({"execution.workers": [1, 2]}, {}, "execution.workers: .*changes no result; use --workers"),
        ({"atlas.trim": [0.1, 0.2]}, {}, "atlas.trim: .*samreg atlas alone"),
        ({"match.epsilon": [0.6]}, {"output.jacobian": True}, "output.jacobian: .*run a study for its files"),
        ({"preset": ["paper"]}, {}, "preset: .*name its settings one by one"),
        ({"match.epsilon": [0.6]}, {"input.window": [0, 1]}, "input.window: .*never encodes"),
        ({"match.epsilom": [0.6]}, {}, r"unknown setting 'match.epsilom'; did you mean 'match.epsilon'\?"),
        ({"match.epsilon": [0.6, "high"]}, {}, "match.epsilon: .*got 'high'"),
        ({"match.epsilon": [0.6, 0.60]}, {}, "the grid holds match.epsilon=0.6 twice"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(
    study: Path, axes: dict[str, list[Any]], base: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _sweep(study, axes, base=base)
    assert not (study / "sweeps").exists()


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a study folder: .* start one with samreg run"):
        _sweep(tmp_path, {"match.epsilon": [0.6]})


@pytest.mark.ray
def test_ray_gives_the_same_table(study: Path, swept: SweepSummary) -> None:
    with_ray = _sweep(study, EPSILON_AND_SMOOTHNESS, execution={"executor": "ray", "workers": 2})
    for combination, counts in with_ray.results:
        assert counts["fit"].workers == 2
        assert counts["match"].workers <= 2  # a few pairs are one unit
        here, there = (root / "combinations" / combination.key for root in (with_ray.root, swept.root))
        assert phantoms.study_tables(here) == phantoms.study_tables(there)


def _samreg(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command(study: Path, tmp_path: Path) -> None:
    grid = tmp_path / "mine.yaml"
    grid.write_text("set: {match.max_pairs: 5}\nmatch.epsilon: [0.6, 0.7]\n", encoding="utf-8")
    done = _samreg("sweep", study, grid, "--grid", "match.one_to_one=true,false", "--executor", "serial")
    assert done.exit_code == 0, done.output
    assert "one_to_one" in done.stderr
    assert "± " in done.stderr
    rows = pq.read_table(study / "sweeps" / "mine" / "sweep.parquet").to_pylist()
    assert {(row["match.epsilon"], row["match.one_to_one"]) for row in rows} == {
        (0.6, True),
        (0.6, False),
        (0.7, True),
        (0.7, False),
    }
    assert sorted(path.name for path in (study / "sweeps" / "mine").glob("*.png")) == [
        "match.epsilon.png",
        "match.one_to_one.png",
    ]


def test_the_command_ends_with_one_for_a_failure_and_two_for_bad_usage(study: Path) -> None:
    failing = _samreg("sweep", study, "--grid", "rois.min_area=0.19,0.0015", "--executor", "serial")
    assert failing.exit_code == 1
    assert "failures, see" in failing.stderr
    refused = _samreg("sweep", study, "--grid", "input.slice_axis=axial")
    assert (refused.exit_code, refused.stderr.startswith("samreg: input.slice_axis")) == (2, True)


def test_the_reporter_is_the_default_one_without_a_choice(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Reporter, "stage", lambda self, name, total, noun: _noted(seen, name))
    _sweep(study, {"match.epsilon": [0.6]}, reporter=None)
    assert seen == ["prototypes", "match", "fit"]


@contextmanager
def _noted(seen: list[str], name: str) -> Iterator[Advance]:
    seen.append(name)
    yield lambda count, failed=0, running=0: None
