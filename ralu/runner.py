"""A pipeline that is run with one method after another, at one size and from one range of seeds."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image

from . import families
from .errors import UsageError, shortened, usage
from .method import Method
from .models import Model
from .schedule import Schedule


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' notices about optional packages, and their bars over files that load in a second."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = diffusers_logging, transformers_logging
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


@dataclass
class Result:
    """The outcome of one batch: its images, wall-clock seconds, and the number of transformer calls."""

    images: list[Image.Image]
    seconds: float
    calls: int


_SCHEDULED = ("ratio", "matching", "upsampler")  # options that a schedule has itself


class Runner:
    """Load a model and run it.

    width, height: of the images, in pixels.
    seed:   of the first prompt of a batch.
    device: as PyTorch names it; "auto" for the accelerator, or the CPU without one.
    dtype:  "float32", "bfloat16", "float16"; "auto" is float32 on a CPU, else bfloat16.

    Raises UsageError for a device that cannot be used and a model that cannot be loaded.
    """

    def __init__(
        self, model: Model, width: int, height: int, *, seed: int = 0, device: str = "auto", dtype: str = "auto"
    ):
        device = _checked_device(device)
        if dtype == "auto":
            dtype = "float32" if device.startswith("cpu") else "bfloat16"
        with quiet():
            from . import pipeline  # its imports are chatty too

            self._pipeline, self.pipe = pipeline, _load(model, dtype).to(device)
        self.model, self.seed = model, seed
        self.call_arguments = {"height": height, "width": width} | model.call_arguments
        self.description = f"{model.name} on {device}, {dtype}, {width}×{height} pixels"
        self.method = Method("stock")

    def use(self, method: Method, schedule: Schedule | None = None):
        """Switch the pipeline to a method; `schedule` replaces the preset's.

        Raises UsageError where the pipeline cannot be run so.
        """
        if method.speedup is not None and schedule is None:
            schedule = self.model.budget(method, self.call_arguments["width"], self.call_arguments["height"], self.pipe)
        self._pipeline.disable(self.pipe)  # also what a folder was saved with: a method's name says all
        if method.preset or method.cache or method.options.given():
            # With another schedule its own ratio, and transitions that are matched already.
            options = method.options.given().items()
            given = {name: value for name, value in options if not schedule or name not in _SCHEDULED}
            with usage(str(method)):
                self._pipeline.enable(self.pipe, schedule or method.spatial, cache=method.cache, **given)
        self.method = method

    def warm_up(self, method: Method, prompts: list[str]):
        """Take as few steps as can be at every resolution: compilation and first allocations happen here."""
        if method.preset:
            self.use(method)
            schedule = self.pipe.scheduler.schedule
            self.use(method, schedule.replace(steps=[method.options.fewest_steps] * len(schedule.stages)))
        else:
            self.use(replace(method, spatial="stock-1"))
        self.generate(prompts, f"{method}, warm-up", leave=False)

    def generate(
        self,
        prompts: list[str],
        label: str,
        seeds: list[int] | None = None,
        callback: Callable | None = None,
        **bar,
    ) -> Result:
        """Generate an image for each prompt, in one batch, with the method in use.

        label: of the progress bar, to which `bar` goes.
        seeds: of the prompts; by default the first is the runner's, and each further one adds 1.
        callback: the pipeline's `callback_on_step_end`.

        Raises UsageError for several prompts, SD3 and a method with a threshold, where the blocks are not fused.
        """
        from .blocks import is_fused

        masked = self.method.options.threshold is not None and not families.load(self.model.family).takes_mask
        if masked and len(prompts) > 1 and not is_fused(self.pipe.transformer):
            fusible = " if its blocks are not fused" if families.load(self.model.family).fused_blocks else ""
            raise UsageError(
                f"{self.method}: with a threshold the images of a batch differ in tokens, which {self.model.pipeline} "
                f"does not take{fusible}; give a ratio, or take one prompt at a time"
            )
        calls: list[int] = []
        hook = self.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        self.pipe.set_progress_bar_config(desc=label, dynamic_ncols=True, **({"leave": True} | bar))
        # A preset has its own number whatever is asked for, but SD3's progress bar goes by what is asked for.
        count = sum(self.pipe.scheduler.schedule.steps) if self.method.preset else self.method.steps
        steps = {"num_inference_steps": count} if count else {}
        seeds = seeds or [self.seed + i for i in range(len(prompts))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            start = time.perf_counter()
            images = self.pipe(
                prompt=prompts, generator=generators, callback_on_step_end=callback, **steps, **self.call_arguments
            ).images
            return Result(images, time.perf_counter() - start, len(calls))
        finally:
            hook.remove()


def _checked_device(name: str) -> str:
    if name == "auto":
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise UsageError(f"--device: {name} cannot be used: {shortened(error)}") from error
    return name


def _load(model: Model, dtype: str):
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(model.location, dtype=getattr(torch, dtype))
    except Exception as error:  # the hub, the network and every file format have errors of their own
        raise UsageError(f"--model: cannot load {model.name}: {shortened(error)}") from error
