"""Image-to-image and inpainting of pipelines that take a condition besides, and of families beside FLUX.1 and SD3."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import test_by_hand
import test_conditions
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlPipeline,
    FluxKontextInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from test_by_hand import image_of, patches_of
from test_conditions import channels, controls, surely_encoding
from test_image import HEIGHT, ODD, H, by_hand, stock_level
from test_image import WIDTH as WIDTH
from test_image import images as images
from test_image import mask as mask

import ralu
from ralu.patch import StandIn

PROMPTS, STRENGTH = tiny.PROMPTS, 0.97


class Kontext(test_conditions.Kontext):
    """The image to begin with is the condition too."""

    def condition(self):
        return self.clean[0]


class Case(NamedTuple):
    """A pipeline that begins with an image.

    family: whose latents it has.
    make:   it, whose VAE leaves nothing to chance where it encodes a condition.
    model:  what its transformer makes, by hand.
    call:   what it takes besides image and mask, for images of a height and width.
    draws:  how many images it encodes by chance until it has the one to begin with.
    """

    family: str
    make: Callable
    model: Callable
    call: Callable[..., dict] = lambda height, width: {}
    draws: int = 1

    def generate(self, pipe, image, mask, prompts=PROMPTS[:1], seeds=(3,), **call):
        height, width = image.shape[2:]
        call = {"num_inference_steps": 100, "output_type": "latent", "image": image, "strength": STRENGTH} | call
        if type(pipe).__name__.endswith("InpaintPipeline"):
            call["mask_image"] = mask
        call |= {"height": height, "width": width} | self.call(height, width)
        return tiny.generate(pipe, prompts, seeds, **call)


def flux(make, kind, *rest):
    return Case("flux", lambda: surely_encoding(make(kind)), *rest)


def control_image(height, width):
    return channels(height, width, 0)


def net_image(height, width):
    return controls(height, width, 0)


def kontext(kind):
    return tiny.other(kind, tiny.flux())


def area(height, width):
    return {"max_area": height * width, "_auto_resize": False}


def of_family(name, kind, model):
    return Case(name, lambda: tiny.other(kind, tiny.FAMILIES[name].make()), lambda pipe: model(pipe, PROMPTS[0]))


CASES = {
    "FluxControlImg2ImgPipeline": flux(
        tiny.flux_control, FluxControlImg2ImgPipeline, test_conditions.FluxChannels, control_image, 2
    ),
    "FluxControlInpaintPipeline": flux(  # the image without what is painted is encoded before all else
        tiny.flux_control, FluxControlInpaintPipeline, test_conditions.FluxChannels, control_image, 3
    ),
    "FluxControlNetImg2ImgPipeline": flux(
        tiny.flux_controlnet, FluxControlNetImg2ImgPipeline, test_conditions.FluxControl, net_image, 2
    ),
    "FluxControlNetInpaintPipeline": flux(
        tiny.flux_controlnet, FluxControlNetInpaintPipeline, test_conditions.FluxControl, net_image, 2
    ),
    "FluxKontextInpaintPipeline": flux(kontext, FluxKontextInpaintPipeline, Kontext, area, 0),
    "QwenImageImg2ImgPipeline": of_family("qwen_image", QwenImageImg2ImgPipeline, test_by_hand.QwenImage),
    "QwenImageInpaintPipeline": of_family("qwen_image", QwenImageInpaintPipeline, test_by_hand.QwenImage),
    "ZImageImg2ImgPipeline": of_family("z_image", ZImageImg2ImgPipeline, test_by_hand.ZImage),
    "ZImageInpaintPipeline": of_family("z_image", ZImageInpaintPipeline, test_by_hand.ZImage),
}


def serving(*features):
    """Every case, and what a test of it says of its pipeline."""

    def marks(name):
        more = "images as conditions" if name.startswith("Flux") else "guidance"
        return [pytest.mark.serves(each, name) for each in (*features, more)]

    return pytest.mark.parametrize(
        "case, pipe", [pytest.param(name, name, id=name, marks=marks(name)) for name in CASES], indirect=True
    )


@pytest.fixture
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(request):
    return CASES[request.param].make()


@torch.no_grad()
def encoded(case, pipe, image, seed):
    """An image's latents, and noise: drawn one after the other as the pipelines do."""
    generator, config = torch.Generator().manual_seed(seed), pipe.vae.config
    films = case.family == "qwen_image"
    encoding = pipe.vae.encode(2 * (image[:, :, None] if films else image) - 1).latent_dist
    clean = encoding.mode()
    for _ in range(case.draws):
        clean = encoding.sample(generator)
    if films:
        deviation, mean = (torch.tensor(x).view(4, 1, 1) for x in (config.latents_std, config.latents_mean))
        clean = (clean[:, :, 0] - mean) / deviation
    else:
        clean = (clean - config.shift_factor) * config.scaling_factor
    return clean, torch.randn(clean.shape, generator=generator)


@serving("equals a run written out by hand")
def test_runs_equal_the_method_written_out_by_hand(case, pipe, images, mask):
    inpaint, model, schedule = hasattr(pipe, "prepare_mask_latents"), case.model(pipe), tiny.FAMILIES[case.family].short
    clean, noise = encoded(case, pipe, images[:1], 3)
    model.size, model.clean = images.shape[2:], clean
    latent_mask = F.interpolate(mask, size=clean.shape[2:])[0] if inpaint else None

    def scores(x0):
        if inpaint:
            return F.avg_pool2d(mask, HEIGHT // H).flatten().tolist()
        return patches_of(x0).square().flatten(1).mean(1).tolist()

    level = stock_level(pipe, STRENGTH, 100)
    expected, first = by_hand(model.velocity, schedule, clean, noise, level, scores, latent_mask)
    assert first == 1
    ralu.enable(pipe, schedule, regions="mask" if inpaint else lambda x0, grid: x0.square().mean(-1))
    got = case.generate(pipe, images[:1], mask)
    ralu.disable(pipe)
    got = tiny.FAMILIES[case.family].image(got, *images.shape[2:])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@serving(
    "a batch equals its single runs", "disable restores every bit", "sizes that divide by 16 alone",
    "callbacks, previews, interruption",
)  # fmt: skip
def test_batches_at_an_odd_size_and_interruptions(case, pipe, images, mask):
    images, mask = (F.interpolate(x, size=tuple(ODD.values())) for x in (images, mask))
    family, inpaint, shown = tiny.FAMILIES[case.family], hasattr(pipe, "prepare_mask_latents"), []
    before = case.generate(pipe, images[:1], mask, num_inference_steps=2)
    ralu.enable(pipe, family.short, regions="gradient")
    batch = case.generate(pipe, images, mask, PROMPTS[:2], (3, 4))
    for i in range(2):
        single = case.generate(pipe, images[i : i + 1], mask, PROMPTS[i : i + 1], (3 + i,))
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=2e-5)

    def stop(pipe, i, t, values):
        latents = values["latents"]  # what inpainting has blended is of full size
        shown.append(latents if inpaint else pipe.scheduler.full_resolution(latents))
        pipe._interrupt = True
        return values

    interrupted = case.generate(pipe, images[:1], mask, callback_on_step_end=stop, output_type="pt")
    ralu.disable(pipe)
    model, latents = case.model(pipe), family.image(shown[0], *ODD.values())[0]
    with torch.no_grad():
        decoded = model.decoded(image_of(model.restored(patches_of(latents)), *(size // 4 for size in ODD.values())))
    torch.testing.assert_close(interrupted, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(case.generate(pipe, images[:1], mask, num_inference_steps=2), before)
    assert not any(isinstance(value, StandIn) for value in vars(pipe).values())


def test_from_pipe_of_an_enabled_pipeline_works(images, mask):
    case, kind = CASES["FluxControlImg2ImgPipeline"], FluxControlImg2ImgPipeline
    pipe = case.make()
    before = case.generate(pipe, images[:1], mask, num_inference_steps=4)
    expected = case.generate(ralu.enable(pipe, tiny.FAMILIES["flux"].short), images[:1], mask)
    other = tiny.other(FluxControlPipeline, ralu.disable(pipe))
    twin = kind.from_pipe(ralu.enable(other, tiny.FAMILIES["flux"].short), dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(case.generate(twin, images[:1], mask), expected)
    ralu.disable(other)
    assert torch.equal(case.generate(twin, images[:1], mask, num_inference_steps=4), before)


def test_fill_repaints_its_mask(images, mask):
    pipe, seen = tiny.flux_fill(), []
    ralu.enable(pipe, tiny.FAMILIES["flux"].short, regions="mask")

    def callback(pipe, i, t, values):
        seen.append(getattr(pipe.scheduler.layout, "scores", None))
        return values

    tiny.generate(pipe, width=WIDTH, image=images[:1], mask_image=mask, callback_on_step_end=callback)
    torch.testing.assert_close(seen[1], F.avg_pool2d(mask, HEIGHT // H).flatten(1), rtol=0, atol=0)
