"""Context parallelism: processes that run the same pipeline, and split the sequences of its transformer.

diffusers splits what the transformer is called with and gathers what it gives, so all that is around a call is in every
process whole. It has to be the same: processes with other tokens would wait for each other for ever.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Grid
from .schedule import Schedule


def context_of(transformer: Any) -> Any:
    """Return the `ContextParallelConfig` of a transformer, not compiled, or None."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


@dataclass(frozen=True)
class Parallel:
    """The processes that split a transformer's sequences.

    size:  how many they are.
    group: torch.distributed's group of them.
    """

    size: int
    group: Any

    @classmethod
    def of(cls, transformer: Any) -> "Parallel | None":
        """Return those of a transformer, None where its sequences are not split."""
        config = context_of(transformer)
        return config and cls(config.ulysses_degree * config.ring_degree, config._flattened_mesh.get_group())

    def check(self, schedule: Schedule, grid: Grid, conditions: int, text_tokens: int, images: int):
        """Raise ValueError for a call that cannot be split evenly in every stage.

        grid: the full one, (rows, columns). conditions: tokens of condition images.
        """
        full, low = math.prod(grid), math.prod(math.ceil(side / 2) for side in grid)
        whole = {stage.resolution for stage in schedule.stages if stage.resolution != "mixed"}
        counts = {f"at {name} resolution": (full if name == "full" else low) + conditions for name in whole}
        for where, count in (counts | {"of text": text_tokens}).items():
            if count % self.size:
                raise ValueError(
                    f"context parallelism splits tokens evenly over {self.size} processes, but there are {count} "
                    f"{where}: change the size, or max_sequence_length"
                )
        if images > 1 and schedule.mixed:
            raise ValueError(
                "with context parallelism the images of a batch must have their tokens at the same places, which "
                f"those of a mixed stage have not: generate the {images} images one at a time"
            )

    def first(self, x: Tensor) -> Tensor:
        """Return the first process's tensor in all of them."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        return x

    def check_same(self, seeds: Tensor):
        """Raise ValueError, in all processes, where seeds differ between them."""
        differ = (self.first(seeds) != seeds).any().int()
        dist.all_reduce(differ, dist.ReduceOp.MAX, group=self.group)
        if differ.item():
            raise ValueError("latents differ between the processes: give each of them a generator with the same seed")

    def selected(self, count: int, tokens: int, conditions: int) -> int:
        """Return how many tokens are to be selected for a mixed stage that can be split evenly: at least `count`.

        Fewer, where even all would not do. tokens: of the low grid, which with conditions can be split evenly, and each
        of which has three more if it is selected.
        """
        counts = *range(count, tokens + 1), *range(count - 1, -1, -1)
        return next(k for k in counts if (tokens + 3 * k + conditions) % self.size == 0)
