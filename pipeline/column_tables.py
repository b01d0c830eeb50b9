"""The tables of README.md, made from schemas and weights: `python -m pipeline.column_tables README.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from actors.sam_variants import VARIANTS
from actors.sam_weights import WEIGHTS
from storage import tables

_MEANING = {
    "metrics": "one row per pair and label",
    "baseline_metrics": "in `baselines/` after `samreg baseline`, one row per method, pair and label",
    "correspondences": "one row per matched ROI pair",
    "unmatched": "one row per pair in which no ROI pair was found",
    "rois": "one row per ROI of a subject",
    "cohort_rois": "after `samreg cohort rois`, one row per track that was found in another subject",
    "submission": "beside the files of `samreg export --format learn2reg --scores`, one row per pair",
    "queries": "after `samreg query`, one row per ROI found, the surest subject first",
    "atlas": "`samreg atlas` writes it to the file `atlas/atlas.parquet`, one row per iteration and subject",
    "failures": "one row per unit of work that failed in the latest run",
    "runs": "one row per run and stage",
    "units": "one row per unit of work of every run, as it came to its end",
}


def column_tables() -> str:
    """Markdown: a table of columns for every result table."""
    parts = []
    for name, meaning in _MEANING.items():
        lines = [f"**`{name}/`**: {meaning}.", "", "| column | unit | meaning |", "|---|---|---|"]
        lines += [
            f"| `{column}` | {unit or '–'} | {description} |" for column, _, unit, description in tables.describe(name)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def variants_table() -> str:
    """Markdown: every SAM variant with its published file, defaults and source."""
    lines = [
        "| `segmenter:` | file | MB | preprocessing | predicted IoU, stability | from |",
        "|---|---|---|---|---|---|",
    ]
    for name, variant in VARIANTS.items():
        entry = WEIGHTS[name]
        size = f"{entry.size / 1e6:.0f}" if entry.size else "–"
        thresholds = f"{variant.pred_iou:.2f}, {variant.stability:.2f}"
        source = f"`fetch`, [page]({entry.page})" if entry.url else f"[by hand]({entry.page})"
        lines.append(f"| `{name}` | `{entry.file}` | {size} | {variant.preprocess} | {thresholds} | {source} |")
    return "\n".join(lines)


def replace_between(text: str, name: str, body: str) -> str:
    """Put `body` between the markers `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: when the markers are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"no {start} … {end} in the text")
    return f"{before}{start}\n{body}\n{end}{after}"


def main() -> None:
    """Bring the tables of a file in step with the schemas and the weights."""
    path = Path(sys.argv[1])
    text = replace_between(path.read_text(encoding="utf-8"), "columns", column_tables())
    path.write_text(replace_between(text, "variants", variants_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
