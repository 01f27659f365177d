"""Context parallelism in two processes on the CPU, which gloo connects."""

import multiprocessing
import traceback

import pytest
import tiny
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxControlNetPipeline, FluxKontextPipeline

import ralu
from ralu.parallel import Parallel

SHORT = tiny.FAMILIES["flux"].short
LOW = 8 * 8  # tokens at half resolution
KONTEXT = {"max_area": 64 * 64, "image": torch.randn(1, 4, 20, 24, generator=torch.Generator().manual_seed(1))}
close = dict(rtol=0, atol=2e-5)


def ranked(x0, grid):
    """Score by what no two processes have the same."""
    seed = dist.get_rank() if dist.is_initialized() else 0
    return torch.rand(x0.shape[:2], generator=torch.Generator().manual_seed(seed))


# What is generated; 19 tokens are selected of 64, for which a process would be given 60.5 tokens, and so 20.
RUNS = {
    "ratio": ({"ratio": 0.3}, {"ratio": 20 / LOW}, {}),
    "text guidance": ({"ratio": 0.3}, {"ratio": 20 / LOW}, {"negative_prompt": "a cat", "true_cfg_scale": 2.0}),
    "other scores": ({"ratio": 0.3, "regions": ranked}, {"ratio": 20 / LOW, "regions": ranked}, {}),
    "all": ({"ratio": 1.0}, {"ratio": 1.0}, {}),
    "kontext": ({"ratio": 0.3}, {"ratio": 20 / LOW}, KONTEXT),
}


def generate(pipe, options, call):
    if "image" in call:
        pipe = tiny.other(FluxKontextPipeline, pipe)
    image = tiny.generate(ralu.enable(pipe, SHORT, **options), **call)
    ralu.disable(pipe)
    return image


def refused(pipe, call=None, **options):
    """The words of an error, when a pipeline is enabled or called."""
    try:
        tiny.generate(ralu.enable(pipe, SHORT, **options), **call or {})
    except ValueError as error:
        return str(error)
    finally:
        ralu.disable(pipe)
    return "nothing"


def in_parallel(rank, folder, pipe):
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        scheduler = pipe.scheduler
        net = tiny.controlnet(pipe, num_single_layers=1)
        fused = ralu.enable(tiny.flux(), SHORT, fused=True)
        for transformer in (pipe.transformer, fused.transformer):
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        images = {name: generate(pipe, options, call) for name, (options, _, call) in RUNS.items()}
        images["stock"] = tiny.generate(pipe, num_inference_steps=3)
        images["as stock"] = tiny.generate(ralu.enable(pipe, "stock-3"))
        ralu.disable(pipe)
        words = {
            "cache": refused(pipe, cache="taylorseer"),
            "ControlNet": refused(tiny.other(FluxControlNetPipeline, pipe, controlnet=net)),
            "batch": refused(pipe, {"prompt": tiny.PROMPTS[:2], "seeds": (0, 1)}),
            "text": refused(pipe, {"max_sequence_length": 15}),
            "generators": refused(pipe, {"seeds": (rank,)}),
        }
        with pytest.raises(ValueError, match=r"call enable_parallelism before ralu\.enable"):
            tiny.generate(fused)
        assert pipe.scheduler is scheduler
        torch.save((images, words), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def stock():
    return tiny.flux()


@pytest.fixture(scope="module")
def results(stock, tmp_path_factory):
    """What two processes come to, each a fork of this one: neither imports anything anew."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch was built without gloo, by which processes on CPUs exchange tensors")
    folder, fork = tmp_path_factory.mktemp("parallel"), multiprocessing.get_context("fork")
    processes = [fork.Process(target=in_parallel, args=(rank, folder, stock)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    failures = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert not failures, failures
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.serves("context parallelism", "FluxPipeline", "FluxKontextPipeline")
def test_images_are_those_of_one_process(stock, results):
    (first, _), (second, _) = results
    for name, (_, options, call) in RUNS.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], generate(stock, options, call), **close)
    assert torch.equal(first["stock"], first["as stock"])
    torch.testing.assert_close(first["stock"], tiny.generate(stock, num_inference_steps=3), **close)


@pytest.mark.refuses("context parallelism", "FluxControlNetPipeline")
def test_what_cannot_be_split_is_refused_in_all_processes(results):
    for name, words in {
        "cache": "cache must be None with context parallelism",
        "ControlNet": "splits the sequences of FLUX.1 alone, without a ControlNet. Else load it without enable_paralle",
        "batch": "generate the 2 images one at a time",
        "text": "evenly over 2 processes, but there are 15 of text",
        "generators": "latents differ between the processes: give each of them a generator with the same seed",
    }.items():
        assert [words in found[name] for _, found in results] == [True, True], (name, results[0][1][name])


@pytest.mark.refuses("context parallelism", "StableDiffusion3Pipeline")
def test_a_ring_on_a_cpu_and_other_families_are_refused(stock):
    for pipe, degrees, words in (
        (stock, {"ring_degree": 2}, "on a CPU there is no attention in a ring, give ulysses_degree"),
        (tiny.sd3("3.0"), {"ulysses_degree": 2}, "RALU splits the sequences of FLUX.1 alone"),
    ):
        before, scheduler = getattr(pipe.transformer, "_parallel_config", None), pipe.scheduler
        config = type("Config", (), {"context_parallel_config": ContextParallelConfig(**degrees)})
        pipe.transformer._parallel_config = config
        with pytest.raises(ValueError, match=f"pipe.transformer must not be context-parallel so: {words}"):
            ralu.enable(pipe)
        pipe.transformer._parallel_config = before
        assert pipe.scheduler is scheduler and not pipe.transformer._forward_pre_hooks
        ralu.enable(pipe, "stock-3")
        pipe.transformer._parallel_config = config
        with pytest.raises(ValueError, match=words):  # and at a call
            tiny.generate(pipe)
        pipe.transformer._parallel_config = before
        ralu.disable(pipe)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_as_few_more_tokens_are_selected_as_can_be_split(size):
    parallel = Parallel(size, None)
    for conditions in (0, 2, 8, 240, 241):
        served = [k for k in range(LOW + 1) if (LOW + 3 * k + conditions) % size == 0]
        for count in range(LOW + 1) if (LOW + conditions) % size == 0 else ():
            more = [k for k in served if k >= count]
            assert parallel.selected(count, LOW, conditions) == (more or served[-1:])[0]


def test_tokens_of_whole_stages_must_be_split_evenly():
    for conditions, text, words in ((0, 16, None), (1, 16, "65 at low resolution|257 at full"), (0, 9, "9 of text")):
        if words is None:
            Parallel(2, None).check(SHORT, (16, 16), conditions, text, 1)
            continue
        with pytest.raises(ValueError, match=words):
            Parallel(2, None).check(SHORT, (16, 16), conditions, text, 1)
