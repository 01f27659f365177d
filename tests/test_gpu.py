"""The scripts for a GPU, in small shapes and without one on the CPU: so that they do not rot until there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks/gpu" / script, *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=pytest.mark.native), pytest.param("triton", marks=pytest.mark.triton)]
)
def test_first_light(backend, device):
    *checks, verdict = run("smoke.py", "--device", device)
    assert verdict.startswith("SMOKE passed") and f"'{backend}'" in verdict
    assert [line for line in checks if backend in line] and all(line.startswith("ok") for line in checks)


@pytest.mark.native
def test_probe(device):
    *rows, _ = run("probe.py", "roof", "kernels", "host", "--device", device, "--tiny")
    for part in ("roof copy", "kernels upsample_selected", "kernels plan_tokens", "host upsample_remaining native"):
        assert any(row.startswith(part) for row in rows), part
