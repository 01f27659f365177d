"""Bytes of a forward pass on the meta device: what tensors hold, and a bound of what libraries hold besides."""

import math
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


class FusedAttention(TorchFunctionMode):
    """Attention as GPUs' kernels do it, without a matrix of weights, where the meta device would make one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _fused_attention(query, key, value, attn_mask=None, *_, **__):
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]


def _attention_flop(query, key, value, *_, **__) -> int:
    """Count both products from shapes (B, H, S, D), also where heads share keys, which PyTorch 2.11 refuses to do."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def flop_counter() -> FlopCounterMode:
    """Make a counter of operations, of `FusedAttention`'s too."""
    counted = {aten._scaled_dot_product_efficient_attention: _attention_flop}
    return FlopCounterMode(display=False, custom_mapping=counted)


def own_work(counts: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """Split the operations of a model among its modules, by their names in it: each with those of none of its parts.

    counts: what a `FlopCounterMode` counted in one call of the model, which itself has the name "".
    Returns (without attention's two matrix products, of those) for each.
    """
    names = sorted((name.split(".")[1:], split_work(ops)) for name, ops in counts.items() if name != "Global")
    own: dict[str, tuple[int, int]] = {}
    for path, work in names:
        own[".".join(path)] = work
        above = next((".".join(path[:k]) for k in range(len(path) - 1, -1, -1) if ".".join(path[:k]) in own), None)
        if path and above is not None:
            own[above] = own[above][0] - work[0], own[above][1] - work[1]
    return own


def split_work(counts: dict) -> tuple[int, int]:
    """Return the operations without attention's two matrix products, and those of these, of counts by operation."""
    weighted = sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.convolution))
    return weighted, sum(counts.values()) - weighted


def shared_work(own: dict[str, tuple[int, int]], shares: dict[str, float]) -> tuple[float, float]:
    """Sum up what modules do of their own work; each has the share of the longest name that is its own or above it."""
    tflop = attention = 0.0
    for name, (weighted, products) in own.items():
        path = name.split(".")
        share = next((shares[n] for k in range(len(path), 0, -1) if (n := ".".join(path[:k])) in shares), 1.0)
        tflop, attention = tflop + share * weighted, attention + share * products
    return tflop, attention


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made under it and are still in use: `now`, and at most `peak`.

    `scratch` is the largest of the operations' `cpu_scratch`.
    """

    def __init__(self, threads: int):
        super().__init__()
        self.threads = threads
        self.now = self.peak = self.scratch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands, results = _tensors((args, kwargs)), _tensors(result)
        before = _storages(operands)
        for key, storage in _storages(results).items():
            if key not in before:  # else a view, or written in place
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        self.scratch = max(self.scratch, cpu_scratch(func, operands, results, self.threads))
        return result

    def _add(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)


class Repeats:
    """Let equal blocks of a model run once: a call that equals an earlier one is counted as that one was.

    A block is an element of a `ModuleList`. Calls are equal where their blocks differ in nothing but their tensors'
    values, and their arguments in nothing but values and places. The first one must have left nothing behind but its
    results, in new memory; else all are run.
    """

    def __init__(self, counter: FlopCounterMode, memory: LiveBytes):
        self.counter, self.memory = counter, memory
        self.known: dict[Hashable, Any] = {}

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Replace the forward of a model's blocks, on the meta device, in this context."""
        blocks = list(_blocks(module, type(module).__name__))
        for name, block in blocks:
            block.forward = partial(self._run, name, _identity(block), block.forward)
        try:
            yield
        finally:
            for _, block in blocks:
                del block.forward

    def _run(self, name: str, block: Hashable, forward: Callable, *args, **kwargs):
        inputs, structure = tree_flatten((args, kwargs))
        sources = _storages(_tensors(inputs))
        key = block, str(structure), *(_described(x, sources) for x in inputs)
        if (first := self.known.get(key)) is None:
            return self._measure(name, key, sources, partial(forward, *args, **kwargs))
        equal, counts, peak, scratch, sizes, results, structure = first
        for (module, operation), count in counts.items():
            inside = module == equal or module.startswith(f"{equal}.")
            self.counter.flop_counts[name + module[len(equal) :] if inside else module][operation] += count
        self.memory.peak = max(self.memory.peak, self.memory.now + peak)
        self.memory.scratch = max(self.memory.scratch, scratch)
        made = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        views = (made[x[0]].view(x[1]).as_strided(*x[2:]) if isinstance(x, tuple) else x for x in results)
        return tree_unflatten(views, structure)

    def _measure(self, name: str, key: Hashable, sources: dict[int, torch.UntypedStorage], forward: Callable):
        """Run a block, and remember it if what it leaves is its results alone."""
        before, memory = self._counts(), self.memory
        now, peak, scratch = memory.now, memory.peak, memory.scratch
        memory.peak, memory.scratch = now, 0
        results, structure = tree_flatten(forward())
        made = _storages(_tensors(results))
        sizes = [storage.nbytes() for storage in made.values()]
        if not made.keys() & sources.keys() and memory.now - now == sum(sizes):
            added = {place: more for place, count in self._counts().items() if (more := count - before.get(place, 0))}
            leaves = [_described(x, made) for x in results]
            self.known[key] = name, added, memory.peak - now, memory.scratch, sizes, leaves, structure
        memory.peak, memory.scratch = max(peak, memory.peak), max(scratch, memory.scratch)
        return tree_unflatten(results, structure)

    def _counts(self) -> dict[tuple[str, Any], int]:
        """Return what was counted so far, by module and operation."""
        return {(name, op): n for name, ops in self.counter.flop_counts.items() for op, n in ops.items()}


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """List the blocks under a module, with their names as a `FlopCounterMode` has them."""
    for name, child in module.named_children():
        place = f"{path}.{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{place}.{i}", block) for i, block in enumerate(child))
        else:
            yield from _blocks(child, place)


def _identity(block: nn.Module) -> Hashable:
    """Everything about a block but its tensors' values; of objects that are neither numbers nor text the class."""
    plain = bool, int, float, str, tuple, list, type(None), torch.dtype
    return tuple(
        (name, type(part), *((key, repr(x) if isinstance(x, plain) else type(x)) for key, x in vars(part).items()))
        for name, part in block.named_modules()
    ), tuple((name, tuple(x.shape), x.stride(), x.dtype) for name, x in block.state_dict(keep_vars=True).items())


def _described(x: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """Return (index of its storage, dtype, shape, strides, offset) of a tensor; of anything else what it looks like."""
    if not isinstance(x, torch.Tensor):
        return x
    place = list(storages).index(x.untyped_storage()._cdata)
    return place, x.dtype, tuple(x.shape), x.stride(), x.storage_offset()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storages(tensors: list[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in storages}


def cpu_scratch(func, operands: list[torch.Tensor], results: list[torch.Tensor], threads: int) -> int:
    """Bound the bytes that one operation on a CPU allocates and frees, beside its operands and results.

    A library may copy any of these into a layout of its own. oneDNN's blocks of convolutions hold 16 channels. Where
    it does not serve (floats of 16 bits on most CPUs, and small inputs) PyTorch unfolds the input: every pixel of the
    output has a column of all that its kernel sees. So does oneDNN on CPUs without AVX2, as many columns at a time as
    a core's cache holds, 4 MB at most. Products of shorter floats go by tiles of 16 rows and columns where
    a CPU has those, of operands that may be transposed before, and add up in float32; with PyTorch 2.11 every thread
    holds 64 columns and 16 rows of the operands, in float32 for float16, and their sums. Attention goes over 256
    queries and 512 keys at a time; every thread holds their scores, two sums a query and its output in float32, and of
    shorter floats scores, queries and keys anew.
    """
    if func.is_view:
        return 0
    copies = sum(x.nbytes for x in (*operands, *results))
    if func is aten.convolution.default:
        (x, weight, *_), (y,) = operands, results
        for tensor, dims in ((x, (1,)), (weight, (0, 1)), (y, (1,))):
            blocked = math.prod(math.ceil(n / 16) * 16 if i in dims else n for i, n in enumerate(tensor.shape))
            copies += blocked * tensor.itemsize - tensor.nbytes
        columns = weight[0].numel() * y[:, 0].numel() * x.itemsize
        whole = x.dtype != torch.float32 or x.numel() <= 20480
        copies += columns if whole else min(columns, threads * 2**22)
    elif func in _PRODUCTS and operands[0].dtype != torch.float32:
        copies += sum(2 * _tiled(x) * x.itemsize for x in operands) + sum(4 * _tiled(y) for y in results)
        copies += threads * (4 * (64 + 16) * operands[-1].shape[-2] + 4 * 64 * 16 + 1024)
    elif func in _ATTENTION:
        query, key = operands[:2]
        queries, keys, width = min(256, query.shape[-2]), min(512, key.shape[-2]), query.shape[-1]
        copies += threads * 4 * queries * (keys + 2 + width)
        if query.dtype != torch.float32:
            copies += threads * query.itemsize * (queries * keys + (queries + keys) * width)
    return copies


def _tiled(x: torch.Tensor) -> int:
    """Count a matrix's elements where its sides are rounded up to tiles of 16."""
    return math.prod(x.shape[:-2]) * math.prod(math.ceil(side / 16) * 16 for side in x.shape[-2:])


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_ATTENTION = {
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
