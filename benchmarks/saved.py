"""What a whole run costs at full size, by `ralu.estimate`: nothing is run, and no weights are needed.

    python benchmarks/saved.py

It rewrites benchmarks/results/saved.csv, the README's first table. Text encoders, previews and VAE are counted, and
attention's two matrix products.
"""

import argparse
from pathlib import Path

import record
import torch

import ralu

METHODS = {
    "flux-dev": ("stock-50", "stock-28", "stock-10", "flux-5x", "flux-7x"),
    "sd3-medium": ("stock-50", "stock-28", "stock-10", "sd3-2x", "sd3-3x"),
}


def rows(pixels: int) -> list[dict]:
    """Estimate every method, one image in bfloat16."""
    where = record.provenance(torch.device("cpu"))
    where = {key: where[key] for key in ("torch", "commit", "date")}  # the same on every device
    found = []
    for model, methods in METHODS.items():
        for method in methods:
            cost = ralu.estimate(model, method, height=pixels, width=pixels)
            calls = sum(part.calls for part in cost.parts if part.name.startswith(("stage", "full resolution")))
            found.append({"model": model, "method": method, "pixels": pixels, "calls": calls,
                          "tflop": f"{cost.total:.2f}", **where})  # fmt: skip
    return found


def main(argv: list[str] | None = None):
    """Write the file anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=record.RESULTS / "saved.csv")
    args = parser.parse_args(argv)
    args.output.unlink(missing_ok=True)
    record.append(args.output, rows(args.pixels))


if __name__ == "__main__":
    main()
