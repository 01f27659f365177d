"""`python -m ralu.evaluation FOLDER METRIC ...` scores the images that a folder has; `ralu evaluate` then reports."""

import argparse
import sys
from pathlib import Path

from ..errors import UsageError
from .folder import read_manifest
from .generate import processes
from .metrics import METRICS, MetricUnavailable, score
from .prompts import Prompt, Sample


def score_folder(folder: Path, metrics: list[str]):
    """Score the images of every method that a folder's manifest names.

    Raises UsageError for a folder without a manifest, and MetricUnavailable for a metric that cannot be had.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise UsageError(f"{folder} has no manifest.json: `ralu evaluate -o {folder}` makes it")
    texts, state = dict(manifest["settings"]["prompts"]), processes("auto")
    for method in manifest["methods"]:
        names = [map(int, path.stem.split("-")) for path in sorted((folder / method).glob("*.png"))]
        samples = [Sample(Prompt(line, texts[line]), number) for line, number in names]
        for metric in metrics:
            score(metric, folder, [method], samples, state, str(state.device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ralu.evaluation", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("metrics", nargs="+", choices=METRICS)
    try:
        score_folder(**vars(parser.parse_args()))
    except (MetricUnavailable, UsageError) as error:
        sys.exit(str(error))
