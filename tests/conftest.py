"""What all tests share: backends, fixed seeds, poisoned memory and one rule for tolerances.

Triton reads TRITON_INTERPRET once, so the suite is two processes: ``pytest``, and with it set, ``pytest -m triton``.
"""

import os
from pathlib import Path

import pytest
import torch

from ralu_kernels._backend import INTERPRET, _why_no_native, tl, triton


def pytest_collection_modifyitems(items):
    cuda = torch.cuda.is_available()
    reasons = {}
    if triton is None:
        reasons["triton"] = "triton is not installed"
    elif not (INTERPRET or cuda):
        reasons["triton"] = "without a GPU Triton kernels run under TRITON_INTERPRET=1 only, in a process of their own"
    if not cuda:
        reasons["gpu"] = "no GPU"
    if absent := _why_no_native(torch.device("cuda" if cuda and not INTERPRET else "cpu")):
        reasons["native"] = absent
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):  # keywords have the names of folders too
                item.add_marker(pytest.mark.skip(reason=reason))


# On a CPU with tiles PyTorch attends in bfloat16 by oneDNN's, and raises "pack_vnni2 is only supported when avx512 is
# supported" where it is told to do without AVX-512 itself. So oneDNN does without tiles then.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# The embedded models are unpacked once a checkout, for all processes and later runs.
os.environ.setdefault("RALU_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "ralu"))

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do processes that they start
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

if INTERPRET:
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def rounding_convert_float(data, source, target, rounding_mode):
        """Triton's interpreter truncates float32 to bfloat16, where GPUs round to the nearest even."""
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return convert_float(data, source, target, rounding_mode)

    interpreter._convert_float = rounding_convert_float


@pytest.fixture(
    params=[
        "reference",
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("triton", marks=pytest.mark.triton),
    ]
)
def backend(request):
    return request.param


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def block_backend(request):
    """Of the operations inside the blocks, which are not in the compiled extension."""
    return request.param


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch._dynamo.reset()  # one test's compiled graphs count towards the next one's limit


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In this mode PyTorch fills what torch.empty and its kin return with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module", params=["flux", "sd3"])
def family(request):
    """Take the families of models in turn: what holds for all of them is tested once, with this fixture."""
    import tiny  # only here: kernels are tested without diffusers

    return tiny.FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family):
    """Make the family's pipeline as diffusers has it, once for a whole module: a test leaves it disabled."""
    return family.make()


@pytest.fixture
def pipe(stock, family):
    """Enable the same pipeline, in two steps a stage."""
    import ralu

    yield ralu.enable(stock, family.short)
    ralu.disable(stock)


def far_apart(x, path):
    """Put 2^30 elements between the samples of x (B, ...): from the third on offsets need 64 bits.

    On a CPU in a sparse file, which takes no memory; on a GPU where there is as much.
    """
    size = len(x) * 2**30
    if x.device.type == "cpu":
        memory = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    elif torch.cuda.mem_get_info(x.device)[0] > size * x.itemsize:
        memory = torch.empty(size, dtype=x.dtype, device=x.device)
    else:
        pytest.skip(f"offsets of 64 bits take {size * x.itemsize / 2**30:.0f} GiB, more than this GPU has free")
    return memory.as_strided(x.shape, (2**30, *x.stride()[1:])).copy_(x)


def assert_as_exact_as(actual, eager, oracle, atol=1e-6):
    """``actual`` is at most twice as far from a float32 or float64 ``oracle`` as ``eager`` of the same dtype is."""
    assert actual.dtype == eager.dtype and actual.shape == eager.shape == oracle.shape
    assert actual.isfinite().all()
    if actual.numel():
        error, allowed = ((x.to(oracle) - oracle).abs().max().item() for x in (actual, eager))
        assert error <= 2 * allowed + atol, f"error {error:.3g}, eager {allowed:.3g}"
