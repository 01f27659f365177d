"""Every Triton kernel compiles for every supported GPU, without spills, and stores its output in 16-byte vectors."""

import re
import sys
from itertools import product
from pathlib import Path

import pytest

from ralu_kernels._backend import INTERPRET, triton

if triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves Triton no compiler: run in a process without it", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import aot
import record


@pytest.fixture(autouse=True)
def real_driver():
    """Compiling for other GPUs replaces Triton's driver; put back the one that tests on a GPU need."""
    yield
    triton.runtime.driver._active = None


OLDEST, *_, NEWEST = aot.ARCHITECTURES


@pytest.mark.parametrize("arch, all_variants", [
    (OLDEST, False), (90, False), (NEWEST, False),
    *(pytest.param(arch, True, marks=pytest.mark.exhaustive) for arch in aot.ARCHITECTURES),
])  # fmt: skip
@pytest.mark.parametrize(
    "kernel",
    [
        *("upsample", "upsample_selected", "upsample_remaining", "upsample_selected_pixels"),
        *("upsample_remaining_pixels", "plan", "adaln", "pack", "unpack", "concat_gelu"),
    ],
)
def test_kernels_compile(kernel, arch, all_variants):
    """All but float16, which is as wide as bfloat16, for the oldest architecture; one a kernel for the others."""
    mine = [variant for variant in aot.variants() if variant[0] == kernel]
    assert len(mine) >= len(aot.DTYPES)
    if not all_variants:
        mine = [variant for variant in mine if not variant[1].startswith("float16")]
        if arch != OLDEST:
            mine = [next(variant for variant in mine if variant[1].startswith("bfloat16"))]
    reports = [aot.report(*variant, arch) for variant in mine]
    for report in reports:
        assert report.arch.rstrip("a") == f"sm_{arch}"
        assert report.registers < 255 and report.spill_bytes == report.stack_bytes == 0, report
        # The plan's rows are scattered; all others write whole rows.
        assert kernel == "plan" or report.store_bits == "128", report
        # Inside the blocks everything is read in vectors too, but for the row a ragged batch looks up.
        if kernel in ("adaln", "pack", "concat_gelu"):
            assert report.load_bits == ("32+128" if "ragged" in report.variant else "128"), report


def test_the_table_has_every_variant_and_release():
    rows = record.read(record.RESULTS / "aot.csv")
    oldest = re.search(r'^triton = \["triton>=(.+)"\]', (record.ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    releases = {row["triton"].rpartition(".")[0] for row in rows}
    assert min(releases, key=lambda release: [*map(int, release.split("."))]) == oldest and len(releases) > 2
    every = [(*variant[:2], f"sm_{arch}") for variant, arch in product(aot.variants(), aot.ARCHITECTURES)]
    for release in releases:
        of = [row for row in rows if row["triton"].startswith(f"{release}.")]
        assert [(row["kernel"], row["variant"], row["arch"].rstrip("a")) for row in of] == every
    assert all(row["stack_bytes"] == row["spill_bytes"] == "0" for row in rows)


def test_narrow_stores_are_seen():
    """Rows of 35 columns have no 16-byte alignment: the check above can tell."""
    latent = aot._meta(1, 16, 35, 35)
    launch = aot.partial(aot.upsample._upsample_triton, latent, 0.9, 0.4, 0.02, aot._meta(1, dtype=aot.torch.int64), 2)
    assert aot.report("upsample", "odd", launch, 90).store_bits != "128"
