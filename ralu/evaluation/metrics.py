"""Scores of single images by other people's packages, kept beside the images."""

import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .folder import write_text
from .prompts import Sample

if TYPE_CHECKING:
    from accelerate import PartialState

Scorer = Callable[[Path, str], float]


class MetricUnavailable(Exception):  # noqa: N818  a metric that is left out is no error
    """Say why a metric is left out."""


@dataclass(frozen=True)
class Metric:
    """A score of single images.

    package: whose it is, by the name pip knows.
    needs:   the files it must have, and where they are looked for.
    load:    `(device) -> ((path, prompt) -> score)`.
    """

    title: str
    better: str
    package: str
    needs: str
    load: Callable[[str], Scorer]

    @property
    def version(self) -> str | None:
        """The package and its version; None where it is not installed."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return None


@contextmanager
def _torchvision_or_none() -> Iterator[None]:
    """Let pyiqa import torchvision, which NIQE does not use, and whose PyPI builds do not load beside a CPU torch."""
    names = ["torchvision", "torchvision.utils", "torchvision.transforms", "torchvision.transforms.functional"]
    absent = [] if find_spec("torchvision") else [ModuleType(name) for name in names]
    try:
        for module in absent:
            vars(module)["make_grid"] = None
            sys.modules[module.__name__] = module
        yield
    finally:
        for module in absent:
            del sys.modules[module.__name__]


def _pyiqa(name: str, device: str, **options) -> Scorer:
    import torch

    with _torchvision_or_none():
        import pyiqa

        metric = pyiqa.create_metric(name, device=torch.device(device), **options)

    def score(path: Path, prompt: str) -> float:
        from PIL import Image

        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return float(metric(pixels.permute(2, 0, 1)[None].float() / 255))

    return score


def _niqe(device: str) -> Scorer:
    """Load NIQE with the official parameters from iqa-torch; without that package pyiqa downloads the same."""
    import scipy.io

    try:
        file = metadata.distribution("iqa-torch").locate_file("iqa/niqe/niqe_pris_params.npz")
    except metadata.PackageNotFoundError:
        return _pyiqa("niqe", device)
    given, matlab = np.load(str(file)), io.BytesIO()
    scipy.io.savemat(matlab, {f"{key}_prisparam": given[f"{key}_pris_param"] for key in ("mu", "cov")})
    return _pyiqa("niqe", device, pretrained_model_path=matlab)


def _clip_iqa(device: str) -> Scorer:
    return _pyiqa("clipiqa", device)


def _image_reward(device: str) -> Scorer:
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device=device)
    return lambda path, prompt: model.score(prompt, str(path))


METRICS = {
    "niqe": Metric("NIQE", "lower", "pyiqa", "niqe_modelparameters.mat in {hub}/pyiqa or the package iqa-torch", _niqe),
    "clip-iqa": Metric("CLIP-IQA", "higher", "pyiqa", "RN50.pt in {hub}/clip", _clip_iqa),
    "image-reward": Metric(
        "ImageReward", "higher", "image-reward",
        "ImageReward.pt and med_config.json in ~/.cache/ImageReward, and bert-base-uncased's tokenizer; if it cannot "
        "be loaded beside transformers 5, run `python -m ralu.evaluation FOLDER image-reward` in another environment",
        _image_reward,
    ),
}  # fmt: skip


def score(
    name: str, folder: Path, methods: list[str], samples: list[Sample], state: "PartialState", device: str
) -> dict[str, np.ndarray]:
    """Return the scores of each method's images, {method: float64 (P,)}, NaN where the metric has none.

    They are kept in FOLDER/scores/METRIC/METHOD.json with the version of the package they are from; what is lacking is
    computed by all processes together. Raises `MetricUnavailable`, which names the files needed, if the metric cannot
    be had, and UsageError for a file of scores that is damaged.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    metric, scores = METRICS[name], {}
    scorer: Any = None
    for method in methods:
        file = _scores_file(folder, name, method)
        kept = read_scores(file)
        known = kept["scores"] if metric.version in (None, kept["by"]) else {}
        if todo := [sample for sample in samples if sample.file not in known]:
            with state.local_main_process_first():  # it may download
                scorer = scorer or _loaded(metric, device)
            computed, why = {}, scorer if isinstance(scorer, str) else ""
            assigned = [] if why else todo[state.process_index :: state.num_processes]
            try:
                for sample in tqdm(
                    assigned, f"{name}, {method}", disable=not state.is_main_process, dynamic_ncols=True
                ):
                    computed[sample.file] = scorer(folder / method / sample.file, sample.prompt.text)
            except Exception as error:  # a package has errors of its own, and the other processes wait for this one
                why = f"it fails at {method}/{sample.file} ({_reason(error)})"
            parts = gather_object([(computed, why)])
            if why := next((why for _, why in parts if why), ""):
                raise MetricUnavailable(why)
            for part, _ in parts:
                known |= part
            if state.is_main_process:
                write_text(file, json.dumps({"by": metric.version, "scores": dict(sorted(known.items()))}, indent=1))
        scores[method] = np.array([known[sample.file] for sample in samples])
    return scores


def _scores_file(folder: Path, metric: str, method: str) -> Path:
    return folder / "scores" / metric / f"{method}.json"


def check_scores(folder: Path, methods: list[str], metrics: list[str]):
    """Raise UsageError for a file of scores that is damaged."""
    for metric in METRICS.keys() & set(metrics):
        for method in methods:
            read_scores(_scores_file(folder, metric, method))


def read_scores(file: Path) -> dict:
    """Return {"by": the package and its version, "scores": {image file: score}} of a file that may not be there.

    Raises UsageError for a file that is truncated or another program's.
    """
    if not file.exists():
        return {"by": None, "scores": {}}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept.keys() != {"by", "scores"} or not all(isinstance(x, int | float) for x in kept["scores"].values()):
            raise ValueError("it has no scores by image")
    except (OSError, ValueError, AttributeError) as error:
        why = "it has no scores by image" if isinstance(error, AttributeError) else error
        raise UsageError(f"{file} is no file of scores: {why}; delete it to have the images scored again") from error
    return kept


def _loaded(metric: Metric, device: str) -> Scorer | str:
    """Return its scorer, or why there is none."""
    try:
        return metric.load(device)
    except Exception as error:  # packages, downloads and file formats have errors of their own
        import torch

        needs = metric.needs.format(hub=torch.hub.get_dir())
        return f"it needs the package {metric.package}, and {needs} ({_reason(error)})"


def _reason(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
