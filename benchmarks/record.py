"""What all benchmarks share: clocks, peak memory, and rows of results that say what they were measured on."""

import csv
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ralu_kernels
from ralu_kernels._backend import triton

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SWITCHES = ("fused", "compile", "attention", "diffusers_cache")  # of e2e.py's rows, empty where one is off
_Work = TypeVar("_Work")
CASE = ("op", "provider", "model", "method", *SWITCHES, "pixels", "batch", "dtype", "threads")  # what tells a subject


def pick_device(name: str) -> torch.device:
    """Return a device and make it the current one; "auto" is a GPU where there is one."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events are the current device's
    return device


def device_name(device: torch.device) -> str:
    """Name a device as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """Make a file's name of the device's, a CPU's with its instruction set."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device_name(device)} {instructions(device)}".lower()).strip("-")


def instructions(device: torch.device) -> str:
    """Name a CPU's instruction set; a GPU has none."""
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""


def provenance(device: torch.device) -> dict:
    """Say where and of what a row is measured: the commit is that of the `ralu_kernels` which is imported."""

    def git(*arguments):
        command = ["git", "-C", Path(ralu_kernels.__file__).parent, *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # no git here
            return ""

    # The rows that the last benchmark has added change nothing of what the next one measures.
    changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results")
    return {
        "device": device_name(device), "device_type": device.type, "isa": instructions(device),
        "torch": torch.__version__, "triton": triton.__version__ if triton else "", "cuda": torch.version.cuda or "",
        "commit": (git("describe", "--always") or "unknown") + ("-dirty" if changed else ""),
        "date": date.today().isoformat(),
    }  # fmt: skip


def on_gpu(row: dict) -> bool:
    """Tell whether a row was measured on a GPU. Rows from before this was recorded: a GPU has no instruction set."""
    return row.get("device_type", "" if row["isa"] else "cuda") not in ("", "cpu")


def read(path: Path) -> list[dict]:
    """Read a file's rows."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def case(row: dict) -> tuple:
    """Return what a row measured: two with the same are of the same thing."""
    return *(row.get(name, "") for name in CASE), "time" if row["p50_ms"] else "memory"


def label(row: dict) -> str:
    """Name the method of one of e2e.py's rows with its switches: "flux-5x, fused, attention sdpa"."""
    switches = [key.replace("_", " ") + ("" if row[key] == "yes" else f" {row[key]}") for key in SWITCHES if row[key]]
    return ", ".join([row["method"], *switches])


def append(path: Path, rows: list[dict]):
    """Add rows to a file, whose older rows may have other columns."""
    rows = (read(path) if path.exists() else []) + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), restval="")
        writer.writeheader()
        writer.writerows(rows)


def clock(device: torch.device) -> Callable[[Callable], float]:
    """Make a function that calls a function and returns milliseconds.

    On a GPU they pass between two events in the stream. Before the first, a gigabyte is read: that leaves the L2 cache
    without the inputs, and without anything that would have to be written back while the clock runs, and takes longer
    than the host takes to launch, so that the GPU never waits for the host.
    """

    def on_cpu(call):
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def on_gpu(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(evict, dim=0, out=read)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    if device.type != "cuda":
        return on_cpu
    evict, read = torch.zeros(2**28, device=device), torch.empty((), device=device)
    return on_gpu


def in_turn(calls: dict[str, Callable], device: torch.device, budget: float, repeats: int = 200) -> dict[str, list]:
    """Measure milliseconds of calls, made in turn so that all see the same machine, after an untimed round.

    One that has had `budget` seconds, and at least three calls, sits out the rest of the `repeats` rounds.
    """
    timed = clock(device)
    times: dict[str, list] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            if len(times[name]) < 3 or sum(times[name]) < 1e3 * budget:
                times[name].append(timed(call))
    return times


def in_time(work: Mapping[str, _Work], minutes: float | None) -> Iterator[_Work]:
    """Yield work in its order until so many minutes have passed since the first; then print the names of the rest."""
    start = time.monotonic()
    for i, one in enumerate(work.values()):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            print(
                f"after {minutes:g} minutes {len(work) - i} of {len(work)} are left out:", *list(work)[i:], sep="\n  "
            )
            return
        yield one


def peak_memory(call: Callable, device: torch.device):
    """Return a call's result, and the bytes before it and at its peak.

    On a GPU they are what PyTorch holds, on a CPU what the process does, which is known on Linux alone, elsewhere NaN.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return call(), before, torch.cuda.max_memory_allocated(device)
    restart, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not restart.exists():
        return call(), float("nan"), float("nan")

    def resident(key):
        return int(re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.M)[1]) * 1024

    restart.write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    return call(), before, resident("VmHWM")


def transformer_tflop(transformer: torch.nn.Module, run: Callable[[], object]) -> float:
    """Count the work of a transformer's calls during a run, from the operators that ran.

    Attention is done in its plain form, which the counter knows on every device.
    """
    counter, total = FlopCounterMode(display=False), 0

    def before(*_):
        counter.__enter__()

    def after(*_):
        nonlocal total
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
    with sdpa_kernel(SDPBackend.MATH):
        run()
    for hook in hooks:
        hook.remove()
    return total / 1e12
