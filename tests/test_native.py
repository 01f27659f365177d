"""What is the compiled extension's own: that it was built, its arithmetic on every instruction set, threads, errors."""

import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ralu
import ralu_kernels
from ralu_kernels import plan_tokens, reference, upsample_remaining, upsample_renoise, upsample_selected

ROOT = Path(__file__).parents[1]
native = pytest.mark.native
compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.mark.skipif(os.environ.get("RALU_NATIVE") == "0", reason="RALU_NATIVE=0 asks for pure Python")
@compiler
def test_a_checkout_with_a_compiler_has_the_extension():
    """All tests marked native are skipped without it, so its absence has to show somewhere."""
    assert upsample_renoise(torch.zeros(1, 1, 1, 1), 1.0, 1.0, 0.1, 0, backend="native").shape == (1, 1, 2, 2)


# ---- the loops, compiled alone, one instruction set at a time ----

HARNESS = """
#include "cpu/upsample.h"
#include "cpu/tokens.h"
using namespace ralu::cpu;

extern "C" int best() { return static_cast<int>(best_isa()); }

extern "C" void upsample(int isa, const float* x, float* out, uint64_t key, int64_t width, int64_t size) {
  vectorized([&](Isa chosen) RALU_BODY {
    for (int64_t first = 0; first < size; first += RUN)
      upsample_run(chosen, x, out, key, {size / width, width, 0, width, 1}, {0.9f, 0.4f, 0.02f, 2}, first,
                   std::min<int64_t>(RUN, size - first));
  }, static_cast<Isa>(isa));
}

extern "C" void to_bfloat16(int isa, const float* x, uint16_t* out, int64_t n) {
  vectorized([&](Isa) RALU_BODY { for (int64_t i = 0; i < n; ++i) out[i] = from_float<BFloat16>(x[i]).bits; },
             static_cast<Isa>(isa));
}

extern "C" void to_half(int isa, const float* x, uint16_t* out, int64_t n) {
  vectorized([&](Isa) RALU_BODY { for (int64_t i = 0; i < n; ++i) out[i] = from_float<Half>(x[i]).bits; },
             static_cast<Isa>(isa));
}

extern "C" void from_half(int isa, const uint16_t* x, float* out, int64_t n) {
  vectorized([&](Isa) RALU_BODY { for (int64_t i = 0; i < n; ++i) out[i] = to_float(Half{x[i]}); },
             static_cast<Isa>(isa));
}

extern "C" void from_bfloat16(int isa, const uint16_t* x, float* out, int64_t n) {
  vectorized([&](Isa) RALU_BODY { for (int64_t i = 0; i < n; ++i) out[i] = to_float(BFloat16{x[i]}); },
             static_cast<Isa>(isa));
}
"""


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    (folder / "loops.cpp").write_text(HARNESS)
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-shared", "-fPIC"]
    command = ["c++", *flags, f"-I{ROOT / 'csrc'}", "loops.cpp", "-o", "loops.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "loops.so"))


def call(function, isa, source, target, *rest):
    function(isa, ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()), *map(ctypes.c_int64, rest))
    return target


@compiler
def test_every_instruction_set_gives_the_same_noise(loops):
    x, key, best = torch.randn(11, 35), 2**62 + 12345, loops.best()
    outputs = [call(loops.upsample, isa, x, torch.empty(22, 70), key, 35, x.numel()) for isa in range(best + 1)]
    c = 2 * 0.02 - 4 * 0.02**2
    expected = reference.upsample_renoise(x[None, None], 0.9, 0.4, c, torch.tensor([key]), 2)[0, 0]
    for actual in outputs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@compiler
def test_half_precision_conversions_equal_pytorch(loops):
    """Every float16 and bfloat16 number, and float32 numbers on both sides of every rounding boundary."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    edges = torch.arange(0, 2**32, 2**12 - 1, dtype=torch.int64)
    floats = torch.cat([edges, edges // 2**13 * 2**13 + 2**12, edges // 2**16 * 2**16 + 2**15])
    floats = floats.where(floats < 2**31, floats - 2**32).int().view(torch.float32).contiguous()
    for isa in range(loops.best() + 1):
        for dtype, to, back in (
            (torch.float16, loops.to_half, loops.from_half),
            (torch.bfloat16, loops.to_bfloat16, loops.from_bfloat16),
        ):
            wide = call(back, isa, every, torch.empty(2**16), 2**16)
            narrow = call(to, isa, floats, torch.empty(len(floats), dtype=torch.uint16), len(floats)).view(dtype)
            for actual, expected in ((wide, every.view(dtype).float()), (narrow, floats.to(dtype))):
                assert torch.equal(actual.isnan(), expected.isnan())
                np.testing.assert_array_equal(actual.nan_to_num(7.0).float(), expected.nan_to_num(7.0).float())


# ---- threads ----


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    x = torch.randn(3, 16, 33, 47)
    scores, low = torch.rand(3, 400), torch.randn(3, 400, 64)

    def run():
        plan = plan_tokens(scores, (20, 20), ratio=0.2, backend="native")
        packed = upsample_selected(low, plan, 0.9, 0.4, 0.02, 1, backend="native")
        merged = upsample_remaining(packed, plan, 0.9, 0.4, 0.02, 1, backend="native")
        return upsample_renoise(x, 0.9, 0.4, 0.02, 5, backend="native"), plan.inverse, packed, merged

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux alone lists a process's threads, in /proc")
def test_a_dataloader_worker_starts_no_threads():
    """Its share is one core: PyTorch says so, and the extension asks PyTorch."""
    code = """
import os, torch, ralu_kernels

class Noised(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        before = len(os.listdir("/proc/self/task"))
        x = ralu_kernels.upsample_renoise(torch.zeros(1, 16, 256, 256), 1.0, 1.0, 0.1, i, backend="native")
        return len(os.listdir("/proc/self/task")) - before, x.std()

torch.set_num_threads(4)
started = [int(count) for count, _ in torch.utils.data.DataLoader(Noised(), num_workers=2, batch_size=None)]
ralu_kernels.upsample_renoise(torch.zeros(1, 16, 256, 256), 1.0, 1.0, 0.1, 0, backend="native")
here = len(os.listdir("/proc/self/task"))
assert started == [0, 0], started
assert here >= 4, here  # outside a worker the same call does use them
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- errors ----


@native
def test_what_the_compiled_op_itself_refuses():
    """The public functions check before; these are the last lines against reading memory as something else."""
    ops, seed = torch.ops.ralu_kernels_C, torch.zeros(1, dtype=torch.int64)
    tensors = torch.zeros(1, 12, 8), torch.zeros(12, 8), plan_tokens(torch.zeros(1, 12), (3, 4), ratio=0.0).inverse
    for width, *others in ((-4, *tensors, seed), (0, *tensors, seed), (4, *tensors, seed[:0]), (5, *tensors, seed)):
        with pytest.raises(RuntimeError, match="the plan does not fit the tokens"):
            ops.upsample_selected(*others, width, 1, 0, 0, 0, True)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        ops.upsample_renoise(torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 4, 4).double(), seed, 1, 1, 0, 2)
    with pytest.raises(RuntimeError, match="the plan has 12 rows, but the outputs have 11"):
        torch.ops.ralu_kernels.plan_tokens(torch.zeros(1, 12), 3, 4, 0, None, 11, "native")


@native
def test_only_what_is_traced_sees_the_op():
    """Called plainly the extension needs no dispatch to Python; graphs and fake tensors have the one opaque op."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def call(x):
        return upsample_renoise(x, 1.0, 0.5, 0.1, 3, backend="native")

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(1, 2, 3, 4)
    with Names():
        expected = call(x)
    assert "ralu_kernels_C.upsample_renoise.out" in seen and "ralu_kernels.upsample_renoise.default" not in seen
    seen.clear()
    assert torch.equal(torch.compile(call, fullgraph=True, backend=backend)(x), expected)
    assert any("ralu_kernels.upsample_renoise" in name for name in seen) and not any("_C" in name for name in seen)
    with FakeTensorMode():
        assert call(torch.empty(1, 2, 3, 4)).shape == expected.shape


# ---- copies of the package ----


def copy_of(folder, name, extension=None):
    """Copy the package under a name, with ``extension`` for an extension (None: it has none)."""
    package = folder / name
    shutil.copytree(Path(ralu_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if extension is not None:
        (package / f"{name}_C.abi3.so").write_bytes(extension)
    return package


def run_in(folder, code, *arguments, **more):
    """Run code that finds packages in the folder before those that are installed, editable ones too."""
    start = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])} | more
    command = [sys.executable, "-c", start + code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


ALONE = """
import torch, ralu_kernels
for _ in range(2):
    print(ralu_kernels.upsample_renoise(torch.zeros(1, 1, 2, 2), 1.0, 1.0, 0.1, 0).shape)
try:
    ralu_kernels.upsample_renoise(torch.zeros(1, 1, 2, 2), 1.0, 1.0, 0.1, 0, backend="native")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("hidden, compiler", [(False, True), (True, False)])
def test_an_absent_extension_is_a_normal_case(tmp_path, hidden, compiler):
    """It warns once where it need not be absent, and finds one that another folder of the same name hides."""
    first, second = tmp_path / "clone", tmp_path / "installed"
    for folder in (first, second):
        folder.mkdir()
        copy_of(folder, "ralu_kernels", b"any" if hidden and folder is second else None)
    where = {"PYTHONPATH": os.pathsep.join([str(first), str(second)]), "PYTHONWARNINGS": "always"}
    code, out, errors = run_in(first, ALONE, **where, RALU_NATIVE="", CXX=sys.executable if compiler else "no-compiler")
    assert code == 0, errors
    assert "torch.Size([1, 1, 4, 4])" in out
    expected = f"{second / 'ralu_kernels'}, which has it" if hidden else "the extension was not compiled when"
    assert f"'native' ({'ralu_kernels is imported from ' if hidden else ''}" in out and expected in out
    assert errors.count("UserWarning: ralu_kernels runs in plain PyTorch on cpu") == compiler
    assert compiler is False or expected in errors


def test_a_broken_extension_says_so(tmp_path):
    copy_of(tmp_path, "ralu_kernels", b"not a shared object")
    code, _, errors = run_in(tmp_path, ALONE)
    assert code != 0
    assert "ImportError: the compiled extension of ralu_kernels is there but cannot be loaded" in errors


# Each package's results of every backend that runs, and that a plan of another's is none of its own.
BESIDE = """
import importlib, torch
results = {}
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    plan = package.plan_tokens(torch.arange(12.0)[None], (3, 4), ratio=0.5)
    for backend in ("native", "reference"):
        try:
            low = torch.arange(96.0).view(1, 12, 8)
            packed = package.upsample_selected(low, plan, 0.9, 0.4, 0.02, 1, backend=backend)
            out = package.upsample_remaining(packed, plan, 0.9, 0.4, 0.02, 1, backend=backend)
            assert torch.allclose(out, results.setdefault("", out), atol=1e-4)
            assert getattr(torch.ops, name.replace(".", "_")).upsample_selected.default
            print(name, backend)
        except ValueError as error:
            assert f"the extension was not compiled when {name} was installed" in str(error), error
    try:
        package.upsample_selected(low, results.setdefault("plan", plan), 0.9, 0.4, 0.02, 1)
    except TypeError as error:
        assert "plan must be a TokenPlan, got TokenPlan(" in str(error)
        print(name, "refuses")
"""


@native
def test_copies_load_beside_an_installed_one(tmp_path):
    """In pure Python under two other names, one inside a package; the installed one keeps its extension."""
    copy_of(tmp_path, "other_kernels")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/__init__.py").touch()
    copy_of(tmp_path / "deeper", "ralu_kernels")
    code, out, errors = run_in(tmp_path, BESIDE, "ralu_kernels", "other_kernels", "deeper.ralu_kernels")
    assert code == 0, errors
    assert out.splitlines() == [
        "ralu_kernels native", "ralu_kernels reference", "other_kernels reference", "other_kernels refuses",
        "deeper.ralu_kernels reference", "deeper.ralu_kernels refuses",
    ]  # fmt: skip


HUB = "_ralu_kernels_cpu_0123abc"  # as kernel-builder names a build: package, extension and namespace at once


@pytest.fixture(scope="module")
def hub_extension(tmp_path_factory):
    """Compile it without optimisation, and all as one, for speed: what it shows is that it loads beside another."""
    folder, place = Path(torch.__file__).parent, tmp_path_factory.mktemp("extension")
    extension, source = place / f"{HUB}.abi3.so", place / "all.cpp"
    sources = [ROOT / "csrc/binding.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    source.write_text("".join(f'#include "{path}"\n' for path in sources))
    command = ["c++", "-O0", "-w", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-o", extension, source]
    command += [f"-DTORCH_EXTENSION_NAME={HUB}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-DTORCH_STABLE_ONLY", f"-I{folder}/include", f"-I{sysconfig.get_path('include')}", f"-L{folder}/lib"]
    command += [f"-I{ROOT / 'csrc'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run(command, check=True, timeout=300)
    return extension


@native
@compiler
def test_copies_have_extensions_of_their_own(tmp_path, hub_extension):
    shutil.copy(hub_extension, copy_of(tmp_path, HUB))
    code, out, errors = run_in(tmp_path, BESIDE, HUB, "ralu_kernels")
    assert code == 0, errors
    assert out.splitlines() == [
        f"{HUB} native", f"{HUB} reference", "ralu_kernels native", "ralu_kernels reference", "ralu_kernels refuses",
    ]  # fmt: skip


# ---- Hugging Face's kernels ----

hub = pytest.mark.skipif(not importlib.util.find_spec("kernels"), reason="kernels is not installed")


def built(folder, extension):
    """Lay out the build variant that kernel-builder makes, with what pip builds in place of its own compilation."""
    variant = folder / "build" / f"torch-stable-abi210-cpu-{platform.machine()}-{platform.system().lower()}"
    variant.parent.mkdir()
    copy_of(folder, "sources").rename(variant)
    shutil.copy(extension, variant)
    metadata = {"id": HUB, "name": "ralu-kernels", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    return folder


# Every operation of the kernel that is loaded and of the installed package, on every backend that they have for it.
LOADED = """
import torch
import ralu_kernels as installed
from kernels import get_kernel

loaded = get_kernel("ralu/ralu-kernels", version=1, backend="cpu", trust_remote_code=True)
assert loaded.__name__ == sys.argv[1] and loaded.upsample_renoise is not installed.upsample_renoise
x, y, vector = torch.randn(2, 12, 16), torch.randn(2, 12, 16), torch.randn(2, 16)
image, noise = torch.randint(0, 256, (2, 24, 32), dtype=torch.uint8), (0.9, 0.4, 0.02, torch.tensor([3, 4]))
used = set()

def results(package, backend):
    def call(name, *given, **named):
        used.add(name)
        made = getattr(package, name)(*given, **named)
        everything.extend(torch.utils._pytree.tree_leaves(vars(made) if hasattr(made, "source") else made))
        return made

    everything, own = [], {"backend": backend}
    blocks = own if backend == "reference" else {}  # operations inside the blocks have no compiled version
    plan = call("plan_tokens", x[..., 0].contiguous(), (3, 4), ratio=0.5, **own)
    packed = call("upsample_selected", x, plan, *noise, **own)
    call("upsample_remaining", packed, plan, *noise, **own)
    call("upsample_renoise", x.view(2, 4, 6, 8), *noise, **own)
    call("canny", image, **own)
    call("edge_density", image, 8, **own)
    call("modulate", x, vector, vector, **blocks)
    call("gated_add", x, vector, y, **blocks)
    call("gated_add_modulate", x, vector, y, vector, vector, **blocks)
    call("concat_gelu", x, y, **blocks)
    used.add("packed_layout")
    layout = package.packed_layout(torch.arange(24).view(2, 12) % 5 > 0, 2, 12, "cpu")
    q, k, v = call("pack_qkv", [package.QKV(x, y, x)], layout, 2, **blocks)
    lengths = layout.cu_seqlens, layout.cu_seqlens, 12, 12
    used.add("attention_backend")
    with package.attention_backend("sdpa"):
        attended = call("varlen_attention", q, k, v, *lengths)
    call("unpack", attended, layout, [12], **blocks)
    return [leaf for leaf in everything if isinstance(leaf, torch.Tensor)]

for backend in ("native", "reference"):
    for ours, theirs in zip(results(loaded, backend), results(installed, backend), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    operations = {name for name in installed.__all__ if callable(getattr(installed, name)) and name.islower()}
    assert used == operations, used ^ operations
    used.clear()
    print(backend)
assert set(getattr(torch.ops, sys.argv[1]).upsample_selected.overloads()) == {"default", "out"}
"""


@native
@compiler
@hub
def test_the_hub_kernel_loads_beside_an_installed_package(tmp_path, hub_extension, monkeypatch):
    """Through `get_kernel`, offline: operations of Python and of C++ share the build's own namespace."""
    monkeypatch.setenv("LOCAL_KERNELS", f"ralu/ralu-kernels={built(tmp_path, hub_extension)}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, errors = run_in(tmp_path, LOADED, HUB)
    assert code == 0, errors
    assert out.splitlines() == ["native", "reference"]


@hub
def test_the_hub_kernel_is_built_from_what_is_here(tmp_path):
    """`kernels` itself reads build.toml; its sources are all there are, and its flags those of setup.py."""
    from kernels._rust import Build

    config = Build.open(ROOT / "integrations/hf_kernels")
    assert [str(backend) for backend in config.general.backends] == ["cpu", "cuda"]
    text = (ROOT / "integrations/hf_kernels/build.toml").read_text()
    named = set(re.findall(r'"(csrc/[^"]+)"', text))
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    setup = (ROOT / "setup.py").read_text()
    for name, key in (("CXX_FLAGS", "cxx-flags"), ("NVCC_FLAGS", "cuda-flags")):
        flags, theirs = (
            re.search(rf"^{word} = \[(.+)\]$", where, re.M)[1] for word, where in ((name, setup), (key, text))
        )
        assert set(theirs.split(", ")) == set(flags.split(", ")) - {'"-g0"'}


# ---- the whole ----


@native
def test_the_embedded_model_generates_the_same_image():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: from 0.42 on it needs Python 3.11")
    pipe = diffusers.FluxPipeline.from_pretrained(ralu.mini_path())
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(height=256, width=256, max_sequence_length=16, output_type="np")
    images = {}
    for backend in ("native", "reference"):
        ralu.enable(pipe, "flux-7x", backend=backend)
        images[backend] = pipe("penguin", generator=torch.Generator().manual_seed(3), **arguments).images
    assert images["reference"].std() > 0.1
    np.testing.assert_allclose(images["native"], images["reference"], rtol=0, atol=2e-3)  # half an 8-bit level
