"""gencli doctor."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, Json, Overrides

__all__ = ["app"]

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

PACKAGES = ("numpy", "pillow", "safetensors", "pydantic", "pyyaml", "typer", "rich", "scikit-learn", "matplotlib")
GB = 1e9

Row = dict[str, Any]  # check, value, state ("ok" | "advice" | "broken"), advice


@app.callback()
def doctor(context: typer.Context, data_root: DataRoot = None, json: Json = False) -> None:
    """gencli doctor

    Look at this machine as gencli sees it: versions, processors, memory, accelerators, disk, data, terminal. What
    could be better is said on stderr; the exit code is 1 if something is broken.
    """
    from gencli import console

    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {"data_root": data_root, "json": json}}
        return
    rows: list[Row] = []
    checks: list[Callable[[], Iterator[Row]]] = [
        _python,
        _packages,
        _torch,
        _machine,
        _disk,
        lambda: _data(data_root),
        _terminal,
    ]
    for check in checks:
        try:
            rows += check()
        except Exception as error:  # a doctor who faints is of no use
            rows.append(_row(check.__name__.strip("_"), None, broken=f"{type(error).__name__}: {error}"))
    console.table(
        rows if json or not sys.stdout.isatty() else [{k: r[k] for k in ("check", "value")} for r in rows], json=json
    )
    for row in rows:
        if row["advice"]:
            console.say(f"{row['state']}: {row['check']}: {row['advice']}")
    if any(row["state"] == "broken" for row in rows):
        raise typer.Exit(1)


@app.command(short_help="Project a training to many processes.")
def scale(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="pixelcnn, pixelcnn/paper, or a .yaml file.")],
    devices: Annotated[int, typer.Option(min=1, max=2**20, metavar="N", help="As many processes as this.")],
    bandwidth: Annotated[
        str, typer.Option(help="Of each process's link: 400Gb/s or 500Mb/s (bits), 50GB/s or 60MB/s (bytes).")
    ],
    overrides: Overrides = None,
    latency: Annotated[str, typer.Option(help="Of a message between two processes: s, ms, us or ns.")] = "10us",
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli doctor scale pixelcnn --devices 512 --bandwidth 400Gb/s

    Project how a recipe would train on 1, 2, 4, ... N processes: a projection, not a measurement. A step of one
    process is measured here at up to three sizes of its share of the batch, and what it would send is counted. Every
    process is taken to have a device like this one, and to send after the backward pass (no overlap) at the speed
    that --bandwidth and --latency say. Strong scaling shares the recipe's batch out; with weak scaling each process
    keeps it. state_mb: weights, gradients, optimiser and averages of one process, without activations.
    """
    from gencli import console
    from gencli.recipe import load
    from gencli.training import scaling
    from gencli.training.session import Session
    from gencli.training.settings import settings

    link = scaling.Link(scaling.bandwidth(bandwidth), scaling.latency(latency))
    resolved = load(recipe, overrides or [], {"data.root": str(data_root)} if data_root else {}, model=True)
    worlds = [*(2**k for k in range((devices - 1).bit_length())), devices]
    batch = resolved.train.batch_size
    with settings(resolved) as device:
        trainer = Session(resolved, device).trainer
        found = scaling.calibrate(trainer, worlds)
        held, where = scaling.memory(trainer), _device(device)
    state = {"state_mb": sum(held.values()) / 1e6}
    sizes = ", ".join(str(share.rows) for share in found.shares)
    basis = (
        f"projection, not a measurement: computing from measured steps of {sizes} rows on {where}, "
        f"communication from bytes counted and from {bandwidth} and {latency} as given"
    )
    console.say(basis)
    for share in found.shares:
        fitted = found.compute.seconds(share.rows) * 1e3
        console.say(f"measured {share.rows} rows: {share.seconds * 1e3:.2f} ms a step; the projection's: {fitted:.2f}")
    sent, messages = sum(m.times * m.size for m in found.messages), sum(m.times for m in found.messages)
    console.say(f"all-reduced: {sent / 1e6:.3f} MB in {messages:g} messages a step")
    console.say("; ".join(f"{name} {size / 1e6:.2f} MB" for name, size in held.items()) + " on each process")
    if found.strong[-1] < devices:
        console.say(
            f"strong scaling ends at {found.strong[-1]}: train.batch_size={batch} divides among no more of these"
        )
    plain = sys.stdout.isatty() and not json
    for weak, counts in ((False, found.strong), (True, worlds)):
        rows = scaling.project(found.compute, found.messages, link, batch=batch, worlds=counts, weak=weak)
        title = f"{'weak' if weak else 'strong'} scaling ({basis})"
        if plain:
            rows = [{k: v for k, v in row.items() if k != "scaling"} | state for row in rows]
        else:
            more = {"bytes": sent, "messages": messages} | state | {"basis": basis}
            rows = [row | more for row in rows]
        console.table(rows, json=json, title=title)


def _device(device: Any) -> str:
    """What computes on ``device``, in words."""
    import torch

    from gencli.run import environment

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device} ({environment()['machine']['cpu']}, {threads} thread{'s' * (threads > 1)})"


def _row(check: str, value: Any, advice: str = "", broken: str = "") -> Row:
    state = "broken" if broken else "advice" if advice else "ok"
    return {"check": check, "value": value, "state": state, "advice": broken or advice}


def _python() -> Iterator[Row]:
    from gencli import __version__

    yield _row("gencli", f"{__version__} in {Path(__file__).parents[1]}")
    version = ".".join(map(str, sys.version_info[:3]))
    yield _row("python", version, broken="" if sys.version_info >= (3, 11) else "gencli needs Python 3.11 or newer")


def _packages() -> Iterator[Row]:
    from importlib import metadata

    for name in PACKAGES:
        try:
            yield _row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield _row(name, None, broken=f"not installed: pip install {name}")


def _torch() -> Iterator[Row]:
    try:
        import torch
    except Exception as error:
        yield _row(
            "torch", None, broken=f"cannot be imported ({error}): see pytorch.org for the build for this machine"
        )
        return
    yield _row("torch", torch.__version__)
    try:
        import torchvision

        yield _row("torchvision", torchvision.__version__)
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        yield _row("torchvision", None, advice=f"cannot be imported ({what}): standard data sets cannot be downloaded")
    cores = _cores()
    threads = torch.get_num_threads()
    more = f"more threads than the {cores} cores: OMP_NUM_THREADS={cores} is faster" if threads > cores else ""
    yield _row("threads", threads, advice=more)
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            found.append((f"cuda:{i}", f"{facts.name}, {facts.total_memory / GB:.1f} GB"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    for device, name in found:
        try:
            torch.ones(2, 2, device=device).matmul(torch.ones(2, 2, device=device)).cpu()
            yield _row(device, name)
        except RuntimeError as error:
            yield _row(device, name, broken=f"cannot compute: {str(error).splitlines()[0]}")
    if not found:
        yield _row("accelerator", "none", advice="recipes named default are made for this: gencli recipes ls")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> Iterator[Row]:
    from gencli.run import environment

    machine = environment()["machine"]
    yield _row("system", machine["system"])
    yield _row("cpu", f"{machine['cpu']}, {machine['cores']} cores")
    free = _available_memory()
    total = f"{machine['memory_gb']} GB" if machine["memory_gb"] else "unknown"
    low = "little is free: close something, or lower --batch-size" if free is not None and free < 2 * GB else ""
    yield _row("memory", total if free is None else f"{total}, {free / GB:.1f} GB free", advice=low)


def _available_memory() -> float | None:
    """Bytes that can be had, of the machine and of this process's control group; None where neither says."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(float(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(found, default=None)


def _disk() -> Iterator[Row]:
    runs = Path("runs")
    place = runs if runs.exists() else Path()
    free = shutil.disk_usage(place).free
    yield _row("disk", f"{free / GB:.1f} GB free", advice="checkpoints need room" if free < 2 * GB else "")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        yield _row(
            "runs", str(place.resolve()), broken=f"cannot be written ({error.strerror}): go to a folder of yours"
        )
    else:
        yield _row("runs", str(place.resolve()))


def _data(root: Path | None) -> Iterator[Row]:
    if root is None:
        advice = "GENCLI_DATA or --data-root names the folder of standard data sets; the embedded ones need none"
        yield _row("data root", None, advice=advice)
        return
    try:
        names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    except OSError as error:
        yield _row("data root", str(root), broken=f"cannot be read ({error.strerror})")
        return
    yield _row("data root", f"{root}: {', '.join(names) or 'empty'}")


def _terminal() -> Iterator[Row]:
    streams = [name for name in ("stdin", "stdout", "stderr") if (s := getattr(sys, name)) is not None and s.isatty()]
    settings = [f"{v}={os.environ[v]}" for v in ("TERM", "COLORTERM", "NO_COLOR", "GENCLI_QUIET") if v in os.environ]
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    value = "; ".join([f"{', '.join(streams) or 'no stream'} on a terminal", *settings, encoding])
    known = encoding.lower().replace("-", "") in ("utf8", "utf8sig")
    yield _row("terminal", value, advice="" if known else "PYTHONUTF8=1 lets names and pictures be shown as they are")
