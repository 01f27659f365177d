"""Does a change make anything faster or slower? Two revisions, alternated in one run.

    python benchmarks/compare.py BASE [HEAD] [--rounds 6]

Both are checked out into git worktrees and built there; HEAD is by default the working tree as it stands (files that
git tracks). Then processes of the one and of the other take turns (base, head, head, base, ...), each running this
checkout's bench.py and e2e.py on its own revision's packages. Printed is time(HEAD) / time(BASE) of every case, the
geometric mean over the rounds, with the 95 % interval of Student's t over the logarithms of the rounds' ratios. eager
and copy are the same in both: what they differ by is chance. Of twenty intervals one misses 1 by chance alone.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import record
import scipy.stats
from record import ROOT

HERE = Path(__file__).parent
COMMANDS = [
    [str(HERE / "bench.py"), "--providers", "eager", "native", "triton", "--pixels", "1024", "--batch", "1",
     "--threads", "1"],
    [str(HERE / "e2e.py"), "--methods", "stock-10", "flux-5x", "--batch", "1", "--repeats", "1",
     "--models", "mini-flux"],
]  # fmt: skip


def call(*command, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return what it prints. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        *_, last = (done.stderr or done.stdout or "it says nothing").strip().splitlines()
        raise RuntimeError(f"{' '.join(map(str, command[:2]))} failed in {cwd}: {last}")
    return done.stdout.strip()


@contextmanager
def worktree(revision: str, folder: Path, repository: Path = ROOT):
    """Check a revision out into a new folder, and build its extension there."""
    call("git", "worktree", "add", "--detach", folder, revision, cwd=repository)
    try:
        call(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=folder)
        yield folder
    finally:
        call("git", "worktree", "remove", "--force", folder, cwd=repository)


def times(tree: Path, command: list[str]) -> dict[tuple, float]:
    """Run a benchmark on the packages in `tree`; returns the p50 of every case."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.csv"
        call(sys.executable, *command, "--output", output, cwd=tree, PYTHONPATH=str(tree))
        return {record.case(row): float(row["p50_ms"]) for row in record.read(output) if row["p50_ms"]}


def alternate(base: Path, head: Path, command: list[str], rounds: int) -> dict[tuple, list[float]]:
    """Measure time(head) / time(base) of every case that both have, a ratio a round."""
    ratios = defaultdict(list)
    for i in range(rounds):
        first, second = (base, head) if i % 2 == 0 else (head, base)
        measured = {tree: times(tree, command) for tree in (first, second)}
        for case in measured[base].keys() & measured[head].keys():
            ratios[case].append(measured[head][case] / measured[base][case])
        print(f"{Path(command[0]).name}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    return ratios


def ratio_interval(ratios: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Compute the geometric mean, and the interval of Student's t over the logarithms."""
    logs = np.log(ratios)
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    mean, low, high = (float(np.exp(logs.mean() + side * half)) for side in (0, -1, 1))
    return mean, low, high


def report(base: Path, head: Path, command: list[str], rounds: int) -> bool:
    """Print how the times of a benchmark compare. Returns whether it ran: an old revision may lack something."""
    try:
        compared = alternate(base, head, command, rounds)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False
    for case, ratios in sorted(compared.items()):
        ratio, low, high = ratio_interval(ratios)
        verdict = "" if low <= 1 <= high else "  slower" if low > 1 else "  faster"
        print(f"{ratio:6.3f} ({low:.3f} to {high:.3f})  {' '.join(filter(None, case[:-1]))}{verdict}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Compare the revisions of the command line. Returns how many of the benchmarks could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD", nargs="?")
    parser.add_argument("--rounds", type=int, default=6, help="at least 2 (default: 6)")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    head = args.head or call("git", "stash", "create") or "HEAD"
    with (
        tempfile.TemporaryDirectory() as folder,
        worktree(args.base, Path(folder) / "base") as base,
        worktree(head, Path(folder) / "head") as other,
    ):
        print(f"time of {args.head or 'the working tree'} over that of {args.base}, {args.rounds} rounds")
        failed = [command for command in COMMANDS if not report(base, other, command, args.rounds)]
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
