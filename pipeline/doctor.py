"""What a study needs of a machine and a cluster, checked one by one, with what to do about each."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, TypeAlias

from packaging.requirements import Requirement

from pipeline.config import StudyConfig
from pipeline.errors import UsageError
from pipeline.process import own_cores
from storage.places import ObjectStoreError, names, put_object, read_bytes, remove
from storage.redaction import redact
from storage.sources import ImageError, is_remote, remote_size

State: TypeAlias = Literal["ok", "warn", "fail"]
PYTHONS = ((3, 11), (3, 14))
GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHM, FEW_FILES = 10 * GIB, 4 * GIB, GIB, 4096
SLOW_WRITE_SECONDS = 0.2
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do unless it is `ok`."""

    name: str
    state: State
    found: str
    advice: str = ""


def examine(config: StudyConfig, out: Path | None, address: str | None, uris: Sequence[str]) -> Iterator[Check]:
    """Every check that concerns this configuration, folder, cluster and these URIs; a secret never shows."""
    checks: list[Callable[[], Check]] = [check_python, check_packages, check_threads, check_memory, check_shm]
    checks += [check_open_files, partial(check_device, config), partial(check_weights, config)]
    if out is not None:
        local = [partial(check_space, out), partial(check_writing, out)]
        checks += [partial(check_objects, out)] if is_remote(out) else local
    checks += [partial(check_uri, uri) for uri in uris]
    checks.append(partial(check_cluster, address))
    for check in checks:
        try:
            found = check()
        except OSError as error:
            name = getattr(check, "func", check).__name__.removeprefix("check_").replace("_", " ")
            found = Check(name, "fail", f"{type(error).__name__}: {error}", "let this user read and write there")
        yield Check(found.name, found.state, redact(found.found), redact(found.advice))


def check_python() -> Check:
    """The version of Python."""
    low, high = PYTHONS
    fits = low <= sys.version_info[:2] < high
    return Check(
        "Python", "ok" if fits else "fail", platform.python_version(), "" if fits else "install Python 3.11 to 3.13"
    )


def check_packages() -> Check:
    """Installed packages against what the program requires."""
    try:
        wanted = [Requirement(text) for text in requires("samreg") or ()]
    except PackageNotFoundError:
        advice = "fine for the nodes of a cluster, where code is sent; elsewhere: pip install -c constraints.txt ."
        return Check("packages", "warn", "samreg itself is not installed", advice)
    problems = [text for each in wanted if each.marker is None for text in _missing(each)]
    if problems:
        return Check("packages", "fail", "; ".join(problems), "pip install -c constraints.txt .")
    return Check("packages", "ok", ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "numpy", "zarr")))


def _missing(wanted: Requirement) -> Iterator[str]:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        yield f"{wanted.name} is missing"
        return
    if not wanted.specifier.contains(found, prereleases=True):
        yield f"{wanted.name} {found} is not {wanted.specifier}"


def check_threads() -> Check:
    """Cores and numerical threads; workers are one process per core, so more than one thread each contend."""
    cores, quota = own_cores(), _cgroup_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores{'' if quota is None else f', {quota:g} by cgroup'}, OMP_NUM_THREADS={threads or 'unset'}"
    if quota is not None and quota < cores:
        return Check("cores", "warn", found, f"set execution.workers={max(1, int(quota))}: the container gets no more")
    if threads is not None and threads != "1":
        return Check("cores", "warn", found, "unset it, or set it to 1; execution.threads counts for the workers")
    return Check("cores", "ok", found)


def check_memory() -> Check:
    """Memory that this process can still take, by the machine and by its cgroup."""
    free, limit = _free_memory(), _number(_CGROUP / "memory.max")
    have = free if limit is None else max(0, min(free, limit - _cgroup_memory()))
    found = f"{have / GIB:.1f} GiB free{'' if limit is None else f', cgroup limit {limit / GIB:.1f} GiB'}"
    if have < LITTLE_MEMORY:
        return Check("memory", "warn", found, "see what samreg plan says of a worker; lower execution.workers")
    return Check("memory", "ok", found)


def check_shm() -> Check:
    """/dev/shm, where Ray keeps its object store."""
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", "ok", "there is none on this system")
    total = shutil.disk_usage("/dev/shm").total
    if total < LITTLE_SHM:
        advice = "give the container more (docker --shm-size=2g; an emptyDir with medium: Memory), or Ray falls to disk"
        return Check("/dev/shm", "warn", f"{total / 2**20:.0f} MiB", advice)
    return Check("/dev/shm", "ok", f"{total / GIB:.1f} GiB")


def check_open_files() -> Check:
    """Limit of open files, of which Ray takes many."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FEW_FILES
    return Check("open files", "warn" if few else "ok", str(soft), f"ulimit -n {FEW_FILES * 16}" if few else "")


def check_device(config: StudyConfig) -> Check:
    """GPUs of this machine against what the configuration insists on."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    if config.execution.device == "cuda" and not count:
        advice = "install a CUDA build of torch and a driver, or set execution.device=auto (the cluster may have one)"
        return Check("GPU", "warn" if "RAY_ADDRESS" in os.environ else "fail", "none, execution.device is cuda", advice)
    return Check("GPU", "ok", names or "none; everything runs on the CPU")


def check_weights(config: StudyConfig) -> Check:
    """Weights of the segmenter, where it has any."""
    from actors.sam_variants import VARIANTS
    from actors.sam_weights import resolve_weights

    chosen = config.segmenter
    if chosen.name not in VARIANTS:
        return Check("weights", "ok", f"{chosen.name} needs none")
    try:
        path = resolve_weights(chosen.name, getattr(chosen, "checkpoint", None))
    except FileNotFoundError as error:
        return Check("weights", "fail", f"none for {chosen.name}", str(error))
    return Check("weights", "ok", f"{path} ({path.stat().st_size / 2**20:.0f} MiB)")


def check_space(out: Path) -> Check:
    """Free space where the study goes."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    few = free < LITTLE_DISK
    advice = "compare with what samreg plan says, or execution.keep=prototypes" if few else ""
    return Check("space", "warn" if few else "ok", f"{free / GIB:.1f} GiB free in {there}", advice)


def check_writing(out: Path) -> Check:
    """Write, flush, lock and rename a file in the study folder, which every worker does all the time."""
    probe = out / f".doctor.{os.getpid()}"
    start = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.write(bytes(2**20))
            stream.flush()
            os.fsync(stream.fileno())
        probe.replace(probe.with_suffix(".moved"))
    except OSError as error:
        advice = "give a folder that can be written, on a file system with rename and flock (Lustre: mount -o flock)"
        return Check("writing", "fail", f"{out}: {error.strerror}", advice)
    finally:
        for path in (probe, probe.with_suffix(".moved")):
            with suppress(OSError):  # where it could not be made; what went wrong is told already
                path.unlink()
    seconds = time.perf_counter() - start
    slow = seconds > SLOW_WRITE_SECONDS
    advice = "slow storage: a bigger execution.tile writes fewer files" if slow else ""
    return Check("writing", "warn" if slow else "ok", f"1 MiB written, flushed, renamed in {seconds:.3f} s", advice)


def check_objects(out: Path) -> Check:
    """Write, list, read and delete an object where the study goes, and try to write one only if it is not there."""
    probe = out / f".doctor.{os.getpid()}"
    start = time.perf_counter()
    try:
        put_object(probe, bytes(2**20))
        seconds = time.perf_counter() - start
        try:
            whole = probe.name in names(out) and len(read_bytes(probe)) == 2**20
            guarded = _is_guarded(probe)
        finally:
            remove(probe)
    except ObjectStoreError as error:
        return Check("writing", "fail", str(error), "see the message; every worker needs the same rights")
    if not whole:
        return Check("writing", "fail", f"{probe} cannot be listed or read back whole", "look at the bucket's rights")
    found = f"1 MiB written in {seconds:.3f} s, listed, read, deleted"
    if not guarded:
        advice = "start one driver at a time: of two, the first is told only after some seconds"
        return Check("writing", "warn", f"{found}; the store ignores If-None-Match", advice)
    return Check("writing", "ok", found)


def _is_guarded(there: Path) -> bool:
    try:
        put_object(there, b"", new=True)
    except FileExistsError:
        return True
    return False


def check_uri(uri: str) -> Check:
    """Whether an object can be reached with the credentials of this machine."""
    name = f"URI {uri.split('://')[0]}"
    try:
        return Check(name, "ok", f"{uri}: {remote_size(uri)} bytes")
    except ImageError as error:
        return Check(name, "fail", str(error), "check the address, the credentials, and the fsspec package of its kind")


def check_cluster(address: str | None) -> Check:
    """The Ray cluster that RAY_ADDRESS or --address names, by its dashboard or as a driver."""
    if not address:
        return Check("Ray", "ok", "no RAY_ADDRESS: a run starts its own Ray on this machine")
    if not address.startswith(("http://", "https://")):
        return _check_driver(address)
    from pipeline.submit import connect

    try:
        connect(address)
    except UsageError as error:
        return Check("Ray", "fail", f"{address} cannot be used", str(error))
    return Check("Ray", "ok", f"{address} answers")


def _check_driver(address: str) -> Check:
    from actors.pool import cluster_resources, connect, disconnect

    os.environ["RAY_ADDRESS"] = address
    try:
        owned = connect(1)
    except ConnectionError as error:
        return Check("Ray", "fail", f"{address}: {error}", "start the cluster, or correct the address")
    have = {name: count for name, count in cluster_resources().items() if name in ("CPU", "GPU", "memory")}
    disconnect(None, stop=owned)
    shown = ", ".join(
        f"{count / GIB:.0f} GiB" if name == "memory" else f"{count:g} {name}" for name, count in have.items()
    )
    return Check(
        "Ray", "ok" if have.get("CPU") else "warn", f"{address}: {shown}", "" if have.get("CPU") else "no CPUs yet"
    )


def _cgroup_cores() -> float | None:
    """Cores of the cgroup's quota, None where there is none."""
    path = _CGROUP / "cpu.max"
    quota, period = path.read_text(encoding="utf-8").split() if path.exists() else ("max", "1")
    return None if quota == "max" else int(quota) / int(period)


def _number(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def _cgroup_memory() -> int:
    """Bytes that the cgroup holds, without cached files, which give way."""
    stat = _CGROUP / "memory.stat"
    counts = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines()) if stat.exists() else {}
    return (_number(_CGROUP / "memory.current") or 0) - int(counts.get("inactive_file", 0))


def _free_memory() -> int:
    """Bytes that can be taken without swapping; on macOS all there are."""
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
