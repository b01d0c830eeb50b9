"""The baselines by name: what each needs here, in which version, and how to get it."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.errors import UsageError
from storage.image_files import content_digest

if TYPE_CHECKING:  # loads SimpleITK, which naming the methods does not need
    from pipeline.baseline_images import PairImages, Registered

VERSION = "1"  # of what this program itself does; a change makes every baseline again
Register: TypeAlias = "Callable[[PairImages], Registered]"


@dataclass(frozen=True)
class Method:
    """One baseline.

    Attributes:
        function: `module:name` of what registers a pair, loaded when it is used.
        package: distribution that it comes with.
        commands: programs on PATH.
        get: what to do where it is missing.
    """

    function: str
    package: str = "SimpleITK"
    commands: tuple[str, ...] = ()
    get: str = ""

    def installed(self) -> str | None:
        """Version of its package, None without one."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.installed() is None:
            return f"the package {self.package} is not installed: {self.get}"
        lost = [command for command in self.commands if shutil.which(command) is None]
        return f"{', '.join(lost)} not found on PATH: {self.get}" if lost else ""


_ITK, _TOOLS = "pipeline.baseline_itk", "pipeline.baseline_tools"
NETWORK = "torchscript"
METHODS = {
    **{name: Method(f"{_ITK}:{name}") for name in ("identity", "centre", "moments", "affine", "bspline", "demons")},
    "ants-syn": Method(f"{_TOOLS}:ants_syn", "antspyx", get="pip install 'samreg[baselines]'"),
    "elastix": Method(f"{_TOOLS}:elastix", "itk-elastix", get="pip install 'samreg[baselines]'"),
    "niftyreg": Method(
        f"{_TOOLS}:niftyreg",
        commands=("reg_aladin", "reg_f3d", "reg_transform"),
        get="build NiftyReg from its sources and add its bin folder to PATH",
    ),
    NETWORK: Method("pipeline.baseline_network:register", "torch"),
}


@dataclass(frozen=True)
class Baseline:
    """A method that is to run.

    Attributes:
        name: of `METHODS`.
        network: absolute path of the TorchScript file of `torchscript`.
        network_digest: sha256 of its bytes.
    """

    name: str
    network: str | None = None
    network_digest: str | None = None

    def signature(self) -> dict[str, str]:
        """What its results depend on beside the images. The version of commands is not known."""
        method = METHODS[self.name]
        weights = {} if self.network_digest is None else {"network": self.network_digest}
        return {"method": self.name, "version": VERSION, method.package: method.installed() or "", **weights}

    def load(self) -> Register:
        """The function that registers a pair.

        Raises:
            UsageError: when the network is not here, or no longer the one that was chosen.
        """
        module, name = METHODS[self.name].function.split(":")
        function = getattr(importlib.import_module(module), name)
        if self.network is None:
            found: Register = function
            return found
        from pipeline.baseline_network import open_network

        network = open_network(self.network)
        if content_digest(self.network) != self.network_digest:
            raise UsageError(f"{self.network} has changed since the call began; run the same command again")
        return partial(function, network)


def choose(names: Sequence[str], network: str | Path | None = None) -> tuple[Baseline, ...]:
    """The baselines of these names, each once; `all` is every one that can run here.

    Raises:
        UsageError: for an unknown name, one that cannot run here, or a network without its method or the reverse.
    """
    asked = list(dict.fromkeys(names))
    unknown = [name for name in asked if name not in (*METHODS, "all")]
    if unknown or not asked:
        raise UsageError(f"no baseline {', '.join(unknown) or 'given'}; --method takes all, {', '.join(METHODS)}")
    if "all" in asked:
        here = [name for name, method in METHODS.items() if not method.missing() and name != NETWORK]
        asked = list(dict.fromkeys([*here, *(name for name in asked if name != "all")]))
    if (NETWORK in asked) != (network is not None):
        raise UsageError("the method torchscript and its file go together: --method torchscript --network FILE")
    for name in asked:
        if reason := METHODS[name].missing():
            raise UsageError(f"baseline {name} cannot run here: {reason}")
    if network is None:
        return tuple(map(Baseline, asked))
    from pipeline.baseline_network import open_network

    open_network(network)
    file = str(Path(network).absolute()), content_digest(network)
    return tuple(Baseline(name, *(file if name == NETWORK else ())) for name in asked)
