"""Images as conditions: tokens behind the image's (Kontext, FLUX.2), channels (Fill, Control), and ControlNets."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import test_by_hand
import test_caches
import test_delta_dit
import test_teacache
import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from PIL import Image
from test_by_hand import patches_of
from test_teacache import DELTA, QUARTIC

import ralu
from ralu.regions import gradient

HEIGHT, WIDTH = 64, 48
PROMPTS = tiny.PROMPTS
TAKING_IMAGES = (
    "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "FluxControlNetPipeline",
    "StableDiffusion3ControlNetPipeline",
)  # fmt: skip
close = dict(rtol=0, atol=2e-5)


def picture(seed, height=HEIGHT, width=WIDTH):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), np.uint8))


def mask(seed, height=HEIGHT, width=WIDTH):
    """A mask whose pixels are 0 and 1 by chance: of 2x2 any number may be painted."""
    return np.random.RandomState(seed).randint(0, 2, (height, width)).astype(np.uint8)


def latents(*seeds):
    """Latents of condition images, 10x12 tokens, which are of another size than what is generated."""
    return 4 * torch.cat([torch.randn(1, 4, 20, 24, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# ---- what the stock models make of tokens at any places ----


class Scaled(test_by_hand.Scaled):
    """FLUX.1 and SD3 with an image as a condition, for `test_by_hand.by_hand`."""

    def __init__(self, pipe):
        self.pipe = pipe

    def noise(self, height, width, generator):
        self.size = height, width
        return super().noise(height, width, generator)

    def pixels(self):
        """The image that is a condition, (3, H, W) in [-1, 1]."""
        return torch.from_numpy(np.array(picture(0, *self.size))).permute(2, 0, 1) / 127.5 - 1

    def control(self, shift):
        """Encode the condition, without the VAE's chance: its patches, and the same of a quarter of them.

        Where it ends with half a low patch, its last pixels are there twice more.
        """
        encoded = self.pipe.vae.encode(self.pixels()[None]).latent_dist.mode()[0]
        encoded = (encoded - shift) * self.pipe.vae.config.scaling_factor
        for axis in (1, 2):
            last = encoded.narrow(axis, encoded.shape[axis] - 1, 1)
            encoded = torch.cat([encoded, *[last] * (-encoded.shape[axis] % 4)], axis)
        means = sum(encoded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        return patches_of(encoded), patches_of(means)

    def controls_at(self, places, grid):
        """Of every place the condition's patch, of the token's own resolution."""
        return self.chosen(*self.control(self.shift), places, grid)

    def chosen(self, fine, coarse, places, grid):
        chosen, width = [], 2 * -(-self.size[1] // 8)
        for y, x in places:
            if grid == (self.size[0] // 4, self.size[1] // 4):
                chosen.append(fine[y * width + x])
            elif (y, x) in places and (int(y), int(x) + 0.5) in places:  # its sibling is there too
                chosen.append(fine[int(2 * y) * width + int(2 * x)])
            else:
                chosen.append(coarse[int(y) * width // 2 + int(x)])
        return torch.stack(chosen)


class Kontext(Scaled):
    def condition(self):
        return latents(0)[0]

    def text(self):
        prompt, pooled, _ = self.pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=16)
        return {"encoder_hidden_states": prompt, "pooled_projections": pooled, "txt_ids": torch.zeros(16, 3)}

    def velocity(self, patches, places, sigma, grid):
        _, h, w = self.condition().shape
        conditions = patches_of(self.condition())
        ids = [(0, y, x) for y, x in places] + [(1, y, x) for y in range(h // 2) for x in range(w // 2)]
        return self.pipe.transformer(
            hidden_states=torch.cat([patches, conditions]).flatten(1)[None], img_ids=torch.tensor(ids).float(),
            timestep=torch.tensor([sigma]), **self.text(),
        ).sample[0, : len(patches)].view(patches.shape)  # fmt: skip


class FluxControl(Kontext):
    mode: int | None = None

    @property
    def shift(self):
        return self.pipe.vae.config.shift_factor

    def noise(self, height, width, generator):
        super().noise(height, width, generator)  # for the VAE's chance
        return super().noise(height, width, generator)

    def velocity(self, patches, places, sigma, grid):
        given = {
            "hidden_states": patches.flatten(1)[None], "timestep": torch.tensor([sigma]),
            "img_ids": torch.tensor([(0, y, x) for y, x in places]).float(), **self.text(),
        }  # fmt: skip
        controls = self.controls_at(places, grid).flatten(1)[None]
        mode = None if self.mode is None else torch.tensor([[self.mode]])
        given |= vars(
            self.pipe.controlnet(controlnet_cond=controls, controlnet_mode=mode, conditioning_scale=0.7, **given)
        )
        return self.pipe.transformer(**given).sample[0].view(patches.shape)


class FluxUnion(FluxControl):
    mode = 1


class FluxChannels(FluxControl):
    """The condition's patches are channels behind the image's."""

    def beside(self, places, grid):
        return self.controls_at(places, grid).flatten(1)

    def velocity(self, patches, places, sigma, grid):
        return self.pipe.transformer(
            hidden_states=torch.cat([patches.flatten(1), self.beside(places, grid)], dim=1)[None],
            img_ids=torch.tensor([(0, y, x) for y, x in places]).float(), timestep=torch.tensor([sigma]), **self.text(),
        ).sample[0].view(patches.shape)  # fmt: skip


class FluxFill(FluxChannels):
    """The image is black where the mask is 1; behind it are each latent pixel's 2x2 pixels of the mask."""

    def pixels(self):
        return super().pixels() * (1 - torch.from_numpy(mask(0, *self.size)).float())

    def masks(self, pixels):
        """List for every 4x4 pixels of a mask those that are first in each 2x2, then the second, ..."""
        height, width = pixels.shape
        return torch.tensor([
            [pixels[y + 2 * r + i, x + 2 * c + j] for i in (0, 1) for j in (0, 1) for r in (0, 1) for c in (0, 1)]
            for y in range(0, height, 4) for x in range(0, width, 4)
        ]).float()  # fmt: skip

    def beside(self, places, grid):
        pixels = mask(0, *self.size)
        for axis in (0, 1):  # what pads is twice the last latent pixels, which are of 2x2
            last = pixels.take([-2, -1], axis)
            pixels = np.concatenate([pixels, *[last] * (-pixels.shape[axis] % 8 // 2)], axis)
        quarters = sum(pixels[i::2, j::2].astype(int) for i in (0, 1) for j in (0, 1))
        masks = self.chosen(self.masks(pixels), self.masks(quarters >= 2), places, grid)
        return torch.cat([super().beside(places, grid), masks], dim=1)


class SD3Control(Scaled):
    """A ControlNet as those for SD3, which were trained without a shift of its image and without pooled prompts."""

    reads, shift = True, 0

    def embedded(self, places, grid):
        """Sines and cosines of places about the middle of a grid of 24, made for 16 in a row: (L, 32)."""
        rates = 10000.0 ** -(np.arange(8) / 8)
        tables = []
        for axis in (1, 0):
            along = np.array([place[axis] + (24 - grid[axis]) // 2 for place in places]) / (24 / 16)
            tables += [f(np.outer(along, rates)) for f in (np.sin, np.cos)]
        return torch.from_numpy(np.concatenate(tables, 1)).float()[None]

    def strip(self, patches):
        return patches.permute(1, 2, 0, 3).flatten(2)[None]

    def velocity(self, patches, places, sigma, grid):
        pipe, table = self.pipe, self.embedded(places, grid)
        prompt, negative, pooled, pooled_negative = pipe.encode_prompt(PROMPTS[0], None, None, max_sequence_length=16)
        controls, velocities = self.strip(self.controls_at(places, grid)), []
        for model in (pipe.transformer, pipe.controlnet):
            model.pos_embed.cropped_pos_embed = lambda *_: table
        for text, vector in ((negative, pooled_negative), (prompt, pooled)):
            given = {"hidden_states": self.strip(patches), "timestep": torch.tensor([sigma * 1000])}
            added = pipe.controlnet(
                **given, encoder_hidden_states=text if self.reads else None, controlnet_cond=controls,
                pooled_projections=torch.zeros_like(vector) if self.reads else vector, conditioning_scale=0.7,
            ).controlnet_block_samples  # fmt: skip
            given |= {"encoder_hidden_states": text, "pooled_projections": vector}
            out = pipe.transformer(**given, block_controlnet_hidden_states=added).sample
            velocities.append(out[0].unflatten(-1, (-1, 2)).permute(2, 0, 1, 3))
        for model in (pipe.transformer, pipe.controlnet):
            del model.pos_embed.cropped_pos_embed
        return velocities[0] + 3.5 * (velocities[1] - velocities[0])


class SD35Control(SD3Control):
    """A ControlNet as those for SD3.5, which read no text and have the transformer's position embedding."""

    reads = False

    @property
    def shift(self):
        return self.pipe.vae.config.shift_factor


class SD3ControlInpaint(SD3Control):
    """A ControlNet that sees the image, black where it is painted, and behind that which latent pixels are not."""

    @property
    def shift(self):
        return self.pipe.vae.config.shift_factor

    def pixels(self):
        return super().pixels().masked_fill(torch.from_numpy(mask(0, *self.size) == 1), -1)

    def control(self, shift):
        fine, coarse = super().control(shift)
        kept = torch.from_numpy(1 - mask(0, *self.size))[None, ::2, ::2].float()
        half = (sum(kept[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) >= 2).float()
        return torch.cat([fine, patches_of(kept)], 1), torch.cat([coarse, patches_of(half)], 1)


class Flux2Images(test_by_hand.Flux2):
    def __init__(self, pipe):
        super().__init__(pipe, PROMPTS[0])

    def run(self, patches, places, sigma, text, **given):
        ids, conditions = [(0, y, x, 0) for y, x in places], []
        for k, image in enumerate(IMAGES):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
            conditions.append(self.normalised(patches_of(self.pipe.vae.encode(pixels).latent_dist.mode()[0])))
            ids += [(10 + 10 * k, y, x, 0) for y in range(image.height // 4) for x in range(image.width // 4)]
        return self.pipe.transformer(
            hidden_states=torch.cat([patches, *conditions]).flatten(1)[None], encoder_hidden_states=text,
            img_ids=torch.tensor(ids).float()[None], timestep=torch.tensor([sigma]),
            txt_ids=torch.tensor([[[0, 0, 0, i] for i in range(text.shape[1])]]), **given,
        ).sample[0, : len(patches)].view(patches.shape)  # fmt: skip


class Flux2Dev(Flux2Images):
    def velocity(self, patches, places, sigma, grid):
        return self.run(patches, places, sigma, self.text["prompt_embeds"], guidance=torch.tensor([3.5]))


IMAGES = [picture(1, 64, 72), picture(2, 68, 64)]


class Case(NamedTuple):
    """A pipeline that takes images.

    family: whose latents it has.
    model:  the run by hand.
    call:   what it is called with for images of this height and width, and these numbers.
    change: what other condition there may be, or none.
    """

    family: str
    make: Callable
    model: type
    call: Callable[..., dict]
    change: dict

    def generate(self, pipe, *numbers, height=HEIGHT, width=WIDTH, **call):
        """Generate a picture for each number, which is that of its prompt, seed and condition."""
        torch.manual_seed(0)  # SD3's control image is encoded by global chance
        numbers = numbers or (0,)
        call = {"height": height, "width": width} | self.call(height, width, *numbers) | call
        return tiny.generate(pipe, [PROMPTS[i] for i in numbers], seeds=[3 + i for i in numbers], **call)

    @property
    def schedule(self):
        return tiny.FAMILIES[self.family].schedule.replace(steps=(2, 2, 3))


def controls(height, width, *numbers):
    return {"control_image": [picture(i, height, width) for i in numbers], "controlnet_conditioning_scale": 0.7}


def fills(height, width, *numbers):
    masks = [Image.fromarray(255 * mask(i, height, width)) for i in numbers]
    return {"image": [picture(i, height, width) for i in numbers], "mask_image": masks}


def channels(height, width, *numbers):
    return {"control_image": [picture(i, height, width) for i in numbers]}


CASES = {
    "kontext": Case(
        "flux", tiny.kontext, Kontext, lambda h, w, *n: {"image": latents(*n), "max_area": h * w}, {"image": None}
    ),
    "flux2": Case("flux2", tiny.flux2, Flux2Images, lambda *_: {"image": IMAGES}, {"image": None}),
    "flux-controlnet": Case(
        "flux", tiny.flux_controlnet, FluxControl, controls, {"controlnet_conditioning_scale": 0.0}
    ),
    "sd3-controlnet": Case("sd3", tiny.sd3_controlnet, SD3Control, controls, {"controlnet_conditioning_scale": 0.0}),
    "fill": Case("flux", tiny.flux_fill, FluxFill, fills, {"mask_image": Image.fromarray(255 * mask(9))}),
    "control": Case("flux", tiny.flux_control, FluxChannels, channels, {"control_image": picture(9)}),
}


def surely_encoding(pipe):
    """Take the variance away of what a pipeline's VAE encodes."""
    layer = pipe.vae.encoder.conv_out
    layer.weight.data[4:], layer.bias.data[4:] = 0, -30
    return pipe


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def stock(case):
    return surely_encoding(case.make())


@pytest.mark.parametrize("ratio, height, width", [(1.0, HEIGHT, WIDTH), (0.3, 60, 52)])  # 15 by 13 tokens
@pytest.mark.serves("sizes that divide by 16 alone", *TAKING_IMAGES[:-1])
@pytest.mark.serves("equals a run written out by hand", *TAKING_IMAGES)
@pytest.mark.serves("images as conditions", "Flux2KleinPipeline", *TAKING_IMAGES)
@pytest.mark.serves("guidance", "StableDiffusion3ControlNetPipeline")
def test_whole_runs_equal_the_method_written_out_by_hand(case, stock, ratio, height, width):
    family, seen = tiny.FAMILIES[case.family], []
    if case.family == "sd3":  # whose pipeline with a ControlNet takes multiples of 8 pixels alone, two tokens here
        height, width = HEIGHT, WIDTH
    second, third, final = test_by_hand.by_hand(case.model(stock), case.schedule, height, width, 3, ratio)

    def callback(pipe, i, t, values):
        seen.append(pipe.scheduler.subsample_first(values["latents"]))  # with channels behind they are of full size
        return values

    ralu.enable(stock, case.schedule, ratio=ratio)
    case.generate(stock, height=height, width=width, callback_on_step_end=callback)
    ralu.disable(stock)
    if ratio < 1:
        torch.testing.assert_close(family.patches(seen[1]), second, rtol=0, atol=1e-4)
    for got, expected in ((seen[3], third), (seen[-1], final)):
        torch.testing.assert_close(patches_of(family.image(got, height, width)[0]), expected, rtol=0, atol=1e-4)


def union():
    return tiny.flux_controlnet(num_mode=3)


def without_text():
    return tiny.sd3_controlnet(joint_attention_dim=None, use_pos_embed=False, force_zeros_for_pooled_projection=False)


def inpainting():
    return tiny.sd3_controlnet(StableDiffusion3ControlNetInpaintingPipeline, extra_conditioning_channels=1)


INPAINTING = "StableDiffusion3ControlNetInpaintingPipeline"


@pytest.mark.parametrize(("name", "make", "model", "call"), [
    pytest.param(
        "flux2", partial(tiny.flux2, dev=True), Flux2Dev, {},
        marks=pytest.mark.serves("images as conditions", "Flux2Pipeline"),
    ),
    ("flux-controlnet", union, FluxUnion, {"control_mode": 1}),
    ("sd3-controlnet", without_text, SD35Control, {}),
    pytest.param(
        "sd3-controlnet", inpainting, SD3ControlInpaint, {"control_mask": Image.fromarray(255 * mask(0))},
        marks=[pytest.mark.serves(feature, INPAINTING) for feature in (
            "equals a run written out by hand", "images as conditions", "guidance"
        )],
    ),
])  # fmt: skip
def test_other_models_equal_the_method_written_out_by_hand(name, make, model, call):
    case, pipe, seen = CASES[name], surely_encoding(make()), []
    *_, final = test_by_hand.by_hand(model(pipe), case.schedule, HEIGHT, WIDTH, 3, 0.3)

    def callback(pipe, i, t, values):
        seen.append(values["latents"])
        return values

    case.generate(ralu.enable(pipe, case.schedule, ratio=0.3), callback_on_step_end=callback, **call)
    got = tiny.FAMILIES[case.family].image(seen[-1], HEIGHT, WIDTH)[0]
    torch.testing.assert_close(patches_of(got), final, rtol=0, atol=1e-4)


@pytest.mark.serves("a batch equals its single runs", INPAINTING)
@pytest.mark.serves("disable restores every bit", INPAINTING)
def test_a_controlnet_that_inpaints_in_a_batch():
    def call(height, width, *numbers):
        masks = [Image.fromarray(255 * mask(i, height, width)) for i in numbers]
        return controls(height, width, *numbers) | {"control_mask": masks}

    case, pipe = Case("sd3", inpainting, SD3ControlInpaint, call, {}), surely_encoding(inpainting())
    before = case.generate(pipe, num_inference_steps=4)
    ralu.enable(pipe, case.schedule, regions="gradient")
    batch = case.generate(pipe, 0, 1)
    for i in range(2):
        torch.testing.assert_close(batch[i : i + 1], case.generate(pipe, i), **close)
    assert torch.equal(case.generate(ralu.disable(pipe), num_inference_steps=4), before)


@pytest.mark.serves("disable restores every bit", *TAKING_IMAGES)
def test_stock_runs_stay_what_they_are(case, stock):
    """With a preset of no stages, and after stages; conditions matter, so equality says something."""
    expected = case.generate(stock, num_inference_steps=4)
    assert torch.equal(case.generate(ralu.enable(stock, "stock-4"), num_inference_steps=4), expected)
    ralu.enable(stock, case.schedule)
    conditioned = case.generate(stock)
    assert (case.generate(stock, **case.change) - conditioned).abs().max() > 1e-3
    assert torch.equal(case.generate(ralu.disable(stock), num_inference_steps=4), expected)
    for net in (stock.transformer, getattr(stock, "controlnet", stock.transformer)):
        assert not net._forward_pre_hooks and type(net.pos_embed).__module__.startswith("diffusers")
        assert not {"strip", "positions", "laid_out"} & vars(net.pos_embed).keys()


@pytest.mark.serves("a batch equals its single runs", *TAKING_IMAGES)
@pytest.mark.serves("token counts of its own for every image", *TAKING_IMAGES[:3])
def test_a_batch_is_what_its_images_are_alone(case, stock):
    """With a threshold where attention takes a mask: the images' tokens are then in other numbers."""
    scores, options = [], {"regions": lambda x0, grid: scores.append(gradient(x0, grid)) or scores[-1]}
    ralu.enable(stock, case.schedule, **options)
    batch = case.generate(stock, 0, 1, 2)
    if not hasattr(stock, "controlnet"):
        threshold = scores[0].quantile(0.7).item()
        assert len({int((row >= threshold).sum()) for row in scores[0]}) > 1
        ralu.enable(stock, case.schedule, regions="gradient", threshold=threshold)
        batch = case.generate(stock, 0, 1, 2)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], case.generate(stock, i), **close)
    ralu.disable(stock)


@pytest.mark.serves("callbacks, previews, interruption", *TAKING_IMAGES)
def test_interruptions_before_full_resolution_decode_what_there_is(case, stock):
    ralu.enable(stock, case.schedule)
    for step in (0, 2):
        found = []

        def stop(pipe, i, t, values, step=step, found=found):
            if i == step:
                found.append(pipe.scheduler.full_resolution(values["latents"]))
                pipe._interrupt = True
            return values

        image = case.generate(stock, callback_on_step_end=stop)
        full = tiny.FAMILIES[case.family].image(found[0], HEIGHT, WIDTH)[0]
        decoded = stock.vae.decode(
            test_by_hand.image_of(case.model(stock).restored(patches_of(full)), HEIGHT // 4, WIDTH // 4)[None]
        ).sample.detach()
        torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), **close)
    ralu.disable(stock)


def test_a_copy_is_enabled_too_and_its_own(case, stock):
    stock_image = case.generate(stock, num_inference_steps=4)
    expected = case.generate(ralu.enable(stock, case.schedule))
    twin = copy.deepcopy(stock)
    assert torch.equal(case.generate(ralu.disable(stock), num_inference_steps=4), stock_image)
    assert torch.equal(case.generate(twin), expected)
    assert torch.equal(case.generate(ralu.disable(twin), num_inference_steps=4), stock_image)


@pytest.mark.refuses("ToCa", "FluxKontextPipeline")
@pytest.mark.refuses("RAS", "FluxKontextPipeline")
def test_kontext_without_an_image_makes_images_from_text():
    pipe = tiny.flux()
    ralu.enable(pipe, tiny.FAMILIES["flux"].short)
    expected = {width: tiny.generate(pipe, width=width) for width in (WIDTH, 60)}
    ralu.disable(pipe)
    twin = ralu.enable(tiny.other(FluxKontextPipeline, pipe), tiny.FAMILIES["flux"].short)
    for width, image in expected.items():
        assert torch.equal(tiny.generate(twin, width=width, max_area=HEIGHT * width), image)
    for preset, cache in (("stock-4", "ras"), (tiny.FAMILIES["flux"].short, "toca")):
        ralu.enable(twin, preset, cache=cache)
        with pytest.raises(ValueError, match=r"cache must be None or one of .*taylorseer.* where an image is a"):
            CASES["kontext"].generate(twin)
        assert CASES["kontext"].generate(twin, image=None).isfinite().all()


CACHED = {
    "taylorseer(interval=2,order=0,warmup=1)": lambda pipe, steps: by_series(pipe, steps),
    f"teacache(delta={DELTA['flux']})": lambda pipe, steps: test_teacache.by_hand(pipe, DELTA["flux"], QUARTIC, steps),
    "delta-dit(interval=2,num_blocks=2,boundary=0.6)": lambda pipe, steps: test_delta_dit.by_hand(
        pipe, 2, 2, 0.6, sum(steps)
    ),
}


@contextmanager
def by_series(pipe, steps):
    """TaylorSeer of order 0, whose every second step reuses the outputs of the one before, from each stage's first."""
    full = [step % 2 == 0 for count in steps for step in range(count)]
    calls = 2 if isinstance(pipe, Flux2KleinPipeline) else 1
    undo = test_caches.predict_by_hand(pipe.transformer, full.__getitem__, 0, calls)
    yield
    undo()


@pytest.mark.serves("TaylorSeer", "FluxKontextPipeline", "FluxFillPipeline")
@pytest.mark.serves("TeaCache", "FluxKontextPipeline", "FluxFillPipeline")
@pytest.mark.serves("DeltaDiT", "FluxKontextPipeline", "FluxFillPipeline")
@pytest.mark.parametrize(("name", "cache"), [*product(["kontext", "fill"], CACHED), ("flux2", next(iter(CACHED)))])
def test_caches_beside_images_equal_the_methods_written_out_by_hand(name, cache):
    """With Kontext's second call of a step for guidance, which diffusers tells apart by no context."""
    case, pipe = CASES[name], surely_encoding(CASES[name].make())
    guided = (
        {"true_cfg_scale": 2.0, "negative_prompt": PROMPTS[1]} if name == "kontext" and "taylor" not in cache else {}
    )
    schedule = case.schedule.replace(steps=(3, 4, 4))
    ralu.enable(pipe, schedule)
    whole = case.generate(pipe, output_type="latent", **guided)
    with CACHED[cache](pipe, schedule.steps):
        expected = case.generate(pipe, output_type="latent", **guided)
    got = case.generate(ralu.enable(pipe, schedule, cache=cache), output_type="latent", **guided)
    torch.testing.assert_close(got, expected, **close)
    assert (got - whole).abs().max() > 1e-4


@pytest.mark.serves("fused blocks", "FluxKontextPipeline")
def test_fused_blocks_take_conditions_in_a_batch_of_other_numbers():
    case, pipe = CASES["kontext"], tiny.kontext()
    scores, threshold = [], 0.0
    ralu.enable(pipe, case.schedule, regions=lambda x0, grid: scores.append(gradient(x0, grid)) or scores[-1])
    case.generate(pipe, 0, 1, 2)
    threshold = scores[0].quantile(0.7).item()
    images = [
        case.generate(ralu.enable(pipe, case.schedule, regions="gradient", threshold=threshold, fused=fused), 0, 1, 2)
        for fused in (False, True)
    ]
    torch.testing.assert_close(*images, **close)


@pytest.mark.parametrize("name", ["flux-controlnet", "sd3-controlnet"])
def test_several_controlnets_add_up(name):
    pipe, case = surely_encoding(CASES[name].make()), CASES[name]
    family, nets = tiny.FAMILIES[case.family], [pipe.controlnet, case.make(seed=2).controlnet]
    given = {"latents": family.latents(torch.randn(1, 4, HEIGHT // 2, WIDTH // 2))}
    expected = case.generate(ralu.enable(pipe, case.schedule), **given)
    ralu.disable(pipe)
    beside = tiny.other(type(pipe), surely_encoding(case.make()), controlnet=nets[0])  # a model of its own
    assert torch.equal(case.generate(ralu.enable(beside, case.schedule), **given), expected)
    pictures = {"control_image": [[picture(0)], [picture(0)]]}
    for parts, scales in ((nets, (0.7, 0.0)), (nets[:1] * 2, (0.3, 0.4))):
        several = tiny.other(type(pipe), pipe, controlnet=parts)
        assert len(several.controlnet.nets) == 2
        assert ralu.schedule_for(3, several) == ralu.schedule_for(3, pipe)
        pictures["controlnet_conditioning_scale"] = list(scales)
        image = case.generate(ralu.enable(several, case.schedule), **given, **pictures)
        torch.testing.assert_close(image, expected, **close)
        ralu.disable(several)
        assert all(type(net.pos_embed) in (FluxPosEmbed, PatchEmbed) for net in nets)
        assert torch.equal(case.generate(beside, **given), expected)


# ---- from one pipeline to another ----


def from_pipe(kind, pipe, **parts):
    twin = kind.from_pipe(pipe, dtype=torch.float32, **parts)
    twin.set_progress_bar_config(disable=True)
    return twin


@pytest.mark.parametrize("name", ["kontext", "flux-controlnet", "sd3-controlnet"])
def test_from_pipe_of_an_enabled_pipeline_works(name):
    case = CASES[name]
    there = case.make()
    parts = {"controlnet": there.controlnet} if hasattr(there, "controlnet") else {}
    kind = FluxPipeline if case.family == "flux" else StableDiffusion3Pipeline
    pipe = tiny.other(kind, there)
    stock_image = case.generate(there, num_inference_steps=4)
    expected = case.generate(ralu.enable(there, case.schedule))
    ralu.enable(ralu.disable(there) and pipe, case.schedule)
    twin = from_pipe(type(there), pipe, **parts)
    assert torch.equal(case.generate(twin), expected)
    back = from_pipe(kind, twin)
    torch.testing.assert_close(tiny.generate(back), tiny.generate(pipe), rtol=0, atol=0)
    ralu.disable(pipe)
    assert type(twin.scheduler) is type(back.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(case.generate(twin, num_inference_steps=4), stock_image)
    if parts:
        assert not twin.controlnet._forward_pre_hooks and type(twin.controlnet.pos_embed) in (FluxPosEmbed, PatchEmbed)
        ralu.enable(pipe, case.schedule, cache="taylorseer")
        with pytest.raises(ValueError, match="cache must be None with a ControlNet"):
            case.generate(from_pipe(type(there), pipe, **parts))


# ---- refusals ----


@pytest.mark.parametrize("name", ["flux-controlnet", "sd3-controlnet"])
@pytest.mark.refuses("TaylorSeer", "FluxControlNetPipeline", "StableDiffusion3ControlNetPipeline")
@pytest.mark.refuses(
    "token counts of its own for every image", "FluxControlNetPipeline", "StableDiffusion3ControlNetPipeline"
)
def test_what_no_controlnet_is_served_with(name):
    case = CASES[name]
    pipe = case.make()
    scheduler, embed = pipe.scheduler, type(pipe.controlnet.pos_embed)
    for options, words in (
        ({"cache": "taylorseer"}, "cache must be None with a ControlNet"),
        ({"trim_text": True}, "trim_text must be False with a ControlNet"),
    ):
        with pytest.raises(ValueError, match=words):
            ralu.enable(pipe, **options)
    pipe.controlnet.pos_embed.__class__ = type("Other", (embed,), {})
    with pytest.raises(ValueError, match=rf"pipe\.controlnet's pos_embed must be a {embed.__name__}, got Other"):
        ralu.enable(pipe)
    pipe.controlnet.pos_embed.__class__ = embed
    assert pipe.scheduler is scheduler and not pipe.controlnet._forward_pre_hooks
    ralu.enable(pipe, case.schedule, regions="gradient", threshold=0.1)
    calls = []
    pipe.controlnet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="with threshold= generate one at a time, or give ratio="):
        case.generate(pipe, 0, 1)
    assert not calls and case.generate(pipe).isfinite().all()


def test_a_controlnet_that_takes_the_image_itself_is_refused():
    pipe = tiny.flux()
    net = tiny.controlnet(pipe, num_single_layers=1, conditioning_embedding_channels=16)
    with pytest.raises(ValueError, match=r"one with an input_hint_block \(X-Labs\).*ralu\.disable\(pipe\)"):
        ralu.enable(tiny.other(FluxControlNetPipeline, pipe, controlnet=net))
