"""`ralu estimate` against the paper's figures, a count by hand, and real runs: operations, weights and memory."""

import gc
import json
from collections import defaultdict
from itertools import chain, product

import pytest
import tiny
import torch
from torch._C._profiler import _EventType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import ralu
from ralu.cli import main
from ralu.cost import estimate
from ralu.counting import FusedAttention, LiveBytes, Repeats, cpu_scratch
from ralu.families import FAMILIES, load
from ralu.presets import PRESETS
from ralu.schedule import region_adaptive

TEXT = 16  # T5 tokens of the tiny pipelines, see tiny.generate


def close(expected):
    return pytest.approx(expected, rel=0.005)


# ---- published figures; all count a multiply-add as two operations and leave out attention's matrix products ----


@pytest.mark.parametrize(
    ("method", "text_tokens", "ratio", "tflop"),
    [(50, 512, None, 2990), ("flux-5x", 256, 0.2, 540.47), ("flux-7x", 512, 0.1, 426.01)],
)
def test_flux_as_published(method, text_tokens, ratio, tflop):
    """FLUX.1-dev, one 1024x1024 image, text encoders, preview and final decode included."""
    cost = estimate("flux-dev", method, text_tokens=text_tokens, ratio=ratio)
    assert cost.tflop == close(tflop)
    assert cost.tflop == pytest.approx(sum(part.tflop for part in cost.parts))


@pytest.mark.parametrize(
    ("model", "full", "half", "rest"), [("flux-dev", 59.52, 19.85, 14.79), ("sd3-medium", 12.03, 3.67, 14.94)]
)
def test_forward_passes_as_published(model, full, half, rest):
    """At 1024 and at 512 pixels; FLUX with 512 text tokens, SD3 with 77 + 256 and both halves of guidance in the batch.

    The rest is the encoders and the final decode. The paper's profiler left out fused attention alone, and not the
    matrix products of the encoders' attention, which was not fused.
    """
    *encoders, low, _, _, high, final = estimate(model, ratio=0).parts
    assert high.tflop / high.calls == close(full)
    assert low.tflop / low.calls == close(half)
    assert sum(part.tflop + part.attention for part in encoders) + final.tflop == close(rest)


def test_preview_as_published():
    """Of a 1024x1024 image: 2.48 by Table S3; rounded it is 2.5 with attention and without."""
    with_preview, without = (estimate("flux-dev", ratio=0, preview=preview) for preview in (True, False))
    (preview,) = set(with_preview.parts) - set(without.parts)
    assert preview.tflop == close(2.48)
    assert with_preview.tflop - without.tflop == pytest.approx(preview.tflop)
    assert round(preview.tflop, 1) == round(preview.tflop + preview.attention, 1) == 2.5


@pytest.mark.parametrize(("model", "gibibytes"), [("flux-dev", 32.8), ("sd3-medium", 15.5)])
def test_memory_as_published(model, gibibytes):
    """Table S2, measured on an A6000 at 16 bits. An allocator is not modelled, so not within half a percent."""
    assert estimate(model, 10).peak_bytes / 2**30 == pytest.approx(gibibytes, rel=0.03)


# ---- counts of our own ----


def test_flux_by_hand():
    """A forward pass at 1024 pixels."""
    tokens, text_tokens, width = 64 * 64, 512, 3072
    both = tokens + text_tokens
    square = width**2
    double = 19 * (12 * both + 2 * 6) * square  # query, key, value, out: 4, feed-forward: 8, modulation: 6 a stream
    single = 38 * (12 * both + 3) * square
    inputs = (64 * tokens + 4096 * text_tokens) * width
    vectors = 2 * (256 + width) * width + (768 + width) * width  # time and guidance, pooled text
    outputs = (2 * width + 64 * tokens) * width
    part = estimate("flux-dev", 3).parts[2]
    assert (part.calls, part.tokens) == (3, tokens)
    assert part.tflop * 1e12 == pytest.approx(3 * 2 * (double + single + inputs + vectors + outputs), rel=1e-12)
    assert part.attention * 1e12 == pytest.approx(3 * 57 * 4 * both**2 * width, rel=1e-12)


GUIDED = ("guided", "flux2", "qwen", "z")
PIPELINES = {
    "flux": tiny.flux,
    "guided": lambda: tiny.flux(guidance_embeds=True),
    "flux2": tiny.flux2,
    "qwen": tiny.qwen_image,
    "z": tiny.z_image,
} | {f"sd3-{version}": lambda version=version: tiny.sd3(version) for version in tiny.SD3}


@pytest.mark.parametrize(
    ("name", "method", "height"),
    [
        *product(PIPELINES, ["stock", "preset"], [48]),
        ("flux", "pixels", 48),
        ("sd3-3.0", "pixels", 52),  # 13 rows of tokens
        ("flux", "preset", 52),
    ],
)
@pytest.mark.serves(
    "estimate equals the counted run",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "Flux2KleinPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
)
def test_operations_of_a_real_run(name, method, height):
    """A whole run of a pipeline with real weights, prompts to images, two in a batch."""
    pipe, call = PIPELINES[name](), {}
    if name == "guided":
        call = {"true_cfg_scale": 2.0, "negative_prompt": tiny.PROMPTS[:2]}
    if method == "stock":
        call["num_inference_steps"] = run = 2
    else:
        run = tiny.FAMILIES["sd3" if name.startswith("sd3") else "flux"].short.replace(steps=(2, 1, 1), ratio=0.3)
        if method == "pixels":
            run = region_adaptive(run.steps, run.ends, run.shifts, run.c, run.ratio, upsampler="pixels")
        ralu.enable(pipe, run)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.generate(pipe, tiny.PROMPTS[:2], (0, 1), height=height, width=64, **call)
    counts = counter.get_flop_counts()

    text_tokens = TEXT if pipe.text_encoder is not None else 5
    options = {"height": height, "width": 64, "text_tokens": text_tokens, "batch": 2, "guided": name in GUIDED or None}
    cost = estimate(pipe, run, **options)
    attention = counts["Global"][torch.ops.aten.bmm]
    assert cost.attention * 1e12 == pytest.approx(attention, rel=1e-12)
    assert cost.total * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-12)
    of_transformer = [part for part in cost.parts if "resolution" in part.name]
    transformer = sum(counts[type(pipe.transformer).__name__].values())
    assert sum(part.tflop + part.attention for part in of_transformer) * 1e12 == pytest.approx(transformer, rel=1e-12)


def storage_bytes(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(tensor.nbytes for part in modules for tensor in chain(part.parameters(), part.buffers()))


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_of_a_real_pipeline(name):
    pipe = PIPELINES[name]()
    assert estimate(pipe, 1, height=64, width=64).weight_bytes == storage_bytes(pipe)
    pipe.to(torch.bfloat16)
    assert estimate(pipe, 1, height=64, width=64).weight_bytes == storage_bytes(pipe)


@pytest.mark.parametrize(
    ("model", "billions"), [("flux2-dev", 24), ("flux2-klein-4b", 4), ("flux2-klein-9b", 8.2), ("qwen-image", 8.3)]
)
def test_language_models_that_encode_prompts(model, billions):
    """Mistral Small, Qwen3-4B and 8B and Qwen2.5-VL-7B by their cards, which run without what they see images with."""
    family = next(load(name) for name, entry in FAMILIES.items() if model in entry.published)
    kind, config = family.encoders_of(family.published[model])["text_encoder"]
    with torch.device("meta"):
        encoder = kind(kind.config_class(**config))
    assert sum(weight.numel() for weight in encoder.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)
    seeing = ("visual", "vision", "multi_modal")
    matrices = [
        module.weight.numel()
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in seeing)
    ]
    text, *_, low, mixed, full, _ = estimate(model, preview=False, text_tokens=64, dtype=torch.bfloat16).parts
    assert text.tokens == 64 and text.tflop * 1e12 == pytest.approx(text.calls * 2 * 64 * sum(matrices), rel=1e-9)
    heads = [
        module.q_proj.out_features
        for name, module in encoder.named_modules()
        if hasattr(module, "q_proj") and not any(part in name for part in seeing)
    ]
    rotary = 1e-4  # in some releases of transformers the angles are a product too
    assert text.attention * 1e12 == pytest.approx(text.calls * 4 * 64**2 * sum(heads), rel=rotary)
    assert (full.tokens, low.tokens) == (4096, 1024) and low.tflop / low.calls < mixed.tflop / mixed.calls


def test_every_published_model():
    """Numbers in the transformers' weight files in 10^9, as their model cards round them."""
    cards = {"flux-dev": 12, "flux-schnell": 12, "sd3-medium": 2, "sd3.5-medium": 2.5, "sd3.5-large": 8.1}
    cards |= {"flux2-dev": 32, "flux2-klein-4b": 4, "flux2-klein-9b": 9, "qwen-image": 20, "z-image-turbo": 6}
    configs = {name: (load(family).transformer, config)
               for family in FAMILIES for name, config in load(family).published.items()}  # fmt: skip
    assert cards.keys() == configs.keys() == {name for entry in FAMILIES.values() for name in entry.published}
    for name, billions in cards.items():
        kind, config = configs[name]
        with torch.device("meta"):
            stored = kind.from_config(config).state_dict()
        assert sum(weight.numel() for weight in stored.values()) / 1e9 == pytest.approx(billions, rel=0.05)


class Operations(TorchDispatchMode):
    """Names the spans of operations in a profile, and keeps the bound of each one's scratch."""

    def __init__(self):
        super().__init__()
        self.bounds = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with record_function("operation"):
            result = func(*args, **(kwargs or {}))
        operands, results = ([x for x in tree_leaves(t) if torch.is_tensor(x)] for t in ((args, kwargs), result))
        self.bounds.append(cpu_scratch(func, operands, results, torch.get_num_threads()))
        return result


def measured(run):
    """Measure what PyTorch's CPU allocator gives: (peak, peak of tensors, [(scratch, its bound) of every operation]).

    Scratch is what an operation takes and gives back; tensors are all else.
    """
    run()
    gc.collect()
    with Operations() as operations, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, spans = [], []

    def walk(event, span):
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, span))
        if event.name == "operation" and span is None:
            spans.append(span := len(spans))
        for child in event.children:
            walk(child, span)

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        walk(event, None)
    assert len(spans) == len(operations.bounds)
    events.sort(key=lambda event: event[0])
    scratch, given = set(), {}
    for i, (_, address, size, span) in enumerate(events):
        if size > 0:
            given[address] = i
        elif (taken := given.pop(address, None)) is not None and span is not None and events[taken][-1] == span:
            scratch |= {taken, i}
    now, peak = defaultdict(int), defaultdict(int)
    for i, (_, _, size, span) in enumerate(events):
        for key in ("all", span if i in scratch else "tensors"):
            now[key] += size
            peak[key] = max(peak[key], now[key])
    return peak["all"], peak["tensors"], [(peak[span], operations.bounds[span]) for span in spans]


def random_like(tree, dtype):
    return tree_map(lambda x: torch.randn_like(x, dtype=dtype) if torch.is_tensor(x) else x, tree)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "size", "dtype", "threads"),
    [
        ("flux", 256, torch.float32, 1),
        ("guided", 128, torch.float32, 2),
        ("guided", 128, torch.bfloat16, 1),
        ("sd3-3.0", 96, torch.float32, 2),
        ("sd3-3.0", 96, torch.bfloat16, 2),
        ("sd3-3.5-medium", 192, torch.float32, 1),
    ],
    indirect=["threads"],
)
def test_memory_of_real_forward_passes(name, size, dtype, threads):
    """Of a transformer and a VAE with real weights, called with new tensors of a pipeline's own shapes."""
    pipe, inputs = PIPELINES[name](), {}
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    latents = tiny.generate(pipe, height=size, width=size, num_inference_steps=1, output_type="latent")
    if not name.startswith("sd3"):
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    for module in (pipe.transformer, pipe.vae):
        torch.nn.Module.to(module, dtype)
    *_, transformer, vae = estimate(pipe, 1, height=size, width=size, text_tokens=TEXT, dtype=dtype).parts
    for part, run in (
        (transformer, lambda: pipe.transformer(**random_like(inputs, dtype))),
        (vae, lambda: pipe.vae.decode(random_like(latents, dtype))),
    ):
        with torch.no_grad():
            peak, tensors, operations = measured(run)
        assert part.peak_bytes == pytest.approx(tensors, rel=0.005)
        for scratch, bound in operations:
            assert scratch <= bound + 16  # of a number that becomes a tensor, in two dtypes
        assert max(scratch for scratch, _ in operations) <= part.scratch_bytes
        assert peak <= part.peak_bytes + part.scratch_bytes


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("width", [8, 64])
def test_scratch_of_attention(width, threads):
    """In float32 a thread's share is all there is."""
    query = torch.randn(3, 4, 800, width)
    _, _, operations = measured(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    share = max(scratch for scratch, _ in operations)
    assert share == max(bound for _, bound in operations) - 4 * query.nbytes - 4 * query[..., 0].numel()
    assert share % threads == 0


@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scratch_of_products(dtype, threads):
    for rows, depth, columns in ((2, 256, 32), (40, 256, 64), (40, 64, 256), (2, 512, 16), (2, 1024, 32)):
        x, weight = torch.randn(rows, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
        _, _, operations = measured(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight, weight[:, 0]))
        for scratch, bound in operations:
            assert scratch <= bound


@pytest.mark.parametrize(
    ("name", "size", "batch", "output"), [("flux", 256, 1, "pt"), ("sd3-3.5-medium", 192, 2, "latent")]
)
def test_memory_of_a_real_run(name, size, batch, output):
    """With a step in each stage. What a pipeline keeps between its parts (latents, prompts) comes on top."""
    schedule = PRESETS["flux-5x"].replace(steps=(1, 1, 1))
    pipe = ralu.enable(PIPELINES[name](), schedule)
    prompts, seeds = tiny.PROMPTS[:batch], range(batch)
    peak, tensors, _ = measured(lambda: tiny.generate(pipe, prompts, seeds, size, size, output_type=output))
    cost = estimate(pipe, schedule, height=size, width=size, text_tokens=TEXT, batch=batch)
    expected = max(part.peak_bytes for part in (cost.parts if output == "pt" else cost.parts[:-1]))
    assert expected <= tensors <= 1.1 * expected  # latents are not decoded
    assert peak <= tensors + cost.scratch_bytes


# ---- what can be asked ----


def test_models_in_every_form(tmp_path):
    config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1", "guidance_embeds": True}
    assert estimate(config, 1) == estimate("flux-dev", 1)
    for name, pipe in (("flux", tiny.flux()), ("sd3", tiny.sd3())):
        pipe.save_pretrained(tmp_path / name)
        of_pipe = estimate(pipe, height=64, width=64)
        assert of_pipe == estimate(tmp_path / name, height=64, width=64, dtype=torch.float32)
        pipe.transformer.register_to_config(quantization_config=object())  # not looked at
        assert of_pipe == estimate(ralu.enable(pipe), height=64, width=64)
    assert estimate("mini-sd3", height=256, width=256).parts[0].tokens == 16


def test_schedules_and_defaults():
    assert (
        estimate(method="flux-5x") == estimate() == estimate(method=PRESETS["flux-5x"], text_tokens=512, guided=False)
    )
    assert estimate("sd3-medium", 28, text_tokens=256, guided=True) == estimate("sd3-medium", 28)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"model": "flux-pro"}, "flux-pro"),
        ({"model": {"_class_name": "UNet2DModel"}}, "UNet2DModel"),
        ({"model": {"num_layers": 2}}, "None"),
        ({"method": "sd3-2x"}, "flux-7x"),
        ({"method": 0}, "at least 1, got 0"),
        ({"method": 4, "ratio": 0.2}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"batch": 0}, "batch"),
        ({"text_tokens": 0}, "text_tokens"),
        ({"height": 1032}, "16, got 1032x1024"),
        ({"method": 4, "width": 1032}, "16, got 1024x1032"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words):
        estimate(**call)


def test_the_name_is_the_function():
    assert ralu.estimate is estimate
    assert "estimate" in ralu.__all__


# ---- the command ----


def test_tables(capsys):
    arguments = "--model mini-flux --methods stock-50 flux-7x --ratio .1 --batch 2 --dtype float32"
    assert main(["estimate", *arguments.split()]) == 0
    title, *tables = capsys.readouterr().out.split("\n\n")
    assert title == "mini-flux, 256×256 pixels, 2 in a batch, float32"
    options = {"height": 256, "width": 256, "text_tokens": 32, "batch": 2, "dtype": torch.float32}
    stock, fast = estimate(ralu.mini_path(), 50, **options), estimate(ralu.mini_path(), "flux-7x", ratio=0.1, **options)
    assert tables[0] == f"stock-50\n{stock}"
    rest = f"stock-50 takes {stock.tflop / fast.tflop:.2f} times as many operations, with attention "
    assert tables[1] == f"flux-7x\n{fast}\n{rest}{stock.total / fast.total:.2f} times\n"

    _, *rows, weights, total = str(fast).splitlines()
    for row, part in zip(rows, fast.parts, strict=True):
        name, *numbers = row.rsplit(maxsplit=6)
        assert name == part.name
        shown = part.calls, part.tokens, part.tflop, part.tflop + part.attention
        shown += part.peak_bytes / 2**30, part.scratch_bytes / 2**30
        assert list(map(float, numbers)) == pytest.approx(shown, abs=0.005)
    assert float(weights.removeprefix("weights")) == pytest.approx(fast.weight_bytes / 2**30, abs=0.005)
    sums = fast.tflop, fast.total, fast.peak_bytes / 2**30, fast.scratch_bytes / 2**30
    assert list(map(float, total.removeprefix("total").split())) == pytest.approx(sums, abs=0.005)


def test_json(tmp_path, capsys):
    pipe = tiny.sd3()
    pipe.save_pretrained(tmp_path)
    options = "--size 96x64 --text-tokens 16 --no-guidance --no-preview --dtype float32 --json"
    assert main(["estimate", "--model", str(tmp_path), *options.split()]) == 0
    printed = json.loads(capsys.readouterr().out)
    methods = printed.pop("methods")
    assert printed == {"model": str(tmp_path), "height": 64, "width": 96, "batch": 1, "dtype": "float32"}
    assert list(methods) == ["stock-28", "sd3-2x"]
    options = {"height": 64, "width": 96, "text_tokens": 16, "guided": False, "preview": False}
    for name, method in (("stock-28", 28), ("sd3-2x", "sd3-2x")):
        cost = estimate(pipe, method, **options)
        assert methods[name] == json.loads(json.dumps(cost.to_dict()))
        total = sum(part["tflop"] + part["attention"] for part in methods[name]["parts"])
        assert methods[name]["total"] == pytest.approx(total)
        activations = max(part["peak_bytes"] for part in methods[name]["parts"])
        assert methods[name]["peak_bytes"] == methods[name]["weight_bytes"] + activations


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model flux-pro", "neither flux-dev, nor"),
        ("--methods stock", "stock-50"),
        ("--methods sd3-2x", "flux-5x, flux-7x, bottleneck-flux-5x"),
        ("--size 1000", "divide by 16"),
        ("--batch 0", "'0'"),
    ],
)
def test_mistakes_of_the_command(arguments, words, capsys):
    assert main(["estimate", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and words in printed.err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:\n  ralu estimate" in text and "None" not in text


# ---- equal blocks, which are run once ----


class Block(torch.nn.Module):
    """What a kind of block does that its neighbours do not, or with what is not its own."""

    def __init__(self, kind, i):
        super().__init__()
        self.project = torch.nn.Linear(8, 8 + (kind == "wider" and 4 * i))
        self.kind, self.copies, self.kept, self.calls = kind, 1 + (kind == "attribute") * i, [], 0

    def forward(self, x, y, scale=1.0):
        self.calls += 1
        large = torch.cat([self.project(x)] * 5 * self.copies)
        if self.kind == "keeps":
            self.kept.append(x * scale)
        if self.kind == "in place":
            return x.add_(large[:4, :, :8]), y
        if self.kind == "argument back":
            return y, x
        both = torch.cat([large[:4, :, :8] * scale, y.repeat(1 + (self.kind == "longer"), 1, 1)])
        return both[:4], both[4:]


class Blocks(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layers = kind, torch.nn.ModuleList(Block(kind, i) for i in range(4))

    def forward(self, x):
        x, y = x.split(4)  # as blocks give them back
        for i, layer in enumerate(self.layers):
            x, y = layer(x, y=y.mT.contiguous().mT if self.kind == "strides" and i == 2 else y,
                         scale=2.0 if self.kind == "numbers" and i else 1.0)  # fmt: skip
        return x @ y[:4].mT


def counts(run, module, repeats):
    """Operations, and bytes: the peak, those of what is left, scratch."""
    counter, memory = FlopCounterMode(display=False), LiveBytes(1)
    with torch.device("meta"), torch.no_grad(), FusedAttention(), counter, memory:
        if repeats:
            with Repeats(counter, memory).of(module):
                left = run()
        else:
            left = run()
    shapes = [(x.shape, x.stride(), x.dtype) for x in tree_leaves(left) if torch.is_tensor(x)]
    return (
        {name: dict(ops) for name, ops in counter.flop_counts.items()},
        memory.peak,
        memory.now,
        memory.scratch,
        shapes,
    )


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("equal", 1), ("numbers", 2), ("strides", 2), ("attribute", 4), ("wider", 4), ("longer", 4), ("keeps", 4),
     ("in place", 4), ("argument back", 4)],
)  # fmt: skip
def test_only_equal_blocks_are_run_once(kind, runs):
    """Equal in what they are, are given and leave behind."""
    with torch.device("meta"):
        module, x = Blocks(kind), torch.empty(8, 3, 8)
    expected = counts(lambda: module(x * 1), module, False)
    assert [layer.calls for layer in module.layers] == [1] * 4
    assert counts(lambda: module(x * 1), module, True) == expected
    assert sum(layer.calls for layer in module.layers) == 4 + runs
    assert not any("forward" in vars(layer) for layer in module.layers)


@pytest.mark.parametrize("model", ["flux-dev", "sd3-medium", "sd3.5-medium"])
def test_equal_blocks_of_published_models(model):
    """At full width, with three blocks of each kind; SD3.5-medium has two kinds, and SD3's last one is its own."""
    family = next(load(name) for name, entry in FAMILIES.items() if model in entry.published)
    config = family.published[model] | {"num_layers": 4} | ({"num_single_layers": 3} if "flux" in model else {})
    config |= {"dual_attention_layers": (0, 1)} if model == "sd3.5-medium" else {}
    with torch.device("meta"):
        module = family.transformer.from_config(config).bfloat16()
    given = module, torch.bfloat16, 2, 1636, 512
    assert counts(lambda: family.dummy_call(*given), module, True) == counts(
        lambda: family.dummy_call(*given), module, False
    )


# ---- caches ----


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux", "stock-6+delta-dit(interval=3,num_blocks=3)"),
        ("flux", "stock-6+delta-dit(interval=5,variant=flux-research)"),
        ("flux", "stock-6+teacache(delta=0.3)"),
        ("flux", "flux-5x(regions=gradient)+taylorseer(interval=2,warmup=1)"),
        ("guided", "stock-4+delta-dit"),
        ("sd3-3.5-medium", "sd3-2x(regions=gradient)+delta-dit(num_blocks=1,boundary=0.6)"),
        ("sd3-3.0", "stock-5+taylorseer(interval=2)"),
        ("flux2", "stock-4+taylorseer(interval=2,warmup=1)"),
        ("qwen", "stock-4+taylorseer(interval=2,warmup=1)"),
    ],
)
def test_operations_of_a_real_run_with_a_cache(name, method):
    call = {"output_type": "latent"}
    if name == "guided":
        call |= {"true_cfg_scale": 2.0, "negative_prompt": tiny.PROMPTS[:2]}
    pipe = ralu.enable(PIPELINES[name](), method)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.generate(pipe, tiny.PROMPTS[:2], (0, 1), **call)
    counts = counter.get_flop_counts()[type(pipe.transformer).__name__]
    text_tokens = TEXT if pipe.text_encoder is not None else 5
    options = {"height": 64, "width": 64, "text_tokens": text_tokens, "batch": 2, "guided": name in GUIDED or None}
    cost = estimate(pipe, method, **options)
    parts = [part for part in cost.parts if "resolution" in part.name]
    assert sum(part.attention for part in parts) * 1e12 == pytest.approx(counts[torch.ops.aten.bmm], rel=1e-12)
    assert sum(part.tflop + part.attention for part in parts) * 1e12 == pytest.approx(sum(counts.values()), rel=1e-12)
    stock = estimate(pipe, method.partition("+")[0], **options)
    for part, before in zip(parts, (part for part in stock.parts if "resolution" in part.name), strict=True):
        assert part.peak_bytes > before.peak_bytes and part.tflop < before.tflop
    assert cost.at_most is stock.at_most is False


@pytest.mark.parametrize(
    ("model", "ratio", "rows"),
    [
        (
            "flux-dev",
            None,
            {
                "stock-45+teacache(delta=0.99)": 610.59,
                "stock-30+teacache(delta=0.99)": 431.83,
                "stock-50+taylorseer(interval=11)": 431.74,
                "stock-50+delta-dit(interval=5,num_blocks=53)": 772.1,
            },
        ),
        (
            "flux-dev",
            0.3,
            {
                "flux-5x+delta-dit": 422.56,
                "flux-5x+taylorseer(interval=3)": 410.70,
                "flux-5x+taylorseer(interval=3,warmup=2)": 331.38,
            },
        ),
        (
            "sd3-medium",
            None,
            {"stock-28+delta-dit(num_blocks=24)": 183.46, "stock-28+taylorseer(interval=4)": 123.49},
        ),
    ],
)
def test_caches_as_published(model, ratio, rows):
    """Tables 1 and 3. Of TeaCache's steps is counted what is expected; Delta-DiT's blocks the paper does not say."""
    found = {method: estimate(model, method, ratio=ratio).tflop for method in rows}
    assert found == pytest.approx(rows, rel=0.008)


def test_what_a_cache_saves_may_not_be_known(tmp_path, capsys):
    """SD3's TeaCache has no polynomial before it is calibrated."""
    tiny.sd3().save_pretrained(tmp_path)
    arguments = ["estimate", "--model", str(tmp_path), "--size", "64", "--methods", "stock-4", "stock-4+teacache"]
    assert main(arguments) == 0
    _, stock, cached = capsys.readouterr().out.split("\n\n")
    title, *rows, ratio = cached.splitlines()
    assert title == "stock-4+teacache (at most: what the cache saves is not known)"
    assert rows == stock.splitlines()[1:] and "takes 1.00 times" in ratio


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        ("sd3-medium", "stock-4+delta-dit(variant=flux-research)", "variant must be 'paper' for SD3Transformer2DModel"),
        ("sd3-medium", "stock-4+delta-dit(num_blocks=25)", "num_blocks must be at most 24"),
        ("flux-dev", "stock-4+teacache(coefficients=nowhere.json)", "coefficients must be auto, identity or a file"),
    ],
)
def test_a_cache_that_does_not_fit(model, method, words):
    with pytest.raises(ValueError, match=words):
        estimate(model, method)


# ---- ToCa and RAS ----


def test_toca_by_hand():
    """The paper's setting for FLUX: ten full steps of 40, and steps without attention that compute a tenth of MLPs.

    Each row of a block's MLPs costs 8 or 9 D² multiply-adds, and modulation 12 or 3 D² a block. How many rows there are
    is rounded down in a run.
    """
    full, few = (estimate("flux-dev", method) for method in ("stock-10", "stock-40+toca(interval=5)"))
    tokens, text_tokens, width = 64 * 64, 512, 3072
    both, square = tokens + text_tokens, width**2
    doubles = sum(12 + 8 * both * 0.1 * (1.5 - layer / 27) * 0.4 for layer in range(19))
    singles = sum(3 + 9 * both * 0.1 * (1.5 - layer / 27) * 1.6 for layer in range(38))
    vectors = 2 * (256 + width) * width + (768 + width) * width
    ends = (64 * tokens + 4096 * text_tokens + 2 * width + 64 * tokens) * width
    part, before = few.parts[2], full.parts[2]
    step = 2 * ((doubles + singles) * square + vectors + ends) / 1e12
    assert part.tflop == pytest.approx(before.tflop + 30 * step, rel=1e-9)
    scored = 8 * 57 * 2 * both**2 * width / 1e12  # queries times keys once more, where scores are used
    assert part.attention == pytest.approx(before.attention + scored, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "steps", "method"),
    [("flux-dev", 50, "stock-40+toca(interval=5)"), ("sd3-medium", 28, "stock-28+toca(interval=3)")],
)
def test_toca_holds_at_most_a_tenth_more_than_stock(model, steps, method):
    stock, cached = estimate(model, steps), estimate(model, method)
    assert stock.peak_bytes < cached.peak_bytes < 1.1 * stock.peak_bytes


@pytest.mark.parametrize(("ratio", "tflop"), [(0.32, 185.14), (0.05, 118.99)])
def test_ras_as_published(ratio, tflop):
    """SD3 at 1024 pixels, 22 sparse steps of 28."""
    assert estimate("sd3-medium", f"stock-28+ras(ratio={ratio})").tflop == close(tflop)


@pytest.mark.parametrize("name", ["flux", "sd3-3.5-medium"])
def test_operations_of_a_real_run_under_ras(name):
    pipe = PIPELINES[name]()
    method = f"{ralu.enable(pipe).scheduler.config.preset}+ras(ratio=0.3,start=2,resets=none)"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.generate(ralu.enable(pipe, method), height=48, width=64)
    cost = estimate(pipe, method, height=48, width=64, text_tokens=TEXT)
    transformer = sum(counter.get_flop_counts()[type(pipe.transformer).__name__].values())
    counted = sum(part.tflop + part.attention for part in cost.parts if "resolution" in part.name)
    assert counted * 1e12 == pytest.approx(transformer, rel=1e-12)
