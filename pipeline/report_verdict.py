"""What a study comes to, in a sentence, in a few numbers, and in what is to be done about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.algorithms.quality import LIMIT
from pipeline.report_data import ReportData
from pipeline.report_page import Html, anchor, cards, element
from pipeline.report_subjects import Subjects

_SIGNS = {"good": "\N{CHECK MARK}", "look": "\N{BLACK UP-POINTING TRIANGLE}", "bad": "\N{MULTIPLICATION X}"}
_AGAIN = "then run the same command again: only what failed is repeated."
_NAMED = 3  # subjects named one by one


@dataclass(frozen=True)
class Action:
    """Something to do.

    Attributes:
        level: good, look or bad.
        text: what was found and what to do.
        target: title of the section that shows it, or "".
    """

    level: str
    text: str
    target: str = ""


def actions(data: ReportData, subjects: Subjects) -> list[Action]:
    """What to do, the most pressing first."""
    found = [*_failed(data), *_missing(data), *_accuracy(data), *_suspect(data, subjects)]
    return found or [Action("good", "Nothing to do: all was registered, and no pair or subject stands out.")]


def verdict(data: ReportData, found: list[Action]) -> Html:
    """One sentence on the whole study, with what its numbers mean below it."""
    levels = {action.level for action in found}
    level = next(level for level in ("bad", "look", "good") if level in levels)
    fitted, n_suspect = len(data.pairs), int(data.suspect.sum())
    first = {
        "good": "complete, and nothing stands out",
        "look": "complete; some results need a look",
        "bad": "registration did not help" if data.status.complete else f"not complete: {_lacking(data)}",
    }[level]
    share = f"{fitted - n_suspect:,} of {fitted:,} registered pairs raise no doubts"
    sentences = [share, _gained(data)] if fitted else ["No pair was registered yet"]
    body = element("div", element("strong", first.capitalize()), element("p", ". ".join(filter(None, sentences)) + "."))
    sign = element("span", _SIGNS[level], class_="sign", aria_hidden="true")
    return element("div", sign, body, class_=f"verdict {level}", role="status")


def to_do(found: list[Action]) -> Html:
    """The actions as a list."""
    words = {"good": "", "look": "Look: ", "bad": "Failed: "}
    items = []
    for action in found:
        link = element("a", action.target, href=f"#{anchor(action.target)}") if action.target else ""
        parts = [element("b", words[action.level]), action.text, *([" See ", link, "."] if link else [])]
        items.append(element("li", *parts, class_=f"is-{action.level}"))
    return element("ul", *items, class_="todo")


def key_numbers(data: ReportData, subjects: Subjects) -> Html:
    """The numbers that tell most, as cards."""
    stages = {stage.stage: stage for stage in data.status.stages}
    encode, match, fit = stages["encode"], stages["match"], stages["fit"]
    pairs = max(match.done + match.failed + match.missing, fit.done + fit.failed + fit.missing)
    numbers: list[tuple[str, object]] = [
        ("pairs registered", f"{fit.done:,} of {pairs:,}"),
        ("subjects encoded", f"{encode.done:,} of {encode.done + encode.failed + encode.missing:,}"),
    ]
    if data.count("dice"):
        numbers.append(("mean Dice: before, affine, after", _arrow(data, "dice_before", "dice_affine", "dice")))
    prefix, unit, meaning = data.distance
    if data.count(prefix):
        steps = (f"{prefix}_before", f"{prefix}_affine", prefix)
        numbers.append((f"mean {meaning} ({unit}): before, affine, after", _arrow(data, *steps, digits=1)))
    if data.pairs:
        folded = 100 * np.nanmean(data.columns["fold_fraction"])
        numbers.append(("voxels that fold, mean", f"{folded:.2g} %"))
        numbers.append(("matched ROIs a pair, median", f"{np.nanmedian(data.columns['n_rois']):.0f}"))
        standing = int((subjects.quality.score >= LIMIT).sum())
        numbers.append((f"pairs to look at; subjects that stand out: {standing}", f"{int(data.suspect.sum()):,}"))
        numbers.append(("seconds a pair, median", f"{np.median(data.columns['seconds']):.2g}"))
    else:
        numbers.append(("matched ROIs", f"{data.matches.total:,}"))
    return cards(numbers)


def _arrow(data: ReportData, *columns: str, digits: int = 2) -> str:
    means = [data.values(column) for column in columns]
    texts = [f"{values.mean():.{digits}f}" if len(values) else "?" for values in means]
    return " → ".join(texts)


def _lacking(data: ReportData) -> str:
    """What failed or is missing, counted."""
    units = {"encode": "subject", "prototypes": "subject", "match": "pair", "fit": "pair"}
    counts = {(word, unit): 0 for word in ("failed", "missing") for unit in ("subject", "pair")}
    for stage in data.status.stages:
        counts["failed", units[stage.stage]] += stage.failed
        counts["missing", units[stage.stage]] = max(counts["missing", units[stage.stage]], stage.missing)
    return ", ".join(f"{n:,} {unit}{'s' * (n != 1)} {word}" for (word, unit), n in counts.items() if n)


def _gained(data: ReportData) -> str:
    columns = data.columns
    for name, better in (("dice", 1), ("distance", -1)):
        gain = better * (columns[name] - columns[f"{name}_before"])
        known = gain[np.isfinite(gain)]
        if len(known):
            what = "Dice rose" if name == "dice" else "the distance fell"
            return f"{what} in {int((known > 0).sum()):,} of {len(known):,} pairs"
    return "There are no labels or landmarks to measure accuracy with"


def _failed(data: ReportData) -> list[Action]:
    rows = data.failures.select(["stage", "subject", "pair", "error"]).to_pylist()
    subjects = sorted({row["subject"] for row in rows if row["subject"] and not row["pair"]})
    blocked = sum(1 for row in rows if row["error"] == "SubjectFailed")
    own = [row for row in rows if row["pair"] and row["error"] != "SubjectFailed"]
    found = []
    if subjects:
        cost = f", which costs {blocked:,} pair{'s' * (blocked != 1)}" if blocked else ""
        correct = "Correct what the messages name, or take the rows out of the manifest"
        found.append(Action("bad", f"{_names(subjects)} failed{cost}. {correct}; {_AGAIN}", "Failures"))
    if own:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in Counter(row["error"] for row in own).most_common(3))
        number = f"{len(own):,} pair{'s' * (len(own) != 1)}"
        found.append(
            Action("bad", f"{number} failed by themselves ({kinds}). Correct what is named; {_AGAIN}", "Failures")
        )
    return found


def _missing(data: ReportData) -> list[Action]:
    missing = [f"{stage.missing:,} at {stage.stage}" for stage in data.status.stages if stage.missing]
    if not missing:
        return []
    text = f"not all was done: missing are {', '.join(missing)}. Run the same command again; it does the rest."
    return [Action("bad", text, "How it was made")]


def _accuracy(data: ReportData) -> list[Action]:
    found = []
    columns = data.columns if data.pairs else {}
    before, after = columns.get("dice_before", np.zeros(0)), columns.get("dice", np.zeros(0))
    known = np.isfinite(before) & np.isfinite(after)
    if known.any() and after[known].mean() <= before[known].mean():
        text = (
            f"registration did not help: mean Dice {before[known].mean():.2f} before, {after[known].mean():.2f} after. "
            "Look at the pictures; other ROIs (segmenter) or other matching settings may suit these images better."
        )
        found.append(Action("bad", text, "Pictures"))
    fallbacks = Counter(name for name in data.means.column("fallback").to_pylist() if name and name != "none")
    if fallbacks:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in fallbacks.most_common())
        text = f"too few ROIs for a field, so a simpler map was written ({kinds}). More ROIs or a lower epsilon help."
        found.append(Action("look", text, "Pairs"))
    return found


def _suspect(data: ReportData, subjects: Subjects) -> list[Action]:
    found = []
    standing = np.flatnonzero(subjects.quality.score >= LIMIT)
    standing = standing[np.argsort(-subjects.quality.score[standing], kind="stable")]
    for row in standing[:_NAMED]:
        pairs = subjects.columns["pairs"][row]
        bad = round(pairs * np.nan_to_num(subjects.columns["suspect"][row]))
        text = (
            f"subject {subjects.names[row]} stands out, score {subjects.quality.score[row]:.1f} "
            f"({subjects.quality.reasons[row]}); {bad:.0f} of its {pairs:.0f} pairs need a look. "
            "Check its image first: orientation, field of view, modality, artefacts."
        )
        found.append(Action("look", text, "Subjects"))
    if len(standing) > _NAMED:
        found.append(Action("look", f"{len(standing) - _NAMED:,} more subjects stand out.", "Subjects"))
    named = {subjects.names[row] for row in standing}
    roles = [np.isin(data.means.column(role).to_pylist(), list(named)) for role in ("moving", "fixed")]
    others = int((data.suspect & ~np.logical_or(*roles)).sum()) if len(data.pairs) else 0
    if others:
        of_which = " of other subjects" if named else ""
        plural = "s stand" if others != 1 else " stands"
        found.append(Action("look", f"{others:,} pair{plural} out or raised an alarm{of_which}.", "Pairs"))
    return found


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
    return f"{len(names):,} subject{'s' * (len(names) != 1)} ({shown})"
