"""Which CUDA toolkit an installation builds with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def installer():
    """Define what setup.py does, without doing it."""
    names: dict = {}
    exec(SETUP.read_text().rpartition("\nsetuptools.setup(")[0], names)
    return SimpleNamespace(**names)


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Put an nvcc on the PATH that is a script, which starts the one of a toolkit elsewhere."""
    home, scripts = tmp_path / "cuda", tmp_path / "scripts"
    for path in (home / "bin/nvcc", scripts / "nvcc"):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'release 13.0'\necho '#$ TOP={home}/bin/..' >&2\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(scripts), prepend=":")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    return home


def test_the_toolkit_is_that_of_the_compiler_and_not_of_the_script(installer, toolkit):
    assert installer.find_toolkit() == str(toolkit.resolve())


def test_a_toolkit_without_a_runtime_is_no_toolkit(installer, toolkit):
    assert "has no lib64/libcudart.so to link with" in installer.why_no_cuda()
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64/libcudart.so").touch()
    assert installer.why_no_cuda() is None


def test_a_toolkit_can_be_named(installer, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert installer.find_toolkit() == "/nowhere"
    assert installer.why_no_cuda() == "no CUDA toolkit is found (CUDA_HOME, or nvcc on the PATH)"
