"""The CUDA kernels without a GPU: compiled for every architecture, and run on the host through all backends' tests."""

import re
import shutil
import subprocess
from pathlib import Path

import cuda_on_host
import pytest
import test_tokens
import test_upsample
import torch
from cuda_on_host import CSRC, SOURCES

from ralu_kernels import _backend, _checks, plan_tokens, upsample_remaining, upsample_renoise, upsample_selected
from ralu_kernels._backend import triton

# ---- the compiler ----

# What setup.py builds for. Every one takes a while, so those between the oldest and the newest are for `make aot`.
OLDEST, *BETWEEN, NEWEST = "80", "86", "89", "90", "100", "120"
# As setup.py builds them.
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
BITS = {"f": 32, "6__half": 16, "13__nv_bfloat16": 16}


def compile_cuda(source, out, architecture, *flags):
    """Compile for GPUs alone, and list what ptxas says: [(mangled name, registers, bytes on the stack and spilled)]."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    includes = [f"-I{CSRC}", "-isystem", Path(torch.__file__).parent / "include"]
    command = [cuda_on_host.toolkit() / "bin/nvcc", "-fatbin", source, "-o", out, "-Xptxas=-v", target]
    done = subprocess.run([*command, *FLAGS, *includes, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_\d+a?'.*?(\d+) bytes stack frame,"
        r" (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        (kernel, int(registers), sum(map(int, memory)))
        for kernel, *memory, registers in re.findall(pattern, done.stderr, re.DOTALL)
    ]


@pytest.fixture(
    scope="module", params=[OLDEST, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in BETWEEN), NEWEST]
)
def compiled(request, tmp_path_factory):
    """All sources as one, for their headers are what takes the time."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "all.cu").write_text(cuda_on_host.including(SOURCES))
    report = compile_cuda(folder / "all.cu", folder / "all.fatbin", request.param)
    return request.param, folder / "all.fatbin", report


def test_kernels_do_not_spill(compiled):
    _, _, report = compiled
    kernels = {name for path in SOURCES for name in re.findall(r"(\w+_kernel)\(", path.with_suffix(".cuh").read_text())}
    assert kernels and all(any(kernel in name for name, *_ in report) for kernel in kernels)
    for name, registers, memory in report:
        assert memory == 0 and registers <= 64, (name, registers, memory)


def test_spills_are_seen(tmp_path):
    """A kernel that keeps 64 numbers in 24 registers."""
    (tmp_path / "narrow.cu").write_text(
        "__global__ void narrow(const float* x, float* out) { float v[64];"
        " for (int i = 0; i < 64; ++i) v[i] = x[i * blockDim.x];"
        " for (int i = 0; i < 64; ++i) for (int j = 0; j < 64; ++j) out[64 * i + j] = v[i] * v[j]; }"
    )
    out = tmp_path / "narrow.fatbin"
    ((_, registers, memory),) = compile_cuda(tmp_path / "narrow.cu", out, "90", "-maxrregcount=24")
    assert registers <= 24 and memory > 0


def test_every_value_is_stored_in_vectors(compiled):
    """Of 16 bytes where the row allows it: those are the instances with the most elements."""
    architecture, out, _ = compiled
    if triton is not None:
        disassembler = triton.knobs.nvidia.cuobjdump.path
    elif not (disassembler := shutil.which("cuobjdump", path=cuda_on_host.toolkit() / "bin")):
        pytest.skip("no disassembler: neither Triton, which brings cuobjdump, nor the CUDA toolkit has it here")
    command = [disassembler, "-sass", f"-arch=sm_{architecture}", out]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set()
    name = r"Function : _ZN4ralu4cuda\d+(\w+)_kernelI(f|6__half|13__nv_bfloat16)(?:Lb[01]E)?Li(\d+)E"
    for kernel, dtype, v, body in re.findall(name + r"(.*?)(?=Function :|\Z)", code, re.DOTALL):
        bits = int(v) * BITS[dtype] * (2 if kernel == "upsample" else 1)
        widths = {int(width or 32) for width in re.findall(r"STG\.E(?:\.U?(16|64|128))?\b", body)}
        assert widths == {min(bits, 128)}, (kernel, dtype, v)
        found.add((kernel, dtype, min(bits, 128)))
    transitions = "upsample_selected", "upsample_remaining"
    kernels = "upsample", *transitions, *(f"{name}_pixels" for name in transitions)
    assert {(kernel, dtype, 128) for kernel in kernels for dtype in BITS} <= found


# ---- the kernels themselves, on the host: as the backend "native", through the tests of all backends ----


@pytest.fixture
def backend(monkeypatch):
    cuda_on_host.library()
    monkeypatch.setitem(_backend._ABSENT, "native", lambda device: None)
    monkeypatch.setattr(_backend, "native", cuda_on_host.operations())
    return "native"


@pytest.fixture
def device():
    return "cpu"


test_plan = test_tokens.test_plan
test_plan_breaks_ties_by_place = test_tokens.test_plan_breaks_ties_by_place
test_plan_of_a_large_grid = test_tokens.test_plan_of_a_large_grid
test_threshold_is_not_rounded = test_tokens.test_threshold_is_not_rounded_to_the_scores_dtype
test_transitions_against_oracle = test_tokens.test_transitions_against_oracle
test_transitions_are_exact = test_tokens.test_transitions_are_exact
test_empty_transitions = test_tokens.test_empty_transitions
test_transitions_of_any_layout = test_tokens.test_noncontiguous
test_kept_noise = test_tokens.test_kept_noise
test_tokens_and_latents_share_their_noise = test_tokens.test_tokens_and_latents_share_their_noise
test_tokens_noise_depends_on_seed_and_place = test_tokens.test_noise_depends_on_seed_and_place_alone
test_latents_against_oracle = test_upsample.test_against_oracle
test_latents_in_half_precision = test_upsample.test_half_precision_is_exact_to_its_last_place
test_latents_of_any_layout = test_upsample.test_layouts
test_latents_transition_is_exact = test_upsample.test_transition_is_exact
test_latents_noise_depends_on_seed_and_place = test_upsample.test_noise_depends_on_seed_and_place_alone


def test_more_samples_than_one_side_of_a_grid(backend):
    x, seed = torch.randn(70_000, 1, 1, 1), torch.arange(70_000)
    settings = (0.9, 0.4, 0.02, seed)
    expected = upsample_renoise(x, *settings, backend="reference")
    torch.testing.assert_close(upsample_renoise(x, *settings, backend=backend), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", _checks.DTYPES, ids=str)
def test_unaligned_rows_are_not_read_as_vectors(backend, dtype):
    """Rows without gaps between their values, but of a size, or from a place, that no vector starts at."""
    settings = dict(scale=0.9, noise_scale=0.4, c=0.02, seed=1, backend=backend)
    plan = plan_tokens(torch.rand(2, 12), (3, 4), ratio=0.5)
    for cut in (slice(0, 8), slice(1, 9)):
        for x, operation in (
            (torch.randn(2, 4, 6, 9), lambda x: upsample_renoise(x, **settings)),
            (torch.randn(2, 12, 9), lambda low: upsample_selected(low, plan, **settings)),
            (torch.randn(60, 9), lambda packed: upsample_remaining(packed, plan, **settings)),
        ):
            x = x.to(dtype)[..., cut]
            assert torch.equal(operation(x), operation(x.contiguous()))


@pytest.mark.parametrize("row", [-1, 30, 2**31 - 1])
def test_kernels_stay_inside_their_tensors(backend, row):
    """Rows that a plan names and that are not there are not written, and read as NaN."""
    inverse = plan_tokens(torch.rand(1, 12), (3, 4), ratio=0.5).inverse
    selected = inverse.view(3, 2, 4, 2).transpose(1, 2).reshape(12, 4)
    broken = inverse.where(inverse != selected[selected[:, 0] != selected[:, 1]][0, 2], row)
    low, seed = torch.ones(1, 12, 8), torch.zeros(1, dtype=torch.int64)
    for pixel in (True, False):
        arguments = (broken, seed, 4, 1.0, 0.0, 0.0, 0.0, pixel)
        around, merged = torch.zeros(32, 8), torch.zeros(1, 48, 8)
        _backend.native.upsample_selected(low, around[1:31], *arguments)
        # At pixel granularity children follow the first of them, whatever the plan says of the others.
        assert around.sum() == (30 if pixel else 29) * 8 and not around[0].any() and not around[31].any()
        _backend.native.upsample_remaining(torch.ones(30, 8), merged, *arguments)
        assert merged.isnan().sum() == 8 and merged.nansum() == 47 * 8


@pytest.mark.parametrize("row", [-5, -1, 17, 29, 30, 2**31 - 2])
@pytest.mark.parametrize("token", [0, 5, 11])
def test_a_tile_of_broken_rows_stays_inside(backend, row, token):
    """Of a token whose first row is none, or another's, only what would be written elsewhere may be wrong."""
    inverse = plan_tokens(torch.rand(1, 12), (3, 4), ratio=0.5).inverse.clone()
    inverse.view(3, 2, 4, 2)[token // 4, 0, token % 4, 0] = row
    around, seed = torch.zeros(94, 8), torch.zeros(1, dtype=torch.int64)
    _backend.native.upsample_selected(torch.ones(1, 12, 8), around[32:62], inverse, seed, 4, 1.0, 0.0, 0.0, 0.0, True)
    assert not around[:32].any() and not around[62:].any() and set(around[32:62].unique().tolist()) <= {0.0, 1.0}


def test_a_plan_stays_inside_its_outputs(backend):
    outputs = [torch.full(size, -7, dtype=torch.int32) for size in ((2,), (12,), (12,), (1, 48))]
    rows = [outputs[1][:11], outputs[2][:11]]
    positions = torch.zeros(12, 2)
    _backend.native.plan_tokens(torch.zeros(1, 12), outputs[0], *rows, outputs[3], positions[:11], 4, 0, None)
    assert outputs[1].tolist() == [*range(11), -7] and outputs[2][11] == -7 and not positions[11].any()
