"""How much of the variance of Gaussian data each solver loses or adds, in closed form: no model, no chance, no clock.

Of data N(0, s²) in every latent value the exact velocity is linear, so each of a run's independent noises (the first,
and one a transition) is followed alone, and what is left of all at the end is the image's variance.

    python benchmarks/solver.py        writes benchmarks/results/solver-gaussian.csv, of which render.py makes a table
"""

import csv
from itertools import pairwise

import numpy as np
from record import RESULTS

from ralu.presets import PRESETS
from ralu.schedule import Schedule, single
from ralu.solver import SOLVERS, Solver

SCHEDULES = {f"stock-{steps}": single(steps, 3.0) for steps in (50, 28, 10, 7, 5, 4)} | PRESETS
DEVIATIONS = 1.0, 0.5


def excess(schedule: Schedule, solver: str, s: float) -> float:
    """Return how much more variance images have than data of standard deviation s, as a share of theirs."""
    noises = np.ones(1)
    for k in range(len(schedule.stages)):
        if k:
            entered = schedule.transitions[k - 1]
            noises = np.append(entered.scale * noises, entered.noise_scale * np.sqrt(1 - entered.c))
        step = Solver(solver, lambda x: x @ x)
        for sigma, following in pairwise(schedule.sigmas(k + 1)):
            velocity = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2) * noises
            noises = noises + (following - sigma) * step(noises, velocity, sigma, following)
    return float(noises @ noises) / s**2 - 1


def rows() -> list[dict]:
    """Make a row for each schedule and standard deviation."""
    return [
        {"method": name, "deviation": s, **{solver: f"{excess(schedule, solver, s):.4f}" for solver in SOLVERS}}
        for name, schedule in SCHEDULES.items()
        for s in DEVIATIONS
    ]


def main() -> None:
    """Write the table."""
    table = rows()
    with open(RESULTS / "solver-gaussian.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
