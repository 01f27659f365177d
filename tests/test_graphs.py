"""CUDA graphs of a transformer's calls, on a CPU: a stand-in records the operators of a capture and runs them again.

As on a GPU a replay sees the tensors of the capture alone, none of Python, and nothing may wait for the device.
"""

import copy
import sys
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ralu
from ralu import graphs
from ralu_kernels import packed_layout

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/gpu"))
import captured


def tensors_of(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]


class Recorded:
    """In place of `torch.cuda.CUDAGraph`."""

    made: list["Recorded"]

    def __init__(self):
        self.operators, self.replays = [], 0
        self.made.append(self)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operators:
            if not func.is_view:  # a view of the capture's memory stays one
                for held, x in zip(tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True):
                    held.copy_(x)

    def pool(self):
        return "pool"


streams: list = ["usual"]  # the current one last


class InStream:
    """In place of `torch.cuda.stream`."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before = streams[-1]
        streams.append(self.stream)

    def __exit__(self, *_):
        streams.append(self.before)


class Recording(TorchDispatchMode):
    """In place of `torch.cuda.graph`, whose stream is left by a capture that has succeeded alone."""

    def __init__(self, graph, pool, stream="of the current device"):
        super().__init__()
        assert pool in (None, "pool")
        self.graph, self.stream = graph, InStream(stream)

    def __enter__(self):
        self.stream.__enter__()
        return super().__enter__()

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.graph.operators.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "stream", InStream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    streams[:] = ["usual"]
    monkeypatch.setattr(graphs, "DEVICES", ("cpu", "cuda"))
    return Recorded.made


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(graphs.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("fused", [False, True])
def test_images_are_those_without_graphs(stock, family, fused, recorded):
    """Bit for bit, also of other prompts, guidance and noise than those of the captures: one a stage."""
    first = {"guidance_scale": 3.5}
    second = {"prompt": tiny.PROMPTS[2], "seeds": (5,), "guidance_scale": 7.0}
    pipe = ralu.enable(stock, family.short, fused=fused)
    expected = [tiny.generate(pipe, **call) for call in (first, second)]
    ralu.enable(pipe, family.short, fused=fused, graphs=True)
    assert torch.equal(tiny.generate(pipe, **first), expected[0]) and not torch.equal(*expected)
    assert [graph.replays for graph in recorded] == [1, 1, 1]  # of two steps a stage the first runs as usual
    assert torch.equal(tiny.generate(pipe, **second), expected[1])
    assert [graph.replays for graph in recorded] == [3, 3, 3]
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.generate(twin, **first), expected[0]) and len(recorded) == 6
    ralu.disable(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_what_is_to_be_run_on_a_gpu(recorded):
    assert captured.steps(torch.device("cpu"), fused=True) == "bit for bit" and recorded[0].replays == 5
    assert captured.images(torch.device("cpu"), pixels=128) == "bit for bit" and len(recorded) == 4
    assert captured.uncaptured(torch.device("cpu")) == "bit for bit" and len(recorded) == 5


def call_of(transformer, seed=0):
    """A call on a 4x6 grid."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (1, 24, 16), "encoder_hidden_states": (1, 7, 32), "pooled_projections": (1, 32)}
    call = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ids = {"img_ids": torch.rand(24, 3, generator=generator), "txt_ids": torch.zeros(7, 3)}
    return call | ids | {"timestep": torch.rand(1, generator=generator)}


@torch.no_grad()
def run(transformer, **call):
    return transformer(**call, return_dict=False)[0]


@pytest.fixture
def transformer():
    model = tiny.flux(guidance_embeds=False).transformer
    graphs.Graphs.put_into(model)
    return model


def test_changed_weights_are_seen(transformer, recorded):
    """Those in other places by a new capture, those that were changed where they are by the old one."""
    call = call_of(transformer)
    for _ in range(3):
        before = run(transformer, **call)
    linear = transformer.transformer_blocks[0].attn.to_q
    changes = {
        "in place": lambda: linear.weight.data.mul_(2),
        "replaced": lambda: setattr(linear, "weight", nn.Parameter(linear.weight + 1, requires_grad=False)),
        "moved": lambda: setattr(linear.weight, "data", linear.weight.data * 3),
        "another module": lambda: setattr(transformer.transformer_blocks[0].attn, "to_q", nn.Linear(32, 32)),
    }
    captures = 1
    for name, change in changes.items():
        change()
        expected = torch.no_grad()(type(transformer).forward)(transformer, **call).sample
        assert not torch.equal(expected, before), name
        results = [run(transformer, **call) for _ in range(3)]
        assert all(torch.equal(result, expected) for result in results), name
        captures += name != "in place"
        assert len(recorded) == captures, name
        before = expected


def test_results_are_the_callers_own(transformer):
    call, other = call_of(transformer), call_of(transformer, seed=1)
    run(transformer, **call)
    kept = run(transformer, **call)
    value = kept.clone()
    assert not torch.equal(run(transformer, **other), kept) and torch.equal(kept, value)


def test_in_and_out_of_inference_mode(transformer, recorded):
    """What is made inside can be written to inside alone."""
    call, other = call_of(transformer), call_of(transformer, seed=1)
    expected = [torch.no_grad()(type(transformer).forward)(transformer, **each).sample for each in (call, call, other)]
    with torch.inference_mode():
        for _ in range(2):
            run(transformer, **call)
    assert all(map(torch.equal, [run(transformer, **each) for each in (call, call, other)], expected))
    assert [graph.replays for graph in recorded] == [1, 2]


def test_what_cannot_be_captured_runs_as_usual(transformer, recorded, said):
    """LoRA, hooks, a cache that was put on since, gradients, autocast, and sequences of different lengths."""
    call = call_of(transformer)
    forward = torch.no_grad()(type(transformer).forward)

    def uncaptured(why, **more):
        said.clear()
        expected = forward(transformer, **call, **more).sample
        for _ in range(3):
            assert torch.equal(run(transformer, **call, **more), expected)
        assert len(recorded) == 1 and len(said) == 3 and all(why in words for words in said)

    for _ in range(2):
        run(transformer, **call)
    handle = transformer.transformer_blocks[1].register_forward_hook(lambda *_: None)
    uncaptured("hooks on the transformer's transformer_blocks.1")
    handle.remove()
    block = transformer.transformer_blocks[1]
    accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())
    uncaptured("hooks on the transformer's transformer_blocks.1")
    accelerate.hooks.remove_hook_from_module(block)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "test")
    uncaptured("hooks on the transformer's transformer_blocks.1")
    block._diffusers_hook.remove_hook("test")
    with torch.autocast("cpu"):
        uncaptured("autocast")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    uncaptured("LoRA")
    transformer.delete_adapters("default")
    transformer._hf_peft_config_loaded = False
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with transformer.cache_context("a"):
        run(transformer, **call)
    assert "hooks on the transformer's" in said[-1] and len(recorded) == 1
    transformer.disable_cache()
    ragged = packed_layout(torch.rand(1, 31) < 0.5, 1, 31, "cpu")
    ralu.fuse(transformer)
    with pytest.raises(graphs.Unfit, match="its sequences differ in length"):
        graphs._kind({"joint_attention_kwargs": {"sequences": ragged}}, [])


def test_a_capture_that_fails_is_the_last(transformer, recorded, said, monkeypatch):
    class Waiting(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum() != 0)

    transformer.proj_out.__class__ = Waiting
    call = call_of(transformer)
    expected = run(transformer, **call)
    for _ in range(3):
        assert torch.equal(run(transformer, **call), expected)
    assert len(recorded) == len(said) == 1 and "capturing failed" in said[0]
    assert streams[-1] == "usual"


def test_captures_are_of_the_models_device(transformer):
    """Whichever is the current one: of another's stream a graph would be empty, and its result always the first."""
    for _ in range(3):
        run(transformer, **call_of(transformer))
    assert set(streams) == {"usual", transformer.device} and streams[-1] == "usual"


REFUSED = {
    "type": (tiny.flux, {"graphs": 1}, TypeError, "graphs must be True or False, got 1"),
    "family": (tiny.qwen_image, {}, ValueError, "graphs must be False here: whether a QwenImageTransf"),
    "cache": (tiny.flux, {"cache": "teacache"}, ValueError, "a cache chooses at every step"),
    "threshold": (tiny.flux, {"threshold": 0.5}, ValueError, "other numbers of tokens, so give ratio"),
}  # fmt: skip


@pytest.mark.parametrize("make, options, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_change_nothing(make, options, error, message):
    pipe = make()
    before, attributes = pipe.scheduler, dict(vars(pipe.transformer))
    with pytest.raises(error, match=message):
        ralu.enable(pipe, **{"graphs": True} | options)
    assert pipe.scheduler is before and vars(pipe.transformer) == attributes


def test_refusals_by_how_the_transformer_is(monkeypatch):
    pipe = tiny.flux()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            ralu.enable(pipe, graphs=True)
        assert "forward" not in vars(pipe.transformer)

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: None)
    refused("hooks on the transformer's transformer_blocks.0, as caches and offloading have")
    handle.remove()
    pipe.transformer._parallel_config = object()
    refused("the transformer is split over processes")
    pipe.transformer._parallel_config = None
    pipe.transformer.compile(backend="eager")
    refused("captures graphs of its own")
    monkeypatch.undo()
    refused("the pipeline is on cpu")
