"""Labels stay inside the figure and off the images; squares are where the tokens are."""

import numpy as np
import pytest
from PIL import Image

from ralu import preset
from ralu.figures import Row, fitted, grid, overlay, plot_schedule

GREY = Image.new("RGB", (200, 200), (128, 128, 128))


@pytest.mark.parametrize("size", [(200, 200), (512, 300), (96, 256)])
def test_grid_keeps_images_whole_and_labels_inside(size):
    image = Image.new("RGB", size, (128, 128, 128))
    captions = ["fox", "a very long prompt " * 20, "Donaudampfschifffahrtsgesellschaft" * 5]
    rows = [
        Row("a method with a long name", [image] * 3, ["12.3 s", "50 transformer calls"], "4.9×"),
        Row("b", [image] * 3),
    ]
    paper = np.asarray(grid(captions, rows, note="a note of many words " * 20))
    grey = (paper == 128).all(axis=-1)
    assert grey.sum() >= 6 * size[0] * size[1]  # no label covers an image
    assert sorted({*grey.sum(axis=0)})[-1] >= 2 * size[1] and sorted({*grey.sum(axis=1)})[-1] >= 3 * size[0]
    frame = np.concatenate(
        [paper[:4].reshape(-1, 3), paper[-4:].reshape(-1, 3), paper[:, :4].reshape(-1, 3), paper[:, -4:].reshape(-1, 3)]
    )
    assert (frame == 255).all()


def test_grid_refuses_images_that_do_not_line_up():
    with pytest.raises(ValueError, match="one size"):
        grid(["a"], [Row("x", [GREY]), Row("y", [GREY.resize((100, 100))])])
    with pytest.raises(ValueError, match="2 in every row"):
        grid(["a", "b"], [Row("x", [GREY])])


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 48), (192, 144)), ((256, 256), (256, 256)), ((1024, 768), (512, 384))]
)
def test_fitted(size, expected):
    assert fitted(Image.new("RGB", size)).size == expected


@pytest.mark.parametrize(("cells", "tokens"), [((4, 4), [0, 5, 6, 15]), ((3, 7), [2, 20]), ((5, 4), [])])
def test_overlay_marks_these_tokens_and_no_others(cells, tokens):
    changed = (np.asarray(overlay(GREY, tokens, cells)) != 128).any(axis=-1)
    rows = np.searchsorted([y * 200 // cells[0] for y in range(1, cells[0])], np.arange(200), side="right")
    columns = np.searchsorted([x * 200 // cells[1] for x in range(1, cells[1])], np.arange(200), side="right")
    token = rows[:, None] * cells[1] + columns
    assert np.array_equal(changed, np.isin(token, tokens))


@pytest.mark.parametrize("suffix", ["png", "webp", "svg", "pdf"])
def test_schedule_plot(suffix, tmp_path):
    path = plot_schedule(preset("flux-5x"), 3.0, tmp_path / f"plot.{suffix}", "flux-5x")
    assert path.stat().st_size > 5000
    if suffix == "svg":
        assert path.read_text().startswith("<?xml")
