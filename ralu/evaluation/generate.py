"""The images of an evaluation, made by one process or several."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..errors import UsageError
from ..method import Method
from .folder import present, read_record, save_image
from .prompts import Sample

if TYPE_CHECKING:
    from ..runner import Runner


def processes(device: str) -> PartialState:
    """Return the processes that `accelerate launch` started, or this one.

    device: "auto", or "cpu" to leave GPUs alone. Raises UsageError for another one and several processes.
    """
    cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(weeks=1))  # one process may be done hours before another
    if state.num_processes > 1 and device not in ("auto", "cpu"):
        raise UsageError(f"--device: {state.num_processes} processes take a device each, leave {device} out")
    return state


def check_images(folder: Path, methods: list[Method], samples: list[Sample]):
    """Raise UsageError for an image that is there and damaged, before hours are spent on the others."""
    for method in methods:
        for sample in samples:
            path = folder / str(method) / sample.file
            if path.exists():
                read_record(path)


def generate(
    runner: "Runner", folder: Path, methods: list[Method], samples: list[Sample], batch: int, state: PartialState
):
    """Generate what the folder lacks, FOLDER/METHOD/LINE-SAMPLE.png, together with the other processes.

    A batch is always made of the same samples, and made again as a whole if one of them is missing, so they are the
    same, bit for bit, however often a run was interrupted.
    """
    batches = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    folders = {method: folder / str(method) for method in methods}
    lacking = {
        method: [part for part in batches if present(images, part) < len(part)] for method, images in folders.items()
    }
    state.wait_for_everyone()  # an image that is generated now would count as present to a process that looks later
    device = runner.pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    place = {"device": name, "batch": batch, "processes": state.num_processes}
    for method, images in folders.items():
        assigned = lacking[method][state.process_index :: state.num_processes]
        if assigned:
            runner.warm_up(method, [sample.prompt.text for sample in assigned[0]])
        runner.use(method)
        with tqdm(total=len(samples), desc=str(method), disable=not state.is_main_process, dynamic_ncols=True) as bar:
            bar.update(present(images, samples))
            for part in assigned:
                texts, seeds = [s.prompt.text for s in part], [s.seed(runner.seed) for s in part]
                result = runner.generate(texts, str(method), seeds=seeds, disable=True)
                made = {"seconds": result.seconds / len(part), "calls": result.calls} | place
                for sample, text, seed, image in zip(part, texts, seeds, result.images, strict=True):
                    if not present(images, [sample]):
                        save_image(image, images / sample.file, {"prompt": text, "seed": seed} | made)
                bar.update(present(images, samples) - bar.n)  # the other processes' too
            state.wait_for_everyone()
            bar.update(present(images, samples) - bar.n)
