"""deploy/: the scripts and manifests, checked as far as a machine without those clusters allows."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler as ray_autoscaler
import typer
import yaml

from pipeline.cli import app
from pipeline.config import load_config
from storage import tables
from tests import phantoms
from tests.phantoms import REPO


def test_submit_sh_is_samreg_submit_of_this_checkout(tmp_path: Path) -> None:
    """A stand-in plays Python and writes down its arguments."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$PYTHONPATH" "$@" > "{tmp_path}/arguments"\nexit 7\n', encoding="utf-8"
    )
    python.chmod(0o755)
    command = ["bash", str(REPO / "deploy/submit.sh"), "configs/cardiac.yaml", "--cohort", "/d/c d.csv"]
    environment = {**os.environ, "PYTHON": str(python)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    sent = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()
    assert sent == [str(REPO), "-m", "pipeline.cli", "submit", "configs/cardiac.yaml", "--cohort", "/d/c d.csv"]


SCRIPTS = sorted([*(REPO / "deploy").glob("*.sh"), *(REPO / "deploy").glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) of a Dockerfile, lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


DOCKERFILE = _instructions((REPO / "deploy/Dockerfile").read_text(encoding="utf-8"))


def _target(name: str) -> list[tuple[str, str]]:
    """The instructions of a target and of those it is built on, first things first."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, argument in DOCKERFILE:
        if instruction == "FROM":
            parent, _, stage = argument.split()
            stages[stage] = list(stages.get(parent, []))
            current = stages[stage]
        elif stages:
            current.append((instruction, argument))
    return stages[name]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_are_pinned_and_run_as_a_user(target: str) -> None:
    instructions = _target(target)
    assert [argument for instruction, argument in instructions if instruction == "USER"][-1] == "samreg"
    assert not [argument for instruction, argument in DOCKERFILE if instruction == "ADD"]
    base = next(argument for instruction, argument in DOCKERFILE if instruction == "FROM")
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+ AS base", base)
    version = next(argument for instruction, argument in DOCKERFILE if instruction == "ARG")
    assert re.fullmatch(r"PYTHON=3\.1[123]\.\d+", version)
    installs = [argument for instruction, argument in DOCKERFILE if instruction == "RUN" and "pip install" in argument]
    assert installs
    assert all("--no-cache-dir" in each and "-c constraints.txt" in each for each in installs)


def test_the_image_has_what_the_segmenters_and_the_secret_for_objects_need() -> None:
    (install,) = [argument for _, argument in _target("build") if "pip install" in argument]
    assert "'.[mobile,s3]'" in install
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"mobile", "s3"} <= extras.keys()


def test_what_the_image_copies_exists_and_passes_the_ignore_file() -> None:
    allowed = (REPO / "deploy/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in allowed
    copies = [argument for instruction, argument in DOCKERFILE if instruction == "COPY" and "--from" not in argument]
    sources = {name for argument in copies for name in argument.split()[:-1]}
    assert {f"!{name}" for name in sources} == {line for line in allowed if line.startswith("!")}
    assert all((REPO / name).exists() for name in sources)
    packages = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} <= sources


RAYJOB = yaml.safe_load((REPO / "deploy/rayjob.yaml").read_text(encoding="utf-8"))
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
GIB = {"encode": 2.4, "match-fit": 1.0}  # of a worker, measured


def _samreg_options(entrypoint: str) -> dict[str, Any]:
    """Options of a samreg command line, parsed as the command does."""
    shell, option, script = shlex.split(entrypoint)
    assert (shell, option) == ("bash", "-c")
    words = shlex.split(script.split("||")[0])
    assert words[:2] == ["samreg", "run"]
    root: Any = typer.main.get_command(app)
    parsed: dict[str, Any] = root.commands["run"].make_context("run", words[2:]).params
    return parsed


def test_the_ray_job_asks_for_what_its_workers_take() -> None:
    parsed = _samreg_options(RAYJOB["spec"]["entrypoint"])
    execution = load_config(None, parsed["overrides"]).execution
    encode, fit = GROUPS["encode"], GROUPS["match-fit"]
    assert parsed["device"] == "cuda"
    assert execution.encode_workers == encode["maxReplicas"] / execution.gpu_fraction
    assert int(encode["rayStartParams"]["num-cpus"]) == 1 / execution.gpu_fraction
    assert parsed["workers"] == fit["maxReplicas"] * int(fit["rayStartParams"]["num-cpus"])
    for name, group in GROUPS.items():
        container = group["template"]["spec"]["containers"][0]
        workers = int(group["rayStartParams"]["num-cpus"])
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        for kind in ("requests", "limits"):
            assert float(container["resources"][kind]["memory"].removesuffix("Gi")) >= workers * GIB[name] + 1 + store
            assert container["resources"][kind]["cpu"] == group["rayStartParams"]["num-cpus"]
        assert group["minReplicas"] == group["replicas"] == 0


@pytest.mark.parametrize(("code", "ended"), [(0, True), (1, True), (2, False), (143, False)])
def test_the_ray_job_does_not_start_again_for_what_would_fail_again(tmp_path: Path, code: int, ended: bool) -> None:
    """As it gets there: KubeRay writes the entrypoint into a script, `ray job submit` joins its words for a shell."""
    (tmp_path / "samreg").write_text(f'#!/bin/sh\n[ "$*" = "{_words()}" ] || exit 99\nexit {code}\n', encoding="utf-8")
    (tmp_path / "samreg").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    listed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {RAYJOB['spec']['entrypoint']} ;"], capture_output=True, text=True, check=True
    )
    command = shlex.join(listed.stdout.removesuffix("\0").split("\0"))
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ended, done.stderr


def _words() -> str:
    return RAYJOB["spec"]["entrypoint"].split("'")[1].split(" ||")[0].removeprefix("samreg ")


def test_the_ray_job_is_whole() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert f"ray=={CLUSTER['rayVersion']}" in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert GROUPS["encode"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for group in (CLUSTER["headGroupSpec"], *GROUPS.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["livenessProbe"]["exec"]["command"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"data": "/data", "weights": "/weights", "shm": "/dev/shm"}
        assert mounts.keys() == volumes.keys()
        assert container["envFrom"][0]["secretRef"]["name"]
        assert not container["image"].endswith(":latest")


def test_the_cluster_file_fits_rays_schema() -> None:
    described = yaml.safe_load((REPO / "deploy/cluster.yaml").read_text(encoding="utf-8"))
    schema = json.loads((Path(ray_autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(described, schema)
    assert described["head_node_type"] in described["available_node_types"]
    assert described["available_node_types"]["head"]["resources"]["CPU"] == 0


_SRUN = r"""#!/bin/bash
# Runs a step here, once per task, as Slurm would on its nodes.
tasks=1
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
trap 'kill -TERM $(jobs -p) 2>/dev/null; wait; exit 143' TERM
for ((task = 0; task < tasks; task++)); do "$@" & done
wait
"""
_SCONTROL = """#!/bin/bash
case $1 in
  show) printf 'node-%s\\n' 1 2 ;;
  requeue) echo "$2" >> "$(dirname "$0")/requeued" ;;
esac
"""


@pytest.mark.ray
@pytest.mark.slow
def test_the_slurm_script_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    """On two `nodes` here, with stand-ins for srun and scontrol: ended by the signal, then run to the end."""
    cohort = phantoms.write_cohort(tmp_path / "data", ("a", "b", "c", "d"))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        options = "--num-cpus=1 --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0"
        environment = {
            **phantoms.environment(),
            **{"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "VENV": sys.prefix, "RAY_TMPDIR": short},
            **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node-[1-2]", "REQUEUE": "1"},
            "RAY_OPTIONS": f"{options} --object-store-memory=100000000",
        }
        out, calm = tmp_path / "study", tmp_path / "calm"
        arguments = ("--cohort", cohort, "--out", out, "--pairs", "star", "--until", "match")
        command = ["bash", REPO / "deploy/slurm.sbatch", *arguments]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
            while not list(out.glob("embeddings.zarr/*/zarr.json")):
                assert job.poll() is None, job.stderr and job.stderr.read()
                time.sleep(0.05)
            job.send_signal(signal.SIGTERM)
            log = job.communicate(timeout=120)[1]
        assert job.returncode == 143, log
        assert "samreg: interrupted; what is finished is kept" in log
        assert (commands / "requeued").read_text(encoding="utf-8").split() == [str(os.getpid())]
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert phantoms.samreg("run", "--cohort", cohort, "--out", calm, *arguments[4:]).returncode == 0
    assert phantoms.study_tables(out) == phantoms.study_tables(calm)
    encoded = [row for row in tables.read_table(out, "runs").to_pylist() if row["stage"] == "encode"]
    assert encoded[-1]["workers"] == 2
