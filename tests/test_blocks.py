"""Fused blocks of FLUX and SD3 against the stock ones, under the hooks of diffusers, and in batches of any lengths."""

import sys
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from conftest import assert_as_exact_as
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import ralu
from ralu import blocks, families
from ralu.regions import gradient
from ralu_kernels import _backend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import blocks as benchmark
import record

PROMPTS = tiny.PROMPTS
FUSED = {kind: block for name in families.FAMILIES for kind, block in families.load(name).fused_blocks.items()}
MODELS = ["flux", *tiny.SD3]
close = dict(rtol=0, atol=1e-5)


def make(model):
    return tiny.flux() if model == "flux" else tiny.sd3(model)


def short(model):
    return tiny.FAMILIES["flux" if model == "flux" else "sd3"].short


def inputs(model, transformer, batch=2, text=7, dtype=torch.float32):
    """Arguments of a transformer call on a 4x6 grid."""
    sample = (24, 16) if model == "flux" else (4, 8, 12)
    config = transformer.config
    given = {
        "hidden_states": torch.randn(batch, *sample), "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
    }  # fmt: skip
    given = {name: value.to(dtype) for name, value in given.items()}
    if model == "flux":
        given |= {"img_ids": torch.rand(24, 3) * 6, "txt_ids": torch.zeros(text, 3)}
    return given


@torch.no_grad()
def run(transformer, given):
    return transformer(**given, return_dict=False)[0]


class Calls(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def warnings(monkeypatch):
    """Messages said once, though another test said them before."""
    said = []
    monkeypatch.setattr(blocks.logger, "warning_once", said.append)
    return said


# ---- equal to stock ----


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.serves("fused blocks", "FluxPipeline", "StableDiffusion3Pipeline")
def test_transformers_equal_stock(model):
    transformer = make(model).transformer
    expected = run(transformer, given := inputs(model, transformer))
    assert ralu.fuse(transformer) is transformer
    with Calls() as calls:
        actual = run(transformer, given)
    torch.testing.assert_close(actual, expected, **close)
    assert calls.names.count("pack_qkv") == {"flux": 4, "3.5-medium": 3 + 2}.get(model, 3)
    assert {"modulate", "gated_add", "gated_add_modulate"} < set(calls.names)
    assert calls.names.count("native_layer_norm") == 1  # behind the blocks
    first = [given.pop(name) for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")]
    with torch.no_grad():
        assert torch.equal(transformer(*first, **given).sample, actual)


@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_the_first_block_checks_for_all(model):
    """Of each class; the others compute the same, bit for bit, with checks and without."""
    transformer = ralu.fuse(make(model).transformer)
    mine = [module for module in transformer.modules() if type(module) in FUSED]
    firsts = [next(block for block in mine if type(block) is kind) for kind in {type(block) for block in mine}]
    for block in mine:
        for attention in blocks._attentions(block):
            assert attention.processor.checked == (block in firsts)
    given = inputs(model, transformer)
    unchecked = run(transformer, given)
    short = {"img_ids": torch.rand(20, 3)} if model == "flux" else {"timestep": torch.rand(1)}
    if model != "flux":
        short["pooled_projections"] = given["pooled_projections"][:1]
    with pytest.raises(ValueError, match=r"rotary\[0\].shape" if model == "flux" else "shift.shape"):
        run(transformer, given | short)
    for block in mine:
        for attention in blocks._attentions(block):
            attention.processor.checked = True
    assert torch.equal(run(transformer, given), unchecked)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_as_exact_as_stock(model):
    transformer = make(model).transformer.bfloat16()
    given = inputs(model, transformer)
    half = {name: value if "ids" in name else value.bfloat16() for name, value in given.items()}
    stock, actual = run(transformer, half), run(ralu.fuse(transformer), half)
    oracle = run(ralu.unfuse(transformer).float(), {name: value.float() for name, value in half.items()})
    assert_as_exact_as(actual, stock, oracle)


WIDE = {  # as in the checkpoints' configurations: (class, arguments, heads)
    "FLUX.1-dev double": (FluxTransformerBlock, (3072, 24, 128), {}),
    "FLUX.1-dev single": (FluxSingleTransformerBlock, (3072, 24, 128), {}),
    "SD3-medium": (JointTransformerBlock, (1536, 24, 64), {}),
    "SD3-medium, last": (JointTransformerBlock, (1536, 24, 64), {"context_pre_only": True}),
    "SD3.5-medium": (JointTransformerBlock, (1536, 24, 64), {"qk_norm": "rms_norm", "use_dual_attention": True}),
    "SD3.5-large": (JointTransformerBlock, (2432, 38, 64), {"qk_norm": "rms_norm"}),
}


def wide_block(kind, arguments, options, dtype):
    with torch.device("meta"):
        block = kind(*arguments, **options)
    block.to_empty(device="cpu").to(dtype)
    values = torch.randn(2**20 - 1)  # again and again, which is faster; no row is as long
    with torch.no_grad():
        for name, weight in block.named_parameters():
            for part in weight.view(-1).split(len(values)):
                part.copy_(values[: len(part)] * weight.shape[-1] ** -0.5)
            if "norm_" in name:  # RMS norms
                weight.abs_().add_(0.5)
    return block.eval()


def block_inputs(kind, width, size, batch, dtype):
    given = {"hidden_states": (batch, 6, width), "encoder_hidden_states": (batch, 3, width), "temb": (batch, width)}
    given = {name: torch.randn(shape).to(dtype) for name, shape in given.items()}
    if kind is not JointTransformerBlock:
        angles = torch.rand(9, size // 2).repeat_interleave(2, dim=1) * 6
        given["image_rotary_emb"] = angles.cos(), angles.sin()
    return given


@torch.no_grad()
def in_one(block, given, fused):
    """Run a block, stock or fused; its outputs side by side."""
    if fused:
        for attention in blocks._attentions(block):
            attention.set_processor(FUSED[type(block)].processor(attention.processor))
    try:
        text, image = FUSED[type(block)].forward(block, **given) if fused else block(**given)
    finally:
        for attention in blocks._attentions(block):
            if fused:
                attention.set_processor(attention.processor.stock)
    return image if text is None else torch.cat([text, image], dim=1)


@pytest.mark.parametrize("kind, arguments, options", WIDE.values(), ids=WIDE.keys())
def test_full_width_blocks_equal_stock(kind, arguments, options):
    """bfloat16's error is against float32 with the same weights and inputs."""
    width, _, size = arguments
    block = wide_block(kind, arguments, options, torch.bfloat16)
    given = block_inputs(kind, width, size, 1, torch.bfloat16)
    stock, actual = (in_one(block, given, fused) for fused in (False, True))
    exact = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    block.float()
    oracle = in_one(block, exact, False)
    assert_as_exact_as(actual, stock, oracle)
    torch.testing.assert_close(in_one(block, exact, True), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["flux", "3.5-large"])  # diffusers itself cannot for SD3.5-medium's second attention
def test_projections_in_one(model):
    transformer = make(model).transformer
    expected = run(transformer, given := inputs(model, transformer))
    transformer.fuse_qkv_projections()
    assert blocks.is_fused(ralu.fuse(transformer))
    torch.testing.assert_close(run(transformer, given), expected, **close)


def test_chunked_feed_forward():
    transformer = make("3.0").transformer
    expected = run(transformer, given := inputs("3.0", transformer, text=32))
    transformer.enable_forward_chunking(8, dim=1)
    seen = []
    transformer.transformer_blocks[0].ff.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(run(ralu.fuse(transformer), given), expected, **close)
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("kind", [FluxTransformerBlock, FluxSingleTransformerBlock])
def test_half_precision_clips_as_stock(kind):
    block = wide_block(kind, (32, 2, 16), {}, torch.float16)
    norm, last = (
        (block.norm, block.proj_out)
        if kind is FluxSingleTransformerBlock
        else (block.norm1_context, block.ff_context.net[2])
    )
    for weight in (norm.linear.weight, norm.linear.bias, last.weight):
        nn.init.zeros_(weight)
    nn.init.constant_(norm.linear.bias[-32:], 500), nn.init.constant_(last.bias, 500)  # the last gate, and its branch
    given = block_inputs(kind, 32, 16, 2, torch.float16)
    for fused in (False, True):
        assert in_one(block, given, fused)[:, :3].unique().tolist() == [65504]


@pytest.mark.triton
@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_triton_kernels_under_whole_transformers(model, device, monkeypatch):
    """With the strides that the blocks give them, in a ragged batch."""
    monkeypatch.setitem(_backend._ORDER, "cpu", ("triton", "reference"))  # for the interpreter
    transformer = make(model).transformer.to(device)
    given = {name: value.to(device) for name, value in inputs(model, transformer).items()}
    mask = torch.arange(24, device=device) < torch.tensor([[24], [15]], device=device)
    given["joint_attention_kwargs"] = {"image_mask": mask}
    ralu.fuse(transformer)
    actual = run(transformer, given)
    monkeypatch.setitem(_backend._ORDER, "cpu", ("reference",))
    monkeypatch.setitem(_backend._ORDER, "cuda", ("reference",))
    torch.testing.assert_close(actual, run(transformer, given), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_calls_wait_for_nothing(model):
    transformer = ralu.fuse(make(model).transformer.to("cuda", torch.bfloat16))
    given = {name: value.to("cuda") for name, value in inputs(model, transformer, dtype=torch.bfloat16).items()}
    mask = torch.arange(24, device="cuda") < torch.tensor([[24], [15]], device="cuda")
    given["joint_attention_kwargs"] = {"image_mask": mask}
    first = run(transformer, given)  # which lays the sequences out
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(transformer, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


# ---- what is put on transformers ----


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize(
    "cache",
    [FirstBlockCacheConfig(threshold=0.3), TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2)],
    ids=["first block", "TaylorSeer"],
)
def test_caches_wrap_the_fused_blocks(cache, fused_first):
    pipe = tiny.flux()
    transformer, call = pipe.transformer, {"num_inference_steps": 6}
    plain = tiny.generate(pipe, **call)
    transformer.enable_cache(cache)
    cached = tiny.generate(pipe, **call)
    assert (cached - plain).abs().max() > 1e-4
    if fused_first:
        transformer.disable_cache()
        ralu.fuse(transformer)
        transformer.enable_cache(cache)
    else:
        ralu.fuse(transformer)
    with Calls() as calls:
        torch.testing.assert_close(tiny.generate(pipe, **call), cached, **close)
    assert 0 < calls.names.count("pack_qkv") < 6 * 4  # some were reused
    if fused_first:
        transformer.disable_cache()
        torch.testing.assert_close(tiny.generate(pipe, **call), plain, **close)
        ralu.unfuse(transformer)
    else:
        ralu.unfuse(transformer)
        assert torch.equal(tiny.generate(pipe, **call), cached)
        transformer.disable_cache()
    assert torch.equal(tiny.generate(pipe, **call), plain)


@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_lora_and_its_scale(model, fused_first):
    torch.manual_seed(1)
    transformer = make(model).transformer
    given = inputs(model, transformer)
    plain = run(transformer, given)
    if fused_first:
        ralu.fuse(transformer)
    targets = ["to_q", "add_k_proj", "to_out.0", "norm1.linear", "net.0.proj", "proj_mlp"]
    transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    scaled = given | {"joint_attention_kwargs": {"scale": 0.5}}
    expected = run(ralu.unfuse(transformer), scaled)
    ralu.fuse(transformer)
    torch.testing.assert_close(run(transformer, scaled), expected, **close)
    assert (expected - plain).abs().max() > 1e-3
    nothing = given | {"joint_attention_kwargs": {"scale": 0.0}}
    torch.testing.assert_close(run(transformer, nothing), plain, **close)


class Quantised(nn.Module):
    """A linear layer with nothing but a forward, as far as anybody can see."""

    def __init__(self, linear):
        super().__init__()
        self.packed = (linear.weight.detach() * 64).round(), linear.bias.detach()

    def forward(self, x):
        return nn.functional.linear(x, self.packed[0] / 64, self.packed[1])


@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_quantised_linears_are_called_as_modules(model):
    transformer = make(model).transformer
    for block in [m for m in transformer.modules() if type(m) in FUSED]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Quantised(child))
    given = inputs(model, transformer)
    expected = run(transformer, given)
    torch.testing.assert_close(run(ralu.fuse(transformer), given), expected, **close)


def test_ip_adapters_keep_their_attention(warnings):
    pipe = ralu.enable(tiny.flux(), fused=True)
    given = tiny.load_ip_adapter(pipe)
    actual = tiny.generate(pipe, **given)
    assert warnings == ["RALU unfuses this transformer: its attention is FluxIPAdapterAttnProcessor's"]
    assert torch.equal(tiny.generate(ralu.enable(pipe, fused=False), **given), actual)
    assert torch.equal(tiny.generate(ralu.enable(pipe, fused=True), **given), actual)
    assert warnings[1:] == ["RALU leaves this transformer unfused: its attention is FluxIPAdapterAttnProcessor's"]
    kinds = {name: type(p).__name__ for name, p in pipe.transformer.attn_processors.items()}
    assert set(kinds.values()) == {"FluxAttnProcessor", "FluxIPAdapterAttnProcessor"}
    pipe.unload_ip_adapter()
    assert blocks.is_fused(ralu.enable(pipe, fused=True).transformer)


def test_weights_offloaded_layer_by_layer_are_left_to_diffusers(warnings):
    pipe = tiny.flux()
    expected = tiny.generate(pipe, num_inference_steps=2)
    accelerate.cpu_offload(ralu.fuse(pipe.transformer), torch.device("cpu"))
    assert torch.equal(tiny.generate(pipe, num_inference_steps=2), expected) and not blocks.is_fused(pipe.transformer)
    ralu.fuse(pipe.transformer)
    assert len(warnings) == 2 and "offloaded layer by layer" in warnings[1]


def test_a_chosen_attention_backend_is_kept(warnings):
    transformer = tiny.flux().transformer
    for block in transformer.transformer_blocks:
        block.attn.processor._attention_backend = "native"
    assert not blocks.is_fused(ralu.fuse(transformer)) and "attention backend" in warnings[0]


def test_group_offloading_by_leaves_is_left_to_diffusers(warnings):
    transformer = tiny.flux().transformer
    norm = transformer.transformer_blocks[0].attn.norm_q
    registry = HookRegistry.check_if_exists_or_initialize(norm)
    registry.register_hook(ModelHook(), "group_offloading")  # a norm has it where offload_type is "leaf_level"
    assert not blocks.is_fused(ralu.fuse(transformer)) and "offloaded layer by layer" in warnings[0]


def test_blocks_of_other_classes_are_left_alone(warnings):
    class Other(FluxTransformerBlock):
        pass

    transformer = tiny.flux().transformer
    transformer.transformer_blocks[1].__class__ = Other
    assert not blocks.is_fused(ralu.fuse(transformer)) and "blocks of class Other" in warnings[0]


def test_padding_stays_where_nothing_is_trimmed(warnings):
    """A transformer that is left unfused gets T5's embeddings as they are."""
    pipe = tiny.flux()
    expected = tiny.generate(ralu.enable(pipe, fused=False))
    pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = "native"
    torch.testing.assert_close(tiny.generate(ralu.enable(pipe, trim_text=True)), expected, rtol=0, atol=1e-5)
    assert "attention backend" in warnings[0]


class Counting(accelerate.hooks.ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Counting.calls += 1
        return args, kwargs


@pytest.mark.parametrize("fused_first", [True, False])
def test_hooks_of_accelerate_on_blocks(fused_first):
    pipe = make("3.5-medium")
    transformer = pipe.transformer
    given = inputs("3.5-medium", transformer)
    plain = run(transformer, given)
    if fused_first:
        ralu.fuse(transformer)
    for block in transformer.transformer_blocks:
        accelerate.hooks.add_hook_to_module(block, Counting())
    ralu.fuse(transformer)
    Counting.calls = 0
    with Calls() as calls:
        torch.testing.assert_close(run(transformer, given), plain, **close)
    assert Counting.calls == 3 and "pack_qkv" in calls.names
    ralu.unfuse(transformer)
    assert torch.equal(run(transformer, given), plain) and Counting.calls == 6
    ralu.fuse(transformer)
    for block in transformer.transformer_blocks:
        accelerate.hooks.remove_hook_from_module(block)
    with Calls() as calls:
        torch.testing.assert_close(run(transformer, given), plain, **close)
    assert Counting.calls == 6 and "pack_qkv" in calls.names


# ---- in and out ----


def traces(transformer):
    """Everything that `fuse` might leave behind."""
    parts = {
        name: (dict(vars(module)), dict(module._forward_pre_hooks)) for name, module in transformer.named_modules()
    }
    return parts, list(transformer.state_dict())


@pytest.mark.parametrize("model", MODELS)
def test_round_trips(model):
    pipe = make(model)
    transformer, call = pipe.transformer, {"num_inference_steps": 2}
    expected, before = tiny.generate(pipe, **call), traces(transformer)  # the first run makes diffusers' own registries
    ralu.fuse(transformer)
    assert before[1] == traces(transformer)[1] and blocks.is_fused(transformer)
    ralu.fuse(transformer)  # anew
    ralu.unfuse(ralu.unfuse(transformer))
    assert traces(transformer) == before
    with Calls() as calls:
        stages = tiny.generate(ralu.enable(pipe, fused=True))
    assert "pack_qkv" in calls.names
    torch.testing.assert_close(tiny.generate(ralu.enable(pipe)), stages, **close)
    assert not blocks.is_fused(transformer)  # "auto" on a CPU
    ralu.enable(pipe, fused=True, trim_text=True)
    assert torch.equal(tiny.generate(ralu.disable(pipe), **call), expected) and traces(transformer) == before
    assert "_get_t5_prompt_embeds" not in vars(pipe)


def test_enable_puts_an_owners_fusion_back():
    pipe = tiny.flux()
    ralu.fuse(pipe.transformer, trim_text=True)
    assert not blocks.is_fused(ralu.enable(pipe, fused=False).transformer)
    assert pipe.transformer.ralu_fusion.trim_text if blocks.is_fused(ralu.disable(pipe).transformer) else False
    assert blocks.is_fused(ralu.enable(pipe).transformer) and not pipe.transformer.ralu_fusion.trim_text
    assert ralu.disable(pipe).transformer.ralu_fusion.trim_text
    assert not hasattr(ralu.unfuse(pipe.transformer), "ralu_fusion")


def test_wrong_arguments():
    pipe = tiny.flux()
    pipe.transformer._reset_stateful_cache()  # which makes diffusers' own registries
    before = traces(pipe.transformer)
    for change, message in (
        ({"fused": "yes"}, "fused must be True, False or 'auto', got 'yes'"),
        ({"fused": False, "trim_text": True}, "trim_text=True needs fused=True"),
    ):
        with pytest.raises(ValueError, match=message):
            ralu.enable(pipe, **change)
    with pytest.raises(ValueError, match=r"transformer must be a FluxTransformer2DModel or .*, got AutoencoderKL"):
        ralu.fuse(pipe.vae)
    block = pipe.transformer.single_transformer_blocks[1]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward of FluxSingleTransformerBlock has been replaced"):
        ralu.enable(pipe, fused=True)
    del block.forward
    assert traces(pipe.transformer) == before and "RaluScheduler" not in type(pipe.scheduler).__name__
    ralu.fuse(pipe.transformer)
    given = inputs("flux", pipe.transformer)
    with pytest.raises(ValueError, match="attention_mask"):
        run(pipe.transformer, given | {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 31).bool()}})
    with pytest.raises(ValueError, match="forward only"):
        pipe.transformer(**given)


# ---- lengths of their own ----


def threshold(pipe, **options):
    """One that chooses another number of tokens in every image."""
    scores = []
    ralu.enable(pipe, regions=lambda x0, grid: scores.append(gradient(x0, grid)) or scores[-1], **options)
    tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7))
    value = scores[0].quantile(0.7).item()
    assert len({int((row >= value).sum()) for row in scores[0]}) > 1
    return value


@pytest.mark.parametrize("model", MODELS)
def test_ragged_batches_equal_their_single_runs(model):
    pipe = make(model)
    options = {"preset": short(model), "regions": "gradient"}
    options["threshold"] = threshold(pipe, preset=short(model))
    ralu.enable(pipe, fused=True, **options)
    batch = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7))
    layouts = pipe.transformer.ralu_fusion.layouts.cache_info()
    steps = pipe.scheduler.num_inference_steps
    assert layouts.misses == 3 and layouts.hits == steps - 3  # one a stage
    for i in range(3):
        fused = tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,))
        torch.testing.assert_close(batch[i : i + 1], fused, **close)
    ralu.enable(pipe, fused=False, **options)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,)), **close)
    if model != "flux":
        with pytest.raises(ValueError, match="enable with fused=True"):
            tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7))


@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_text_of_zeros_is_left_out(model):
    """Against the stock transformer, given each sample's own text alone."""
    transformer = make(model).transformer
    given = inputs(model, transformer, batch=3)
    lengths, text = (4, 1, 5), given["encoder_hidden_states"]
    for sample, length in zip(text, lengths, strict=True):
        sample[length:] = 0
    expected = []
    for i, length in enumerate(lengths):
        alone = {name: value if "ids" in name else value[i : i + 1] for name, value in given.items()}
        alone["encoder_hidden_states"] = text[i : i + 1, :length]
        if model == "flux":
            alone["txt_ids"] = given["txt_ids"][:length]
        expected.append(run(transformer, alone))
    stock = run(transformer, given)
    ralu.fuse(transformer, trim_text=True)
    torch.testing.assert_close(run(transformer, given), torch.cat(expected), **close)
    torch.testing.assert_close(run(ralu.fuse(transformer), given), stock, **close)
    assert (stock - torch.cat(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("model", ["flux", "3.5-medium", "3.0"])
def test_trimmed_prompts_in_ragged_batches_equal_their_single_runs(model):
    pipe = make(model)
    value = threshold(pipe, preset=short(model), fused=True, trim_text=True)
    whole = tiny.generate(ralu.enable(pipe, short(model), fused=True), PROMPTS, seeds=(5, 6, 7))
    ralu.enable(pipe, short(model), regions="gradient", threshold=value, trim_text=True)
    widths, sequences = [], []

    def see(module, args, kwargs):
        widths.append(kwargs["encoder_hidden_states"].shape[1])
        sequences.append(kwargs["joint_attention_kwargs"]["sequences"])

    hook = pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
    batch = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7))
    assert len({id(s) for s in sequences}) == 3
    tokenizer = pipe.tokenizer_2 if model == "flux" else pipe.tokenizer_3
    clip = 0 if model == "flux" else pipe.tokenizer.model_max_length
    texts = [clip + len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    negative = [] if model == "flux" else [clip + len(tokenizer("").input_ids)] * 3
    assert len(set(texts)) > 1 and max(texts) < clip + 16 and set(widths) == {max(texts)}
    assert sequences[0].cu_seqlens.diff().tolist() == [64 + n for n in negative + texts]
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,)), **close)
    hook.remove()
    assert (batch - whole).abs().max() > 1e-3
    twice = tiny.generate(pipe, PROMPTS[:2], seeds=(5, 6, 7, 8), num_images_per_prompt=2)
    torch.testing.assert_close(twice[2:3], tiny.generate(pipe, PROMPTS[1], seeds=(7,)), **close)


def test_padded_images_without_ralu():
    transformer = tiny.flux().transformer
    given = inputs("flux", transformer)
    mask = torch.arange(24) < torch.tensor([[24], [15]])
    actual = run(ralu.fuse(transformer), given | {"joint_attention_kwargs": {"image_mask": mask}})
    ralu.unfuse(transformer)
    alone = {name: value if "ids" in name else value[1:] for name, value in given.items()}
    alone |= {"hidden_states": given["hidden_states"][1:, :15], "img_ids": given["img_ids"][:15]}
    torch.testing.assert_close(actual[1:, :15], run(transformer, alone), **close)
    torch.testing.assert_close(actual[:1], run(transformer, given)[:1], **close)


# ---- torch.compile ----


@pytest.mark.parametrize("kind, options", [
    (FluxTransformerBlock, {}),
    (FluxSingleTransformerBlock, {}),
    (JointTransformerBlock, {"qk_norm": "rms_norm", "use_dual_attention": True}),
])  # fmt: skip
def test_fused_blocks_compile_whole(kind, options):
    block = wide_block(kind, (32, 2, 16), options, torch.float32)
    given = block_inputs(kind, 32, 16, 2, torch.float32)
    for attention in blocks._attentions(block):
        attention.set_processor(FUSED[kind].processor(attention.processor))
    blocks._replace_forward(block, kind.forward, FUSED[kind].forward)
    with torch.no_grad():
        expected = block(**given)
        actual = torch.compile(block, fullgraph=True, backend="aot_eager")(**given)
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, **close)


def a_third_and_a_quarter(x0, grid):
    """Scores of two images that keep different counts at every size: a graph without padding would be one more."""
    return (torch.arange(grid[0] * grid[1]) % torch.tensor([[3], [4]]) == 0).float()


@pytest.mark.parametrize("model", ["flux", "3.5-medium"])
def test_three_stages_compile_three_graphs_at_most(model):
    """With a ragged second stage; another size must not run into PyTorch's limit, where fullgraph=True would raise."""
    pipe = tiny.shallow(make(model))
    options = {"preset": short(model), "regions": a_third_and_a_quarter, "threshold": 0.5, "fused": True}
    expected = tiny.generate(ralu.enable(pipe, **options), PROMPTS[:2], seeds=(5, 6))
    ralu.disable(pipe)
    counter = CompileCounter()
    tiny.compile(pipe, in_place=model == "flux", backend=counter)
    actual = tiny.generate(ralu.enable(pipe, **options), PROMPTS[:2], seeds=(5, 6))
    torch.testing.assert_close(actual, expected, **close)
    assert 1 <= counter.frame_count <= 3
    for size in (72, 48):
        tiny.generate(pipe, PROMPTS[:2], seeds=(5, 6), height=size)
    assert counter.frame_count <= 4
    tiny.generate(pipe, PROMPTS[:2], seeds=(5, 6), height=72)
    assert counter.frame_count <= 4


# ---- counted ----


@pytest.mark.parametrize("kind", ["double", "single"])
def test_fused_blocks_read_and_write_a_third_of_the_bytes(kind):
    """FLUX.1-dev at 1024 pixels: 512 text and 4096 image tokens of 3072 channels, bfloat16."""
    stock, fused = (benchmark.block_traffic(kind, fused) for fused in (False, True))
    matmuls = [[row for row in traffic.launches if row[0] == "addmm"] for traffic in (stock, fused)]
    assert matmuls[0] == matmuls[1] and len(matmuls[0]) == {"double": 14, "single": 6}[kind]
    assert stock.bytes >= 3 * fused.bytes
    assert len(fused.launches) < len(stock.launches) / 2
    # By hand: residual, norms, activation and packing of every token, 2 bytes a value; the tables in float32.
    width, tokens = 3072, 4608
    passes = {"double": 2 + 4 + 3 + 8 + 6, "single": 2 + 2 + 3 + 10 + 6}[kind]
    read = {"double": 2 * (2 + 3 + 1) * width + 4 * 128, "single": (2 + 1) * width + 2 * 128}[kind]
    tables = 2 * tokens * 128 * 4
    silu = 2 * width  # once, for both norms of a double block
    assert fused.bytes == 2 * (passes * width * tokens + read + silu) + tables


def test_the_benchmark_runs_dry(tmp_path, monkeypatch):
    usual = benchmark.ways()[:4]
    assert all(name in ("auto", "diffusers'") for _, _, name in usual)
    monkeypatch.setattr(benchmark, "ways", lambda: usual)
    rows = benchmark.main(["--dry", "--output", str(tmp_path / "blocks.csv")])
    assert {row["part"] for row in rows} == {"traffic", "step"}
    assert {row["variant"] for row in rows if row["part"] == "step"} == {
        "stock eager", "stock compiled", "fused eager", "fused compiled"
    }  # fmt: skip
    assert len(record.read(tmp_path / "blocks.csv")) == len(rows)

    def wrong(model):
        model.proj_out.weight.data *= 1.2

    monkeypatch.setattr(benchmark, "ways", lambda: [(True, False, "auto")])
    monkeypatch.setattr(ralu, "fuse", wrong)
    with pytest.raises(AssertionError, match=r"is 0\.2 away from the stock step"):
        benchmark.main(["--dry"])
