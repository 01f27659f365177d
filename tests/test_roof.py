"""What roof.py reads from machine code, and what it concludes."""

import shutil
import sys
from pathlib import Path

import pytest

from ralu_kernels._backend import INTERPRET, triton

if triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves Triton no compiler: run in a process without it", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import roof

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00 */
        /*0010*/               @P0 EXIT ;                    /* 0x00 */
        /*0020*/              @!P1 BRA 0x60 ;                /* 0x00 */
        /*0030*/                   MUFU.RSQ R2, R3 ;         /* 0x00 */
        /*0040*/                   STG.E [R4], R2 ;          /* 0x00 */
        /*0050*/                   EXIT ;                    /* 0x00 */
        /*0060*/                   FADD R2, R2, R3 ;         /* 0x00 */
        /*0070*/                   STG.E [R4], R2 ;          /* 0x00 */
        /*0080*/                   EXIT ;                    /* 0x00 */
        /*0090*/                   BRA 0x90;                 /* 0x00 */
"""


def test_the_path_is_the_one_with_most_work():
    """To the exit behind the special function: six instructions, one of them special; out again after two."""
    assert roof.paths(SASS) == (6, 1, 2)
    assert roof.paths(SASS.replace("MUFU.RSQ R2, R3", "FMUL R2, R2, R3")) == (6, 0, 2)


def test_loops_have_no_path():
    with pytest.raises(ValueError, match="a loop from 0050 to 0030"):
        roof.paths(SASS.replace("/*0050*/                   EXIT ", "/*0050*/               @P2 BRA 0x30 "))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA toolkit: nvcc is not on the PATH")
def test_a_kernel_of_known_work(tmp_path):
    """Two fast sines a thread, stored once; who has nothing to do leaves early."""
    (tmp_path / "two.cu").write_text(
        "__global__ void two(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x;"
        " if (i < n) x[i] = __sinf(x[i]) + __sinf(x[i] + 1.0f); }"
    )
    assert roof.nvcc(tmp_path / "two.cu", tmp_path / "two.cubin").startswith("nvcc 1")
    (found,) = roof.code(tmp_path / "two.cubin").values()
    assert found.special == 2 and found.idle < found.instructions < 40 and 0 < found.registers < 32
    assert roof.occupancy(found, 4) == 1.0 and roof.occupancy(roof.Code(1, 0, 1, 128, 0), 4) == 0.25


def test_the_slowest_decides():
    code, work = roof.Code(1000, 0, 10, 32, 0), roof.Work(32_000_000, 3_000_000, 32_000_000)
    seconds, limit, share = roof.predicted(code, work, 1e6)
    slots = 132 * 1.9e9 * 4 * 0.85
    assert limit == "issue" and seconds == pytest.approx(1e9 / slots) and share == pytest.approx(58 / 1000)
    assert roof.predicted(code, roof.Work(1, 3 * 10**12), 1)[:2] == (1.0, "memory")
    assert roof.predicted(roof.Code(1, 1, 1, 32, 0), roof.Work(1, 1), 1e6)[1] == "special functions"


def test_warps_of_the_tiles():
    """64 tokens of a sample in four tiles, a fifth selected: by a plain count."""
    busy, idle = roof.warps_of_tiles(256, 3)
    assert busy + idle == 3 * 64 * 4 // 8 and busy >= 3 * (64 + 3 * 12) / 8
