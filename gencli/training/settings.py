"""The device, the threads and torch's global switches that a recipe asks for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from gencli.console import UsageError, nearest
from gencli.recipe import Recipe

__all__ = ["choose_device", "settings"]


def choose_device(name: str) -> torch.device:
    """The device of a recipe: "auto" takes CUDA, then Apple's GPU, then the CPU."""
    known = ("auto", "cpu", "cuda", "mps")
    if name.partition(":")[0] not in known:
        raise UsageError(
            f"no device {name!r}{nearest(name, known)}: there are {', '.join(known)}", hint="gencli doctor"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="gencli doctor"
        ) from None
    return torch.device(name)


@cache
def _keep_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    Else it hands megabytes back to the system at the end of a step and gets them again page by page: word2vec of 300
    dimensions then takes 1.9 times as long, where arrays are few and large; a network's step changes little.
    """
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: what is larger still goes back at once
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


@contextmanager
def settings(recipe: Recipe) -> Iterator[torch.device]:
    """Torch's global switches as the recipe asks for, and as they were afterwards."""
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    cudnn = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    device = choose_device(recipe.device)
    _keep_memory()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.train.precision == "float64":
        torch.set_default_dtype(torch.float64)
    fast = recipe.train.precision in ("tf32", "bf16")
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cudnn.benchmark = not recipe.train.deterministic
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield device
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])
        torch.set_float32_matmul_precision(before[2])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(False)
