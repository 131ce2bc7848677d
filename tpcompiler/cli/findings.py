"""Finds out for `tpc doctor` what this machine has, and what of tpcompiler works on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

FIRST, LAST = (2, 11), (2, 14)  # versions of torch that the package runs on


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    state: Literal["ok", "limited", "missing"]
    means: str


def findings() -> list[Finding]:
    """All findings, in the order in which a reader needs them. Nothing on the machine is started or changed."""
    return [_python(), _torch(), *_devices(), *_communication(), *_compilers(), *_packages()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    means = "all commands" if good else "tpcompiler needs Python 3.11 or later"
    return Finding("Python", platform.python_version(), "ok" if good else "missing", means)


def _torch() -> Finding:
    numbers = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if numbers < FIRST:
        return Finding("torch", torch.__version__, "missing", f"needs torch {FIRST[0]}.{FIRST[1]} or later")
    if numbers > LAST:
        return Finding("torch", torch.__version__, "limited", f"not tested: the latest tested is {LAST[0]}.{LAST[1]}")
    return Finding("torch", torch.__version__, "ok", "capture, shard, verify, parallelize")


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("GPUs", "none", "limited", "training runs on CPUs over gloo; shard, verify and plan need no GPU")
        return
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        half = p.major >= 8
        means = "bf16 training" if half else "before Ampere: precision fp16 or fp32, not bf16"
        size = f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
        yield Finding(f"GPU {i}", size, "ok" if half else "limited", means)
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        near = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        state: Literal["ok", "limited"] = "ok" if near == len(pairs) else "limited"
        means = (
            "direct links between all" if state == "ok" else "some pairs communicate over the host: slow collectives"
        )
        yield Finding("links", f"{near} of {len(pairs)} pairs", state, means)


def _communication() -> Iterator[Finding]:
    gloo = dist.is_available() and dist.is_gloo_available()
    yield Finding("gloo", "yes" if gloo else "no", "ok" if gloo else "limited", "ranks on CPUs; verify --distributed")
    if torch.cuda.is_available():
        there = dist.is_available() and dist.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if there else "no"
        yield Finding("NCCL", version, "ok" if there else "limited", "ranks on several GPUs")


def _compilers() -> Iterator[Finding]:
    if torch.cuda.is_available():
        triton = _version("triton")
        means = "torch.compile on GPUs" if triton else "torch.compile on GPUs needs it: write train: {compile: none}"
        yield Finding("triton", triton or "no", "ok" if triton else "limited", means)
    else:
        cxx = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
        means = "torch.compile on CPUs" if cxx else "torch.compile on CPUs needs one: write train: {compile: none}"
        yield Finding("C++ compiler", cxx or "no", "ok" if cxx else "limited", means)


def _packages() -> Iterator[Finding]:
    for name, with_it, extra in (
        ("transformers", "`hf:` models", "hf"),
        ("tokenizers", "tokenizer.json for training data", "hf"),
        ("tensorboard", "curves of a run", "train"),
        ("matplotlib", "`tpc plot`", "train"),
    ):
        version = _version(name)
        means = with_it if version else f"{with_it}: needs it; pip install 'tpcompiler[{extra}]'"
        yield Finding(name, version or "no", "ok" if version else "limited", means)


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "yes"
