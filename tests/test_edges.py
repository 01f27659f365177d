"""Canny edges equal OpenCV's: every backend, and the CUDA kernels on the host or a GPU."""

import math
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import cv2
import pytest
import skimage
import torch

from ralu_kernels.edges import canny, edge_density

THRESHOLDS = ((100, 200), (200, 100), (50, 50), (0, 0), (20, 600), (2039, 10**6))
SIZES = ((1, 1), (1, 40), (40, 1), (2, 2), (8, 32), (9, 33), (33, 47), (70, 129))
# Images that come with scikit-image, none of them downloaded.
IMAGES = (
    "camera.png",
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "text.png",
    "page.png",
    "coins.png",
    "retina.jpg",
)


def opencv(images, low, high):
    return torch.stack([torch.from_numpy(cv2.Canny(image.numpy(), low, high)) for image in images.cpu()])


def on_host(images, low, high):
    """By the CUDA kernels; scratch and result start out as garbage."""
    edges, parent = torch.full_like(images, 77), torch.full(images.shape, -5, dtype=torch.int32)
    cuda_on_host.operations().canny(images, edges, parent, low, high)
    return edges


def photograph(name):
    path = Path(skimage.__file__).parent / "data" / name
    image = torch.from_numpy(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    assert image.numel() > 2**15
    return image[None, :600, :600].contiguous()


def patterns(size):
    """Noise of all slopes, of two and of four levels, and as smooth as a photograph: (4, *size)."""
    noise = torch.randint(0, 256, size, dtype=torch.uint8)
    smooth = torch.from_numpy(cv2.GaussianBlur(noise.numpy(), (5, 5), 2)).float().view(1, *size)
    smooth = ((smooth - smooth.min()) * 255 / (smooth.max() - smooth.min()).clamp_min(1)).byte()[0]
    return torch.stack([noise, noise // 128 * 255, noise // 64 * 64, smooth])


def spiral(side):
    """One component in turns: a root that is far away for all but the first pixels."""
    image = torch.zeros(side, side, dtype=torch.uint8)
    for ring in range(0, side // 2, 8):
        image[ring : side - ring, ring : side - ring] = 255 - image[ring, ring]
    image[:, side // 2 :] //= 2
    return image[None, :600, :600].contiguous()


def opencv_cuts(images, low, high):
    """What OpenCV finds in one piece, and in strips, for which it has other code: one for each of its threads."""
    before = cv2.getNumThreads()
    try:
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            yield opencv(images, low, high)
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_equal_opencv(size, thresholds):
    images = patterns(size)
    found = on_host(images, *thresholds)
    assert all(torch.equal(found, expected) for expected in opencv_cuts(images, *thresholds))


@pytest.mark.parametrize("name", IMAGES)
def test_kernels_equal_opencv_on_photographs(name):
    image = photograph(name)
    for thresholds in ((100, 200), (20, 400)):
        found = on_host(image, *thresholds)
        assert found.any() and all(torch.equal(found, expected) for expected in opencv_cuts(image, *thresholds))


def test_kernels_follow_an_edge_through_many_blocks():
    image = spiral(320)
    expected = opencv(image, 100, 900)
    assert 0 < expected.count_nonzero() != opencv(image, 900, 900).count_nonzero()
    for _ in range(3):  # the blocks race
        assert torch.equal(on_host(image, 100, 900), expected)


canny_backends = pytest.mark.parametrize(
    "backend", ["auto", "reference", pytest.param("native", marks=pytest.mark.native)]
)


@canny_backends
@pytest.mark.parametrize("thresholds", [(100, 200), (99.9, 200.7), (250, 30), (0, 0), (500, 1e300)], ids=str)
def test_canny_equals_opencv(backend, device, thresholds):
    for images in (patterns((33, 47)), photograph("camera.png")[:, :300]):
        edges = canny(images.to(device), *thresholds, backend=backend)
        assert edges.device == images.to(device).device and edges.is_contiguous()
        assert torch.equal(edges.cpu(), opencv(images, *(min(x, 4000) for x in thresholds)))


@canny_backends
def test_canny_of_any_layout(backend, device):
    images = patterns((21, 34)).to(device)
    expected = canny(images, backend=backend)
    for other in (images.permute(2, 1, 0).contiguous().permute(2, 1, 0), images.repeat_interleave(2, 2)[..., ::2]):
        assert not other.is_contiguous() and torch.equal(canny(other, backend=backend), expected)
    assert torch.equal(canny(images[:1].expand(3, 21, 34), backend=backend), expected[:1].expand(3, 21, 34))


@canny_backends
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=str)
def test_canny_of_nothing(backend, device, shape):
    assert canny(torch.zeros(shape, dtype=torch.uint8, device=device), backend=backend).shape == shape


@canny_backends
def test_edge_density(backend, device):
    images = patterns((24, 36)).to(device)
    edges = canny(images, backend=backend).cpu()
    for block, (y, x) in ((4, (4, 4)), ((8, 3), (8, 3)), ((24, 36), (24, 36))):
        density = edge_density(images, block, backend=backend)
        assert density.dtype == torch.float32 and density.shape == (4, 24 // y, 36 // x)
        expected = [
            [[(image[i : i + y, j : j + x] == 255).double().mean() for j in range(0, 36, x)] for i in range(0, 24, y)]
            for image in edges
        ]
        torch.testing.assert_close(density.cpu().double(), torch.tensor(expected).double())


@canny_backends
def test_opcheck(backend, device):
    images = patterns((9, 12)).to(device)
    for image in (images, images.transpose(1, 2), images[:0]):
        torch.library.opcheck(torch.ops.ralu_kernels.canny, (image, 100, 200, backend))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile(backend, device):
    def f(images, low):
        return edge_density(255 - images, (3, 4), low, 200, backend=backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, low in (((9, 12), 100), ((12, 8), 30.5)):
        images = patterns(size).to(device)
        assert torch.equal(compiled(images, low), f(images, low))


@pytest.mark.gpu
@pytest.mark.parametrize("name", IMAGES)
def test_canny_on_a_gpu(name):
    image = photograph(name).expand(3, -1, -1)
    assert torch.equal(canny(image.cuda(), backend="native").cpu(), opencv(image, 100, 200))


@pytest.mark.gpu
def test_edge_density_does_not_wait_for_the_gpu():
    images = patterns((64, 64)).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        edge_density(images, 8, backend="native")
    finally:
        torch.cuda.set_sync_debug_mode("default")


IMAGE = torch.zeros(2, 6, 8, dtype=torch.uint8)
WRONG = {
    "rank": (dict(image=IMAGE[0]), r"image must be of shape \(B, H, W\), got \(6, 8\)"),
    "dtype": (dict(image=IMAGE.float()), "image.dtype must be uint8, got torch.float32"),
    "low": (dict(low=-1), "low must be a finite number, at least 0, got -1"),
    "high": (dict(high=math.inf), "high must be a finite number, at least 0, got inf"),
    "nan": (dict(high=math.nan), "high must be a finite number, at least 0, got nan"),
    "pixels": (
        dict(image=IMAGE[:1, :1, :1].expand(1, 2**16, 2**15)),
        "the number of pixels of one image must be at most 2147483647, got 2147483648",
    ),
    "backend": (dict(backend="triton"), "backend must be 'auto' or one available on cpu, got 'triton'"),
    "block": (dict(block=4), r"block must be divisors of \(6, 8\), got 4"),
    "no block": (dict(block=(3, 0)), r"block must be an int in \[1, 2147483647\], got 0"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        edge_density(**{**dict(image=IMAGE, block=2), **change})


# ---- without OpenCV ----


@canny_backends
@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_canny_of_every_size(backend, device, thresholds):
    for size in SIZES:
        images = patterns(size)
        assert torch.equal(canny(images.to(device), *thresholds, backend=backend).cpu(), opencv(images, *thresholds))


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 3])
def test_strips_of_an_image_fit(threads):
    """Rows are shared out to threads, of images of which no two are alike."""
    images = torch.cat([patterns((70, 129)), spiral(140)[:, :70, :129]])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(canny(images, 50, 400, backend="native"), opencv(images, 50, 400))
    finally:
        torch.set_num_threads(before)


@canny_backends
def test_canny_follows_an_edge_all_the_way(backend, device):
    image = spiral(200)
    expected = opencv(image, 100, 900)
    assert 0 < expected.count_nonzero() != opencv(image, 900, 900).count_nonzero()
    assert torch.equal(canny(image.to(device), 100, 900, backend=backend).cpu(), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_canny_of_photographs(name, device):
    image = photograph(name)
    for thresholds in ((100, 200), (20, 400)):
        assert torch.equal(canny(image.to(device), *thresholds).cpu(), opencv(image, *thresholds))


def test_canny_needs_no_opencv():
    code = """
import sys
sys.modules["cv2"] = None
import torch, ralu_kernels
image = torch.zeros(1, 8, 8, dtype=torch.uint8)
image[..., 4:] = 255
for backend in ("auto", "reference"):
    assert ralu_kernels.canny(image, backend=backend).count_nonzero() == 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)
