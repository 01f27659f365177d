"""The paper's work: what `ralu.estimate` counts for the rows of Tables 1 and 3, beside the paper's figures.

    python benchmarks/work.py

It rewrites benchmarks/results/work.csv, which render.py makes docs/work.md of. A row is a run of a 1024x1024 image:

table, name      where the paper has it, and what it calls the method
model, method    what is counted, see `ralu.estimate` and `ralu.method`
text_tokens      of T5, SD3's 77 of CLIP not among them
passes           transformer passes in a step: 2 with a negative prompt
tflop, total     10^12 operations, text encoders, previews and decoder included; `total` has attention's two products
                 too, which the paper's profiler did not count
over             the run by whose work this one's is divided, where the paper says how many times less it is
ours, paper      in TFLOP, or in times; deviation of ours from the paper's
note             what the paper leaves open, and why a figure is not to be had
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch

import ralu
from ralu.components import describe
from ralu.presets import BASELINES
from ralu.runner import quiet
from ralu.schedule import Schedule, bottleneck

OUTPUT = record.RESULTS / "work.csv"
LITERAL = ", all steps made"
STEPS = {
    "bottleneck-flux-5x": ((4, 12, 5), (0.85, 0.5)),
    "bottleneck-flux-7x": ((3, 8, 4), (0.85, 0.5)),
    "bottleneck-sd3-2x": ((6, 18, 7), (0.95, 0.5)),
    "bottleneck-sd3-3x": ((4, 12, 4), (0.95, 0.5)),
}
FITTED = "the strengths are not the paper's but those that make its figure"
OTHERWISE = "the same steps, none left out"
TURBO = "over 28 steps of SD3.5-large; neither with a negative prompt"


@dataclass(frozen=True)
class Row:
    """A row of the paper, and what it is compared with. `paper` is in TFLOP, or in times less than `over`."""

    table: str
    name: str
    model: str
    method: str
    paper: float
    note: str = ""
    text_tokens: int | None = None
    guided: bool | None = None
    over: tuple[str, str] | None = None  # model and method

    @property
    def schedule(self) -> str | Schedule:
        """What `ralu.estimate` takes for the method."""
        if not self.method.endswith(LITERAL):
            return self.method
        name = self.method.removesuffix(LITERAL)
        return bottleneck(*STEPS[name], BASELINES[name].shifts, truncated=False)


def _table_1(model: str, methods: dict[str, list[tuple]]) -> list[Row]:
    return [Row("1", name, model, *rest) for name, rows in methods.items() for rest in rows]


FLUX: dict[str, list[tuple]] = {
    "FLUX (50)": [("stock-50", 2990)],
    "Δ-DiT": [("stock-50+delta-dit(interval=5,num_blocks=53)", 772.1, "how many blocks is unpublished; 53 of 57 fit")],
    "ToCa": [("stock-40+toca(interval=5)", 601, "not reproducible: the ten full steps alone are more")],
    "TeaCache": [
        ("stock-45+teacache(delta=0.99)", 610.59, "expected: which steps are full depends on the image"),
        ("stock-30+teacache(delta=0.99)", 431.83, "expected"),
    ],
    "TaylorSeer": [("stock-50+taylorseer(interval=7)", 556.72), ("stock-50+taylorseer(interval=11)", 431.74)],
    "Bottleneck": [
        ("bottleneck-flux-5x", 571.2, FITTED), ("bottleneck-flux-5x" + LITERAL, 571.2, OTHERWISE),
        ("bottleneck-flux-7x", 431.5, FITTED), ("bottleneck-flux-7x" + LITERAL, 431.5, OTHERWISE),
    ],
    "RALU": [
        ("flux-5x", 540.47, "as the other rows of the table: 512 text tokens"),
        ("flux-5x", 540.47, "what fits its figure: 256 text tokens", 256),
        ("flux-7x", 426.01, "as the paper says, r = 0.2"),
        ("flux-7x(ratio=0.1)", 426.01, "what fits its figure: r = 0.1"),
    ],
}  # fmt: skip
SD3: dict[str, list[tuple]] = {
    "Δ-DiT": [("stock-28+delta-dit(num_blocks=24)", 183.46, "how many blocks is unpublished; all 24 fit")],
    "ToCa": [("stock-28+toca(interval=3)", 181.5, "no code for SD3 is published: the rules of FLUX's double blocks")],
    "RAS": [("stock-28+ras(ratio=0.32)", 185.14), ("stock-28+ras(ratio=0.05)", 118.99)],
    "TaylorSeer": [
        ("stock-28+taylorseer(interval=2)", 183.48, "as the paper says, W = 3"),
        ("stock-28+taylorseer(interval=2,warmup=1)", 183.48, "what fits its figure: W = 1"),
        ("stock-28+taylorseer(interval=4)", 123.49),
    ],
    "Bottleneck": [
        ("bottleneck-sd3-2x", 186.2, FITTED), ("bottleneck-sd3-2x" + LITERAL, 186.2, OTHERWISE),
        ("bottleneck-sd3-3x", 127.4, FITTED), ("bottleneck-sd3-3x" + LITERAL, 127.4, OTHERWISE),
    ],
}  # fmt: skip
DEV, LARGE = ("flux-dev", "stock-50"), ("sd3.5-large", "stock-28")
THIRTY = "r = 0.3 fits the rows of this table"
TABLE_3 = [
    Row("3", "RALU + Δ-DiT", "flux-dev", "flux-5x(ratio=0.3)+delta-dit", 422.56, THIRTY),
    Row("3", "RALU + ToCa", "flux-dev", "flux-5x(ratio=0.3)+toca(interval=3)", 409.74,
        "not reproducible: it is that of the full steps alone, as if ToCa's own cost nothing"),
    Row("3", "RALU + TaylorSeer, W = 3", "flux-dev", "flux-5x(ratio=0.3)+taylorseer(interval=3)", 410.70, THIRTY),
    Row("3", "RALU + TaylorSeer, W = 2", "flux-dev", "flux-5x(ratio=0.3)+taylorseer(interval=3,warmup=2)", 331.38,
        THIRTY),
    Row("3", "FLUX.1-schnell", "flux-schnell", "stock-4", 11.83, "over 50 steps of FLUX.1-dev", over=DEV),
    Row("3", "FLUX.1-schnell + RALU", "flux-schnell", "distilled-4(ratio=0.3)", 15.91, THIRTY, over=DEV),
    Row("3", "SD3.5-large-turbo", "sd3.5-large", "stock-4", 6.31, TURBO, guided=False, over=LARGE),
    Row("3", "SD3.5-large-turbo + RALU", "sd3.5-large", "distilled-4(ratio=0.3)", 8.28, THIRTY, guided=False,
        over=LARGE),
]  # fmt: skip
ROWS = [*_table_1("flux-dev", FLUX), *_table_1("sd3-medium", SD3), *TABLE_3]


def counted(row: Row) -> dict:
    """Count a row's work."""
    footing: dict[str, Any] = {"text_tokens": row.text_tokens, "guided": row.guided}
    cost = ralu.estimate(row.model, row.schedule, **footing)
    ours = cost.tflop
    if row.over:
        ours = ralu.estimate(*row.over, **footing).tflop / cost.tflop
    family = describe(row.model).family
    guided = family.guided if row.guided is None else row.guided
    return {
        "table": row.table, "name": row.name, "model": row.model, "method": row.method,
        "text_tokens": row.text_tokens or family.text_tokens, "passes": 1 + guided,
        "tflop": f"{cost.tflop:.2f}", "total": f"{cost.total:.2f}",
        "over": " of ".join(reversed(row.over)) if row.over else "", "ours": f"{ours:.2f}", "paper": f"{row.paper:.2f}",
        "deviation": f"{ours / row.paper - 1:+.4f}", "note": row.note,
    }  # fmt: skip


def main(argv: list[str] | None = None):
    """Count all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    origin = record.provenance(torch.device("cpu"))
    args.output.unlink(missing_ok=True)  # no history: only versions of the libraries change them
    with quiet():
        for row in ROWS:
            found = counted(row) | {key: origin[key] for key in ("torch", "commit", "date")}
            record.append(args.output, [found])
            print(*(found[key] for key in ("name", "method", "ours", "paper", "deviation")), flush=True)


if __name__ == "__main__":
    main()
