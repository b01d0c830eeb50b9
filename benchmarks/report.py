"""The report of a synthetic study: seconds and memory to make it, its size, and how soon a browser can use it.

    python benchmarks/report.py --pairs 10000 100000 --out benchmarks/out/report

A study of as many subjects as give that many unordered pairs, in tables as a run leaves them: metrics of three labels,
`--matches` correspondences a pair, ROIs, failures of one pair in a hundred. Measures spread as those of hearts do; one
subject in fifty is bad, and so are its pairs. There are no images, so the pictures of pairs are left out; each takes
about two seconds and 200 kB more. The browser's time is from the start of navigation to the moment that all tables sort
and filter; then come a sort and a filter of the table of pairs, each until the page has drawn.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.folder import StudyFolder
from storage import tables

TILE = 16
LABELS = 4  # rows of the metrics: the mean and three labels
BAD_SUBJECTS = 0.02
HEADER = "| pairs | matches | made in s (CPU) | peak MiB | page MB | files MB | ready s | sort s | filter s |"
MAKE = (
    "import resource,sys,time; from pipeline.report import write_report; start=time.process_time();"
    "write_report(sys.argv[1]);"
    "print(time.process_time()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)"
)
CHROMIUM = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def main() -> None:
    """Write, report and open studies of several sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000])
    parser.add_argument("--matches", type=int, default=120, help="correspondences of a pair, mean")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/report"))
    arguments = parser.parse_args()
    print(HEADER, "|" + "---|" * (HEADER.count("|") - 1), sep="\n", flush=True)
    for pairs in arguments.pairs:
        root = arguments.out / f"{pairs}"
        shutil.rmtree(root, ignore_errors=True)
        n_matches, _ = write_study(root, pairs, arguments.matches)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        command = [sys.executable, "-c", MAKE, str(root)]
        made = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.split()
        page = root / "report" / "index.html"
        files = sum(path.stat().st_size for path in page.parent.iterdir())
        opened = open_page(page)
        cells = [f"{pairs:,}", f"{n_matches:,}", f"{float(made[0]):.1f}", f"{float(made[1]):.0f}"]
        cells += [f"{page.stat().st_size / 1e6:.2f}", f"{files / 1e6:.2f}", *(f"{s:.2f}" for s in opened)]
        print("| " + " | ".join(cells) + " |", flush=True)


def open_page(page: Path) -> tuple[float, float, float]:
    """Seconds until the tables work, of a sort and of a filter, in headless Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    timed = """async action => {
        const start = performance.now();
        action();
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        return (performance.now() - start) / 1000;
    }"""
    table = "document.querySelector('#pairs-table').closest('[data-grid]')"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(CHROMIUM))
        view = browser.new_page()
        view.goto(page.resolve().as_uri())
        view.wait_for_selector("html[data-ready]", timeout=60_000)
        ready = float(view.evaluate("document.documentElement.dataset.ready")) / 1000
        sort = view.evaluate(f"({timed})(() => {table}.querySelectorAll('th button')[0].click())")
        typed = "input.value = 's0001 score>1'; input.dispatchEvent(new Event('input'))"
        found = f"(() => {{ const input = {table}.querySelector('input'); {typed}; }})"
        search = view.evaluate(f"({timed})({found})")
        browser.close()
    return ready, sort, search


def write_study(root: Path, pairs: int, matches: int, share: float = BAD_SUBJECTS) -> tuple[int, set[str]]:
    """Write the tables of a study; the number of correspondences, and the subjects made bad, a `share` of them."""
    rng = np.random.default_rng(pairs)
    size = math.ceil((1 + math.sqrt(1 + 8 * pairs)) / 2)
    subjects = [f"s{number:05d}" for number in range(size)]
    bad = rng.random(size) < share
    moving, fixed = (index[:pairs] for index in np.tril_indices(size, -1))
    failed = rng.random(pairs) < 0.01
    StudyFolder(root).root.mkdir(parents=True)
    written = 0
    tile = fixed // TILE * size + moving // TILE
    kept = np.flatnonzero(~failed)
    kept = kept[np.argsort(tile[kept], kind="stable")]
    for number, members in enumerate(np.split(kept, np.flatnonzero(np.diff(tile[kept])) + 1)):
        trios = [(subjects[moving[i]], subjects[fixed[i]], bool(bad[moving[i]] or bad[fixed[i]])) for i in members]
        written += _write_part(root, f"{number:06d}", sorted(trios), matches, rng)
    for name in subjects:
        rois = {"subject": [name] * 40, "quality": rng.beta(8, 2, 40), "roi": np.arange(40)}
        tables.write_part(root, "rois", name, _table("rois", rois, 40))
    names = [f"{subjects[m]}__{subjects[f]}" for m, f in zip(moving, fixed, strict=True)]
    _write_records(root, subjects, names, [subjects[m] for m in moving], [subjects[f] for f in fixed], failed)
    return written, {name for name, is_bad in zip(subjects, bad, strict=True) if is_bad}


def _write_part(root: Path, part: str, trios: list[tuple[str, str, bool]], matches: int, rng: Any) -> int:
    n = len(trios)
    names = {"moving": [m for m, _, _ in trios], "fixed": [f for _, f, _ in trios]}
    names["pair"] = [f"{m}__{f}" for m, f, _ in trios]
    bad = np.array([b for _, _, b in trios])
    count = np.maximum(3, rng.poisson(matches, n) // np.where(bad, 3, 1))
    row = np.repeat(np.arange(n), count)
    place = rng.normal(0, 40, (len(row), 3))
    moved = place * rng.normal(1, 0.05, (n, 3))[row] + rng.normal(0, 3, place.shape) * np.where(bad, 6, 1)[row][:, None]
    score = {
        "similarity": rng.beta(9, 3, len(row)),
        "confidence": rng.beta(4, 2, len(row)) * np.where(bad, 0.6, 1)[row],
    }
    places = {
        f"{r}_centroid_{a}_mm": p[:, i] for r, p in (("fixed", place), ("moving", moved)) for i, a in enumerate("zyx")
    }
    repeated = {name: np.array(values)[row] for name, values in names.items()}
    correspondences = _table("correspondences", {**repeated, **score, **places}, len(row))
    tables.write_part(root, "correspondences", part, correspondences)
    dice = np.clip(rng.normal(0.65, 0.08, n) - 0.3 * bad, 0, 1)
    fit: dict[str, Any] = {"n_rois": count, "dice": dice, "dice_affine": dice - 0.15, "dice_before": dice * 0.4}
    fit |= {"dice_centered": dice * 0.5, "tre_mm": 12 * (1 - dice), "tre_mm_before": rng.gamma(9, 3, n)}
    fit |= {
        "tre_mm_affine": 20 * (1 - dice),
        "hd95_mm": 20 * (1 - dice),
        "roi_dice": rng.normal(0.8, 0.02, n) - 0.1 * bad,
    }
    fit |= {"roi_dice_min": rng.normal(0.4, 0.05, n), "sdlogj": rng.gamma(30, 0.012, n)}
    fit |= {"fold_fraction": rng.exponential(1e-5, n) + 0.02 * bad, "fold_fraction_rois": rng.exponential(1e-5, n)}
    fit |= {"seconds_match": rng.gamma(9, 0.001, n), "seconds_fit": rng.gamma(9, 0.2, n)}
    rows = {**names, **fit, "fallback": ["none"] * n, "flag": [""] * n}
    labelled = {name: np.repeat(np.array(values), LABELS) for name, values in rows.items()}
    labelled["label"] = np.tile(np.arange(LABELS), n)
    tables.write_part(root, "metrics", part, _table("metrics", labelled, n * LABELS))
    return len(row)


def _table(name: str, columns: dict[str, Any], rows: int) -> pa.Table:
    """A table of the schema; what is not given is null, and keys are all alike."""
    schema, given = tables.SCHEMAS[name], {"key": ["k"] * rows, **columns}
    arrays = [pa.array(given[f.name]).cast(f.type) if f.name in given else pa.nulls(rows, f.type) for f in schema]
    return pa.table(arrays, schema=schema)


def _write_records(
    root: Path, subjects: list[str], pairs: list[str], moving: list[str], fixed: list[str], failed: Any
) -> None:
    lost: Iterator[str] = (pair for pair, gone in zip(pairs, failed, strict=True) if gone)
    message = "labels have the grid 10 x 192 x 192, the image 12 x 192 x 192; correct the file"
    failures = [
        {"stage": "fit", "unit": p, "pair": p, "error": "ImageError", "message": f"{p}: {message}", "attempt": 1,
         "traceback": "Traceback (most recent call last):\n  …"}
        for p in lost
    ]  # fmt: skip
    tables.write_part(root, "failures", "fit", tables.table_from_rows("failures", failures))
    run = {"run": "r", "stage": "fit", "units_done": len(pairs), "seconds": 2.0 * len(pairs), "workers": 2}
    tables.write_part(root, "runs", "r", tables.table_from_rows("runs", [run]))
    (root / "run.yaml").write_text(yaml.safe_dump({"config": {}, "versions": {}}), encoding="utf-8")
    columns = {"pair": pairs, "moving": moving, "fixed": fixed, **dict.fromkeys(("match", "fit"), ["k"] * len(pairs))}
    manifest = {name: {"image": f"/nowhere/{name}.nii.gz", "group": f"vendor {name[-1]}"} for name in subjects}
    plan = {"subjects": dict.fromkeys(subjects), "until": "fit", "outputs": [], "pairs": columns, "manifest": manifest}
    (root / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


if __name__ == "__main__":
    main()
