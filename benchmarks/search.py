"""Look for the best schedule that starts at half resolution, at a given work, on an embedded model.

Schedules are drawn at random: two stages or three, steps, ends, shifts, c, ratio, upsampler and solver, of all whose
work is the budget's to within 5 %. The last third of the draws are changes of the best three so far. Each makes the
images of 32 captions, and what counts is their Frechet distance to the converged images of the same captions and seeds,
as benchmarks/quality.py measures it. There the best of each budget is `searched-Nx`: measured again, on four times as
many captions and other seeds, for here it was chosen for its luck too.

    python benchmarks/search.py [--model mini-sd3] [--less 5 7 10 14] [--draws 48]

An interrupted search goes on where it was: every draw is a row of results/search-MODEL.csv.
"""

import argparse
import math
import random
from typing import Any

import numpy as np
import torch
from record import RESULTS, append, provenance, read
from tqdm import tqdm

import ralu
from ralu.components import describe
from ralu.families import family_of
from ralu.mini.train import CAPTIONS
from ralu.schedule import region_adaptive, two_resolutions

COUNT, SEED = 32, 7  # of captions
RATIOS = (0.1, 0.2, 0.3, 0.4)
Draw = dict[str, Any]  # steps, ends, shifts, c, ratio, upsampler: as `ralu.schedule` has them; solver
Row = dict[str, str]


def schedule_of(draw: Draw) -> ralu.Schedule:
    """Make a draw's schedule. Raises ValueError where its numbers do not go together."""
    steps, ends, shifts, c, upsampler = (draw[name] for name in ("steps", "ends", "shifts", "c", "upsampler"))
    if len(steps) == 2:
        return two_resolutions(steps, ends[0], shifts, c, upsampler=upsampler)
    return region_adaptive(steps, (*ends, 1.0), shifts, c, draw["ratio"], upsampler=upsampler)


def at_random(rng: random.Random, budget: float, work: dict[float, float]) -> Draw:
    """Draw a schedule for the budget."""

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    stages, ratio = rng.choice((2, 3)), rng.choice(RATIOS)
    ends = np.cumsum([rng.uniform(0.1, 0.6), *(rng.uniform(0.03, 0.25) for _ in range(stages - 2))])
    return {
        "steps": rng.choice(choices(budget, stages, ratio, work)), "ends": tuple(ends.tolist()),
        "shifts": tuple(between(1, 8) for _ in range(stages)), "c": between(0.003, 0.25), "ratio": ratio,
        "upsampler": rng.choice(("nearest", "pixels")), "solver": rng.choice(("euler", "ab2-limited")),
    }  # fmt: skip


def changed(draw: Draw, rng: random.Random, budget: float, work: dict[float, float]) -> Draw:
    """Move a draw's numbers by about a fifth, and one time in three its steps."""

    def moved(value: float) -> float:
        return value * math.exp(rng.gauss(0, 0.2))

    steps = rng.choice(choices(budget, len(draw["steps"]), draw["ratio"], work)), draw["steps"], draw["steps"]
    numbers = {name: tuple(map(moved, draw[name])) for name in ("ends", "shifts")}
    return draw | numbers | {"steps": rng.choice(steps), "c": min(0.25, moved(draw["c"]))}


def costs_of(stages: int, ratio: float, work: dict[float, float]) -> tuple[float, ...]:
    """Return the work of a call in each stage, in calls at full resolution."""
    return (work[0.0], 1.0) if stages == 2 else (work[0.0], work[ratio], 1.0)


def choices(budget: float, stages: int, ratio: float, work: dict[float, float]) -> list[tuple[int, ...]]:
    """List the steps that make the work of the budget to within 5 %, or the nearest to it.

    work: of a call in calls at full resolution, by the share of upsampled tokens.
    """
    costs = costs_of(stages, ratio, work)
    ranges = (range(1, math.ceil(budget / cost) + 1) for cost in costs)
    steps = np.stack(np.meshgrid(*ranges), -1).reshape(-1, stages)
    off = abs(steps @ costs / budget - 1)
    return [tuple(each) for each in steps[off <= max(0.05, off.min())].tolist()]


def draw_of(rows: list[Row], index: int, draws: int, budget: float, work: dict[float, float]) -> Draw:
    """Make the draw of this index, after the rows of those before."""
    rng = random.Random(f"{budget} {index}")
    while True:
        if index < 2 * draws // 3:
            draw = at_random(rng, budget, work)
        else:
            draw = changed(parsed(rng.choice(sorted(rows, key=frechet_of)[:3])), rng, budget, work)
        try:
            schedule_of(draw)
        except ValueError:
            continue
        return draw


def frechet_of(row: Row) -> float:
    """Return what counts."""
    return float(row["frechet"])


def parsed(row: Row) -> Draw:
    """Read a draw out of its row."""
    kinds = {"steps": int, "ends": float, "shifts": float}
    lists = {name: tuple(map(kind, row[name].split())) for name, kind in kinds.items()}
    return lists | {"c": float(row["c"]), "ratio": float(row["ratio"])} | {k: row[k] for k in ("upsampler", "solver")}


def best(model: str) -> dict[str, tuple[ralu.Schedule, dict[str, str]]]:
    """Return the best schedule of each budget, and the options that go with it, by name."""
    path, found = RESULTS / f"search-{model}.csv", {}
    for row in sorted(read(path) if path.exists() else [], key=frechet_of, reverse=True):
        draw = parsed(row)
        found[f"searched-{row['less']}x"] = schedule_of(draw), {"solver": draw["solver"]}
    return found


def main() -> None:
    """Search what the command line asks for."""
    # quality.py imports `best`
    from quality import CURVES, SCHEDULES, SIZE, TEXT_TOKENS, features, frechet, prepare, sample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CURVES, default="mini-flux")
    parser.add_argument("--less", type=int, nargs="+", default=[5, 7, 10, 14], help="times less work than a stock run")
    parser.add_argument("--draws", type=int, default=48, help="of each budget")
    args = parser.parse_args()
    path = RESULTS / f"search-{args.model}.csv"
    pipe = ralu.mini_pipeline(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    family, full = family_of(pipe), (SIZE // 16) ** 2
    text = TEXT_TOKENS + describe(pipe).clip_tokens * family.joins_clip
    tokens = {ratio: full // 4 + 3 * math.floor(ratio * full // 4) for ratio in (0.0, *RATIOS)}
    flop = {ratio: family.flop(pipe.transformer.config, tokens[ratio], text) for ratio in tokens}
    work = {ratio: flop[ratio] / family.flop(pipe.transformer.config, full, text) for ratio in tokens}

    def images(method: str) -> np.ndarray:
        chosen = np.linspace(0, len(CAPTIONS), COUNT, endpoint=False).astype(int).tolist()
        steps = prepare(pipe, method)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [
                sample(
                    pipe, [CAPTIONS[k] for k in chosen[i : i + 16]], [1000 * SEED + k for k in range(i, i + 16)], steps
                )
                for i in range(0, COUNT, 16)
            ]
        return features(torch.cat(parts).float())

    reference = images(next(iter(CURVES[args.model].values()))[0])
    for less in args.less:
        budget = family.entry.stock_steps / less
        for index in tqdm(range(args.draws), desc=f"{less} times less"):
            rows = [row for row in read(path) if row["less"] == str(less)] if path.exists() else []
            if index < len(rows):
                continue
            draw = draw_of(rows, index, args.draws, budget, work)
            SCHEDULES["drawn"] = schedule_of(draw), {"solver": draw["solver"]}
            written = {name: " ".join(f"{x:.4g}" for x in draw[name]) for name in ("steps", "ends", "shifts")}
            made = np.dot(draw["steps"], costs_of(len(draw["steps"]), draw["ratio"], work))
            row = {"less": less, "work": f"{made:.2f}"} | draw | written
            row |= {"c": f"{draw['c']:.4g}", "frechet": f"{frechet(images('drawn'), reference):.4f}"}
            append(path, [row | {"captions": COUNT, "seed": SEED} | provenance(torch.device("cpu"))])


if __name__ == "__main__":
    main()
