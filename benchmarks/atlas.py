"""Atlases: memory of the reductions over many subjects; our template beside that of ANTs.

    python benchmarks/atlas.py reductions --subjects 20 60 200 --shape 64 160 160
    python benchmarks/atlas.py template --cohort cohort.csv --subjects 6 --out /tmp/atlas [SETTING=VALUE ...]

`reductions` writes random warped images, log-Jacobians and label shares of so many synthetic subjects as the warping
stage leaves them, and runs all reductions of an iteration in a process of its own, whose largest resident memory and
processor seconds it prints; the first line is the process with all it imports before it does anything.

`template` takes the first subjects of a manifest and makes an atlas with `samreg atlas` (with and without sharpening)
and with `ants.build_template` (SyN, its defaults, with and without sharpening), each in a process of its own with one
thread. Sharpness is measured alike, in the foreground of the inner two thirds of each template along every axis, since
that of ANTs is black where subjects end. Labels, of which the mean Dice over pairs of subjects is printed, are carried
by each method's own registration to its template. Seconds are those of the processor, with encoding and evaluation in
ours, and without the last registration, which is for the labels only, in that of ANTs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.process import own_peak_memory

LABELS = (1, 2, 3)
MIB = 2**20


def write_synthetic(root: Path, subjects: int, shape: tuple[int, int, int]) -> None:
    """Volumes of `subjects` subjects, one at a time."""
    from pipeline.atlas_folder import IterationFolder

    folder = IterationFolder(root, 1, ".nii.gz")
    folder.create("images", (subjects, *shape), "float32", np.nan, subjects)
    folder.create("log_jacobians", (subjects, *shape), "float32", np.nan, subjects)
    folder.create("shares", (subjects, len(LABELS), *shape), "uint8", 0, subjects)
    folder.create("left", (subjects, 3, *(n // 2 for n in shape)), "float32", 0.0, subjects)
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    distance = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    for index in range(subjects):
        generator = np.random.default_rng([7, index])
        volume = distance + generator.normal(0, 0.1, shape).astype(np.float32)
        folder.put("images", index, volume)
        folder.put("log_jacobians", index, 0.1 * volume)
        shells = [(volume > 0.2 * k) & (volume < 0.2 * (k + 1)) for k in LABELS]
        folder.put("shares", index, np.stack(shells).astype(np.uint8) * 255)
        folder.put("left", index, np.stack([volume[::2, ::2, ::2][tuple(slice(n // 2) for n in shape)]] * 3))


def reduce_all(root: Path, subjects: int) -> None:
    """Every reduction of an iteration; prints a line."""
    from pipeline import atlas_reduce
    from pipeline.algorithms.atlas_config import AtlasConfig
    from pipeline.atlas_folder import IterationFolder

    folder, members = IterationFolder(root, 1, ".nii.gz"), list(range(subjects))
    before, start = own_peak_memory(), time.process_time()
    atlas_reduce.mean_left(folder, members)
    for how in ("mean", "median", "trimmed"):
        atlas_reduce.images(folder, members, AtlasConfig(average=how))
    atlas_reduce.log_jacobians(folder, members)
    atlas_reduce.agreement(folder, members, LABELS)
    seconds = time.process_time() - start
    print(f"| {subjects} | {before / MIB:.0f} | {own_peak_memory() / MIB:.0f} | {seconds:.0f} |", flush=True)


def run_reductions(arguments: argparse.Namespace) -> None:
    print("| subjects | MiB before | peak MiB | processor s |\n|---|---|---|---|", flush=True)
    for subjects in arguments.subjects:
        with TemporaryDirectory(dir=arguments.out) as root:
            write_synthetic(Path(root), subjects, tuple(arguments.shape))
            subprocess.run([sys.executable, __file__, "reduce", root, str(subjects)], check=True)


def ours(arguments: argparse.Namespace, out: Path, settings: list[str]) -> dict[str, float | str]:
    """Encode the subjects and make their atlas, all in this process."""
    import pyarrow.parquet as pq

    from pipeline.atlas import run_atlas
    from pipeline.config import load_config
    from pipeline.study import run_study
    from storage.cohort import Cohort, read_cohort

    start = time.process_time()
    cohort = Cohort(read_cohort(arguments.cohort).subjects[: arguments.subjects])
    fits = [text for text in settings if not text.startswith("atlas.")]
    config = load_config(None, ["execution.executor=serial", "pairs.mode=star", *fits])
    run_study(config, cohort, out, until="prototypes")
    limits = [f"atlas.iterations={arguments.iterations}", "atlas.settled=0", *(s for s in settings if s not in fits)]
    summary = run_atlas(out, limits, execution={"executor": "serial"})
    rows = pq.read_table(summary.root / "atlas.parquet").to_pylist()
    last = [row["dice_pairwise"] for row in rows if row["iteration"] == len(summary.iterations)]
    return {"template": str(summary.root / "template.nii.gz"), "dice": float(np.mean(last)), **used(start)}


def ants_template(arguments: argparse.Namespace, out: Path, blending: float | None) -> dict[str, float | str]:
    """`ants.build_template` from the first subject, and the pairwise Dice of labels by a last registration to it."""
    import ants

    from pipeline.algorithms.label_votes import dice_matrix
    from storage.cohort import read_cohort

    start = time.process_time()
    subjects = read_cohort(arguments.cohort).subjects[: arguments.subjects]
    images = [ants.image_read(subject.image) for subject in subjects]
    made = ants.build_template(
        initial_template=images[0],
        image_list=images,
        iterations=arguments.iterations,
        blending_weight=blending,
        random_seed=1,
    )
    spent = used(start)
    ants.image_write(made, str(out / "template.nii.gz"))
    carried = []
    for subject, image in zip(subjects, images, strict=True):
        found = ants.registration(made, image, type_of_transform="SyN")["fwdtransforms"]
        label = ants.image_read(subject.label)
        carried.append(ants.apply_transforms(made, label, found, interpolator="nearestNeighbor").numpy().ravel())
    values = sorted(set(np.unique(carried)) - {0})
    overlaps = np.array([[[((a == k) & (b == k)).sum() for b in carried] for a in carried] for k in values], float)
    dice = dice_matrix(overlaps)
    return {
        "template": str(out / "template.nii.gz"),
        "dice": float(dice[~np.eye(len(dice), dtype=bool)].mean()),
        **spent,
    }


def used(start: float) -> dict[str, float]:
    return {"seconds": time.process_time() - start, "peak_mib": own_peak_memory() / MIB}


def run_template(arguments: argparse.Namespace) -> None:
    from pipeline.algorithms import template
    from storage.images import read_image

    methods = ["ours", "ours sharpened", "ants plain", "ants"]
    print("| template | sharpness | Dice of pairs | processor s | peak MiB |\n|---|---|---|---|---|", flush=True)
    for method in methods:
        out = arguments.out / method.replace(" ", "-")
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "one", "--method", method, "--cohort", str(arguments.cohort)]
        sizes = ["--subjects", str(arguments.subjects), "--iterations", str(arguments.iterations), "--out", str(out)]
        done = subprocess.run([*command, *sizes, *arguments.settings], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        image = read_image(found["template"])
        inside = np.zeros(image.array.shape, bool)
        inside[tuple(slice(n // 6, n - n // 6) for n in inside.shape)] = True
        inside &= template.foreground(image.array)
        sharpness = template.sharpness(image.array, image.geometry.spacing_mm, inside)
        row = f"{sharpness:.4f} | {found['dice']:.3f} | {found['seconds']:.0f} | {found['peak_mib']:.0f}"
        print(f"| {method} | {row} |", flush=True)


def run_one(arguments: argparse.Namespace) -> None:
    blending = {"ants plain": None, "ants": 0.75}
    if arguments.method in blending:
        found = ants_template(arguments, arguments.out, blending[arguments.method])
    else:
        more = ["atlas.sharpening=0.25"] if "sharpened" in arguments.method else []
        found = ours(arguments, arguments.out / "study", [*arguments.settings, *more])
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    reductions = commands.add_parser("reductions")
    reductions.add_argument("--subjects", type=int, nargs="+", default=[20, 60, 200])
    reductions.add_argument("--shape", type=int, nargs=3, default=[64, 160, 160])
    reductions.add_argument("--out", type=Path, help="folder for the volumes; the system's without it")
    reductions.set_defaults(run=run_reductions)
    inner = commands.add_parser("reduce")
    inner.add_argument("root", type=Path)
    inner.add_argument("subjects", type=int)
    inner.set_defaults(run=lambda a: reduce_all(a.root, a.subjects))
    for name, run in (("template", run_template), ("one", run_one)):
        single = commands.add_parser(name)
        single.add_argument("--cohort", type=Path, required=True)
        single.add_argument("--subjects", type=int, default=6)
        single.add_argument("--iterations", type=int, default=3)
        single.add_argument("--out", type=Path, required=True)
        single.add_argument("--method", default="")
        single.add_argument("settings", nargs="*")
        single.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
