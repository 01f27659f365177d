"""Scores against OpenCV on the same image, and images whose edges are known."""

import functools
import io
from itertools import pairwise

import cv2
import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

import ralu
from ralu import regions
from ralu.presets import PRESETS
from ralu.regions import canny, edge_density, evenly_spaced, gradient, mask, random
from ralu.schedule import Schedule, Stage, match_noise, resample_noise, two_resolutions
from ralu_kernels import plan_tokens


def scene(seed=0, height=96, width=160):
    """Draw a smooth background with a dark disc, (3, H, W) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = ((y - 30 - 5 * seed).square() + (x - 60).square() < 20**2).float()
    return torch.stack([0.2 + 0.4 * disc, -0.3 + 0.9 * disc, y / height - 0.5 - 0.3 * disc])


def test_edge_counts_equal_opencv_on_the_8_bit_luma():
    image = scene()
    scores = edge_density(image[None], (6, 10))[0]
    rgb = ((image * 0.5 + 0.5) * 255).permute(1, 2, 0).double().numpy()
    luma = np.rint(rgb @ [0.299, 0.587, 0.114]).astype(np.uint8)
    edges = cv2.Canny(luma, 100, 200).reshape(6, 16, 10, 16).sum((1, 3)) / 255
    counts = (scores * 256).floor().reshape(6, 10).numpy()  # the rest is contrast, less than one edge pixel
    np.testing.assert_array_equal(counts, edges)
    assert 20 < edges.sum() < 400


def test_dark_images_keep_their_edges():
    """Decoded values lie in [-1, 1]; clipping them at 0, as the paper's release does, loses the dark half."""
    dark = scene() * 0.45 - 0.55
    assert (dark < 0).all() and (edge_density(dark[None], (6, 10)) * 256).floor().sum() > 20


def test_ties_go_to_contrast_and_never_overtake_an_edge_pixel():
    image = torch.zeros(1, 3, 32, 48)
    image[..., 16:, 32:] += torch.linspace(0, 0.04, 16)  # too soft for Canny
    image[..., :16, :16] = 1 - 2 * (torch.arange(16) < 8).float()  # one hard edge
    scores = edge_density(image, (2, 3))[0]
    assert scores.argsort(descending=True)[:2].tolist() == [0, 5]
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = edge_density(noise, (4, 4))
    assert ((scores * 256) % 1).max() <= 0.5 and scores.max() <= 1


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")  # of no image
def test_a_batch_scores_like_its_images_and_may_be_empty():
    images = torch.stack([scene(seed) for seed in range(3)])
    batch = edge_density(images, (6, 10))
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], edge_density(images[i : i + 1], (6, 10)), rtol=0, atol=0)
    assert edge_density(images[:0], (6, 10)).shape == (0, 60)
    half = edge_density(images.bfloat16(), (6, 10))
    assert half.dtype == torch.float32 and half.shape == (3, 60)


def test_choosing_a_share_of_the_regions_needs_no_value_on_the_host():
    """A meta tensor has no values: whatever asks for one, or for a size that depends on them, fails."""
    scores = edge_density(torch.empty(3, 3, 96, 160, device="meta"), (6, 10))
    plan = plan_tokens(scores, (6, 10), ratio=0.2)
    assert scores.shape == (3, 60) and plan.source.shape == (3 * (60 + 3 * 12),)
    with pytest.raises(ValueError, match="must be one that has values, which the threshold"):  # the host has to wait
        plan_tokens(scores, (6, 10), threshold=0.1)


def test_canny_scores_what_the_decoder_shows():
    images = scene()[None]
    scorer = canny(lambda x0, grid: images * x0.mean(), low=50, high=120)
    torch.testing.assert_close(scorer(torch.ones(1, 60, 4), (6, 10)), edge_density(images, (6, 10), 50, 120))


def test_grid_that_does_not_divide_the_image():
    with pytest.raises(ValueError, match=r"96x160.*5x10"):
        edge_density(scene()[None], (5, 10))


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (6, 1), (2, 2)])
def test_gradient_equals_numpy(grid):
    x0 = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    planes = np.pad(x0.double().numpy().reshape(2, *grid, 8), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dy = (planes[:, 2:, 1:-1] - planes[:, :-2, 1:-1]) / 2
    dx = (planes[:, 1:-1, 2:] - planes[:, 1:-1, :-2]) / 2
    expected = np.sqrt((dy**2 + dx**2).mean(-1)).reshape(2, -1)
    np.testing.assert_allclose(gradient(x0, grid).numpy(), expected, rtol=1e-5)


def test_a_scorer_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"one score a token, \(1, 16\), got \(1, 4\)"):
        ralu.sample(lambda x, sigma, layout: x, torch.randn(1, 64, 16), (8, 8), regions=lambda x0, grid: x0[:, :4, 0])


def test_random_scores_are_even_and_each_samples_own():
    seeds = torch.tensor([3, -(2**40), 7])
    scores = random(seeds, (40, 50))
    assert scores.shape == (3, 2000) and len(scores.unique()) > 5990
    for sample in scores:
        assert scipy.stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(scores.numpy())[np.triu_indices(3, 1)]).max() < 0.08
    assert torch.equal(random(seeds[1:2], (40, 50)), scores[1:2])


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_mask_scores_by_the_mean_of_each_block(batch):
    given = torch.rand(*batch, 24, 40, generator=torch.Generator().manual_seed(0))
    scores = mask(given)(torch.zeros(3, 15, 8), (3, 5))
    blocks = given.double().numpy().reshape(-1, 3, 8, 5, 8).mean((2, 4)).reshape(-1, 15)
    np.testing.assert_allclose(scores.numpy(), np.broadcast_to(blocks, (3, 15)), rtol=1e-5)


def test_a_mask_may_be_an_image_of_any_size():
    image = Image.new("RGB", (50, 30), "black")
    image.paste("white", (25, 0, 50, 15))
    for given in (image, np.asarray(image.convert("L")) / 255.0):
        assert regions.scorer_of(given)(torch.zeros(2, 4, 8), (2, 2)).tolist() == [[0, 1, 0, 0]] * 2


def test_a_mask_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="regions has masks for 2 images, but the batch has 1"):
        ralu.sample(lambda x, sigma, layout: x, torch.randn(1, 64, 16), (8, 8), regions=torch.zeros(2, 8, 8))


HALVES = np.repeat([[0.25, 0.75]], 16, axis=0).repeat(8, axis=1).astype(np.float32)  # (16, 16), dark left of bright
BINARY = HALVES > 0.5


def saved(image, **options):
    """As it comes back from a PNG file."""
    file = io.BytesIO()
    image.save(file, "png", **options)
    return Image.open(file)


def alpha(mode):
    image = Image.new(mode, (16, 16), (255,) * (len(mode) - 1) + (64,))
    image.paste((255,) * (len(mode) - 1) + (191,), (8, 0, 16, 16))
    return image


def palette(transparency):
    image = Image.fromarray(BINARY.astype(np.uint8)).convert("P")
    image.putpalette([255, 255, 255, 255, 255, 255] if transparency else [64, 64, 64, 191, 191, 191])
    return saved(image, **({"transparency": bytes([64, 191])} if transparency else {}))


GRAY = Image.fromarray((HALVES * 255).round().astype(np.uint8))
WIDE = (HALVES * 65535).round()
FORMATS = {
    "float32 tensor": torch.from_numpy(HALVES),
    "float16 tensor": torch.from_numpy(HALVES).half(),
    "bfloat16 tensor": torch.from_numpy(HALVES).bfloat16(),
    "float64 array": HALVES.astype(np.float64),
    "uint8 tensor": torch.from_numpy(np.array(GRAY)),
    "uint8 array": np.array(GRAY),
    "uint16 array": WIDE.astype(np.uint16),
    "(1, 1, H, W)": torch.from_numpy(HALVES)[None, None],
    "L": GRAY, "RGB": GRAY.convert("RGB"), "CMYK": GRAY.convert("CMYK"), "YCbCr": GRAY.convert("YCbCr"),
    "HSV": GRAY.convert("RGB").convert("HSV"), "P": palette(False), "P with alpha": palette(True),
    "F": Image.fromarray(HALVES), "I": Image.fromarray(WIDE.astype(np.int32)),
    "I;16": Image.fromarray(WIDE.astype(np.uint16)), "16-bit PNG": saved(Image.fromarray(WIDE.astype(np.uint16))),
    "RGBA": alpha("RGBA"), "LA": alpha("LA"), "LA PNG": saved(alpha("LA")), "RGBa": alpha("RGBA").convert("RGBa"),
}  # fmt: skip
TWO_VALUED = {
    "bool tensor": torch.from_numpy(BINARY), "uint8 of 0 and 1": torch.from_numpy(BINARY.astype(np.uint8)),
    "int64 of 0 and 1": BINARY.astype(np.int64), "1": Image.fromarray(BINARY),
    "L": Image.fromarray(BINARY).convert("L"),
    "L of 0 and 1": Image.fromarray(BINARY.astype(np.uint8)), "1-bit PNG": saved(Image.fromarray(BINARY)),
}  # fmt: skip


@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_a_mask_means_the_same_in_every_format(given):
    scores = mask(given)(torch.zeros(1, 16, 4), (4, 4))[0].view(4, 4)
    expected = torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(4, 4)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1.01 / 255)  # eight bits hold neither quarter


@pytest.mark.parametrize("given", TWO_VALUED.values(), ids=TWO_VALUED)
def test_a_mask_of_two_values_is_black_and_white(given):
    assert mask(given)(torch.zeros(1, 4, 4), (2, 2)).tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize(
    "given, error, message",
    [
        (torch.full((4, 4), torch.nan), ValueError, "finite"),
        (np.full((4, 4), np.inf), ValueError, "finite"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), ValueError, "finite"),
        (torch.zeros(4, 4, dtype=torch.complex64), ValueError, "real, got torch.complex64"),
        (torch.zeros(0, 4), ValueError, r"empty, got shape \(0, 4\)"),
        (torch.zeros(0, 4, 4), ValueError, "empty"),
        (torch.zeros(4), ValueError, r"\(B, H, W\) or \(B, 1, H, W\), got \(4,\)"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"got \(2, 3, 4, 4\)"),
        (np.zeros((1, 1, 1, 4, 4)), ValueError, r"got \(1, 1, 1, 4, 4\)"),
        (torch.full((4, 4), 200), ValueError, "torch.int64 may hold 0 and 1 alone, got 200 to 200"),
        (np.full((4, 4), -1, np.int8), ValueError, "got -1 to -1"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), ValueError, "got 70000 to 70000"),
        (np.array([["a"]]), TypeError, "array"),
        ([[0.0, 1.0]], TypeError, "image, an array or a tensor, got list"),
        (None, TypeError, "got NoneType"),
        ("mask.png", TypeError, "got str"),
    ],
)
def test_what_is_no_mask_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        mask(given)


def chosen(pipe, **options):
    """List the tokens selected in each image of a run of three."""
    plans = []
    ralu.enable(pipe, **options)

    def keep(pipe, step, timestep, kwargs):
        plans.append(pipe.scheduler.layout and pipe.scheduler.layout.plan)
        return kwargs

    images = tiny.generate(pipe, tiny.PROMPTS, seeds=(5, 6, 7), callback_on_step_end=keep)
    plan = next(plan for plan in plans if plan is not None)
    ends = plan.cu_seqlens.tolist()
    spans = [slice(*span) for span in pairwise(ends)]
    return images, [plan.source[span][plan.child[span] == 0].tolist() for span in spans]


def test_pipelines_take_masks():
    wanted = [[0, 9, 63], [8], []]
    given = torch.zeros(3, 64)
    for row, tokens in zip(given, wanted, strict=True):
        row[tokens] = 1
    _, selected = chosen(tiny.flux(), regions=given.view(3, 8, 8), threshold=0.5)
    assert selected == wanted


def test_pipelines_choose_at_random_but_for_an_image_always_the_same():
    pipe = tiny.flux()
    images, selected = chosen(pipe, regions="random", ratio=0.25)
    assert len({tuple(tokens) for tokens in selected}) == 3 and {len(tokens) for tokens in selected} == {16}
    torch.testing.assert_close(tiny.generate(pipe, tiny.PROMPTS[1], seeds=(6,)), images[1:2], rtol=0, atol=1e-4)


# ---- change, even spacing, combinations ----


def shuttle(*stages):
    """A schedule of (resolution, steps, end), which goes back to low after every full stage."""
    kinds = {("low", "full"): "renoise", ("low", "mixed"): "select", ("mixed", "full"): "complete"}
    transitions = [
        resample_noise(0.1) if before == "full" else match_noise(kinds[before, after], end, 0.05)
        for (before, _, end), (after, *_) in pairwise(stages)
    ]
    return Schedule(tuple(Stage(*stage, 1.0) for stage in stages), tuple(transitions))


# The first low stage comes before no selection, the other two before one each.
TWO_SELECTIONS = shuttle(
    ("low", 3, 0.2), ("full", 1, 0.4), ("low", 2, 0.5), ("mixed", 1, 0.6), ("full", 1, 0.7), ("low", 3, 0.8),
    ("mixed", 1, 0.9), ("full", 1, 1.0),
)  # fmt: skip


def summed_change(estimates):
    """Of clean estimates (steps, B, n, C), a value at a time."""
    _, batch, tokens, values = estimates.shape
    path, scores = estimates.double().tolist(), torch.zeros(batch, tokens, dtype=torch.float64)
    for before, after in pairwise(path):
        for b in range(batch):
            for token in range(tokens):
                differences = [after[b][token][value] - before[b][token][value] for value in range(values)]
                scores[b, token] += sum(d * d for d in differences) / values
    return scores


@pytest.mark.parametrize(
    "schedule, counted",
    [(PRESETS["flux-7x"], [range(2)]), ("flux-5x", [range(4)]), (TWO_SELECTIONS, [range(4, 6), range(8, 11)])],
)
def test_change_equals_plain_loops_on_a_known_path(schedule, counted):
    """The velocity points at an estimate of our own choosing in every step; only those before a selection count."""
    path = torch.randn(20, 2, 24, 8, generator=torch.Generator().manual_seed(0))

    def scores_of(rows):
        call, layouts = iter(range(20)), {}

        def velocity(x, sigma, layout):
            step = next(call)
            if layout.plan is not None:
                layouts[layout.stage] = layout
            return (x - path[step, rows]) / sigma if layout.resolution == "low" else torch.zeros_like(x)

        noise = torch.randn(2, 96, 8, generator=torch.Generator().manual_seed(1))[rows]
        ralu.sample(velocity, noise, (8, 12), schedule, regions="change", ratio=0.25)
        return list(layouts.values())

    both = scores_of(slice(0, 2))
    assert len(both) == len(counted)
    for layout, steps in zip(both, counted, strict=True):
        expected = summed_change(path[steps.start : steps.stop])
        torch.testing.assert_close(layout.scores.double(), expected, rtol=1e-4, atol=0)
        chosen = layout.plan.source[layout.plan.child == 0].view(2, 6) % 24
        assert chosen.sort().values.tolist() == expected.topk(6).indices.sort().values.tolist()
    for b in range(2):
        for layout, alone in zip(both, scores_of(slice(b, b + 1)), strict=True):
            torch.testing.assert_close(alone.scores, layout.scores[b : b + 1], rtol=1e-4, atol=0)


def test_change_is_added_up_in_float32():
    """Of a model in bfloat16, whose eight bits would be lost in differences of differences."""
    estimates, layouts = [], []

    def velocity(x, sigma, layout):
        v = torch.randn(x.shape, generator=generator).bfloat16()
        if layout.resolution == "low":
            assert x.dtype == torch.bfloat16 or not estimates
            estimates.append(x.double() - sigma * v.double())
        layouts.append(layout)
        return v

    generator = torch.Generator().manual_seed(0)
    ralu.sample(velocity, torch.randn(1, 96, 4, generator=generator), (8, 12), "flux-5x", regions="change")
    scores = layouts[4].scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), summed_change(torch.stack(estimates)), rtol=1e-5, atol=0)


def estimates_of_a_run(pipe, prompts, seeds, **call):
    """The clean estimates before the selection, (steps, B, n, C), and the scores it went by."""
    made, layouts = [], []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    def noted(velocity, timestep, sample, *args, **kwargs):
        if scheduler.layout.resolution == "low":
            x = sample.float()
            if x.shape != velocity.shape:  # the full-size noise
                x = scheduler.subsample_first(x)
            x0 = x - timestep / 1000 * velocity.float()
            made.append(x0 if x0.dim() == 3 else F.unfold(x0, 2, stride=2).mT)
        return step(velocity, timestep, sample, *args, **kwargs)

    def note(pipe, step, timestep, tensors):
        layouts.append(pipe.scheduler.layout)
        return tensors | {"latents": tensors["latents"] * 1.01}  # a callback's own latents are what the model sees

    scheduler.step = noted
    try:
        tiny.generate(pipe, prompts, seeds, callback_on_step_end=note, output_type="latent", **call)
    finally:
        del scheduler.step
    return torch.stack(made), next(layout.scores for layout in layouts if layout is not None and layout.plan)


GUIDED = {"flux": {"true_cfg_scale": 2.0, "negative_prompt": "grey"}, "sd3": {"guidance_scale": 3.0}}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return tiny.FAMILIES[family].make()


@pytest.fixture
def watched(family, stock):
    """A pipeline that goes by change, in four steps before the selection and two after it."""
    return functools.partial(ralu.enable, stock, tiny.FAMILIES[family].short.replace(steps=(4, 1, 1)), regions="change")


@pytest.mark.parametrize("cache", [None, "taylorseer(interval=2,warmup=1)"])
def test_change_in_pipelines(family, watched, cache):
    """With guidance it is of the guided velocity, with a cache of the predicted one; each image as if it were alone."""
    pipe = watched(cache=cache)
    estimates, scores = estimates_of_a_run(pipe, tiny.PROMPTS[:2], (5, 6), **GUIDED[family])
    assert len(estimates) == 4
    torch.testing.assert_close(scores.double(), summed_change(estimates), rtol=1e-4, atol=0)
    _, alone = estimates_of_a_run(pipe, tiny.PROMPTS[1], (6,), **GUIDED[family])
    torch.testing.assert_close(alone, scores[1:], rtol=1e-3, atol=0)


def test_an_interrupted_run_leaves_no_change_behind(watched):
    pipe = watched()
    _, scores = estimates_of_a_run(pipe, tiny.PROMPTS[0], (5,))

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return tensors

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("on purpose")

    tiny.generate(pipe, tiny.PROMPTS[1], (7,), callback_on_step_end=stop)
    with pytest.raises(RuntimeError, match="on purpose"):
        tiny.generate(pipe, tiny.PROMPTS[1], (7,), callback_on_step_end=fail)
    _, again = estimates_of_a_run(pipe, tiny.PROMPTS[0], (5,))
    assert torch.equal(again, scores)


def test_change_is_refused_where_the_selection_follows_a_single_step(stock):
    words = r"regions='change' needs 2 steps before the selection, {} has 1"
    single = PRESETS["flux-5x"].replace(steps=(1, 4, 4))
    for preset, name in ((single, "the schedule"), ("distilled-4", "distilled-4")):
        with pytest.raises(ValueError, match=words.format(name)):
            ralu.enable(stock, preset, regions="change")
        with pytest.raises(ValueError, match=words.format(name)):
            ralu.sample(lambda *_: pytest.fail("called"), torch.zeros(1, 64, 4), (8, 8), preset, regions="change")
    ralu.enable(stock, two_resolutions((1, 2), 0.5, (1.0, 1.0), 0.1), regions="change")  # nothing is selected
    assert tiny.generate(stock, output_type="latent").isfinite().all()


def bayer(size):
    """Bayer's recursion: M of twice the size is [[4M, 4M + 2], [4M + 3, 4M + 1]]."""
    if size == 1:
        return np.zeros((1, 1), int)
    m = 4 * bayer(size // 2)
    return np.block([[m, m + 2], [m + 3, m + 1]])


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (9, 14), (1, 6), (5, 1), (1, 1), (17, 3)])
def test_even_spacing_follows_bayers_matrix(grid):
    scores = evenly_spaced(torch.randn(3, grid[0] * grid[1], 8), grid)
    order = bayer(32)[: grid[0], : grid[1]].flatten().argsort()
    assert scores.shape == (3, len(order)) and scores.min() > 0 and scores.max() <= 1
    for row in scores:
        assert row.argsort(descending=True).tolist() == order.tolist()


@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (9, 13)])
def test_even_spacing_at_every_ratio(grid):
    """No two tokens touch while a quarter is enough, and every block has one as soon as there are enough of them."""
    h, w = grid
    for count in range(1, h * w + 1):
        plan = plan_tokens(evenly_spaced(torch.zeros(1, h * w, 4), grid), grid, ratio=count / (h * w))
        taken = torch.zeros(h, w)
        taken.view(-1)[plan.source[plan.child == 0]] = 1
        assert taken.sum() == count
        around = F.conv2d(taken[None, None], torch.ones(1, 1, 3, 3), padding=1)[0, 0] * taken
        if count <= h * w / 4:
            assert around.max() == 1
        for side in (2, 4, 8):
            blocks = F.max_pool2d(taken[None, None], side, ceil_mode=True)
            if count >= blocks.numel():
                assert blocks.min() == 1


def test_the_combination_of_scorers_in_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.repeat([[255, 0]], 2, axis=0).repeat(32, axis=1).astype(np.uint8)).save("face-mask.png")
    pipe, layouts = tiny.flux(), []
    lines = [line[4:] for line in regions.__doc__.splitlines() if line.startswith("    ") or not line]
    exec("\n".join(lines), {"pipe": pipe, "ralu": ralu, "Image": Image})

    def note(pipe, step, timestep, tensors):
        layouts.append(pipe.scheduler.layout)
        return tensors

    tiny.generate(pipe, callback_on_step_end=note)
    layout = next(layout for layout in layouts if layout is not None and layout.plan)
    edges = gradient(layout.x0, (8, 8)).view(8, 8)
    expected = (edges / edges.max()).numpy() + 0.5 * (np.arange(8) < 4)
    np.testing.assert_allclose(layout.scores.view(8, 8).numpy(), expected, rtol=1e-5)
