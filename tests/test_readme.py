"""The examples of the README and the pages of docs run as they stand there, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

import ralu
from ralu import cli

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
DATA = 0.7  # of the point at which exact velocities aim


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def example(page: str, word: str) -> str:
    (code,) = [block for block in blocks(page, "python") if word in block]
    return code


def exact(x, sigma, *_):
    """Return the velocity whose only end is `DATA`."""
    return (x - (1 - sigma) * DATA) / sigma - DATA


def assert_exact(x, *shape):
    torch.testing.assert_close(x, torch.full(shape, DATA), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def mini():
    """Load the embedded model, which stands in for those that would be downloaded."""
    return ralu.mini_pipeline()


@pytest.fixture
def scope(tmp_path, monkeypatch, mini):
    """What the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32), 255).save("face-mask.png")
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_: self)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: mini)
    monkeypatch.setattr(ralu, "mini_pipeline", lambda name="mini-flux": mini)
    monkeypatch.setattr(mini, "load_lora_weights", lambda folder: None)
    encode = mini.encode_prompt  # padding a caption to 512 tokens is most of the work of so small a model
    monkeypatch.setattr(mini, "encode_prompt", lambda **given: encode(**given | {"max_sequence_length": 32}))
    yield {
        "pipe": mini, "mask": torch.rand(16, 16), "model": exact, "velocity": exact,
        "noise": torch.randn(1, 64, 16), "grid": (8, 8),
    }  # fmt: skip
    ralu.disable(mini)


def run(code: str, file: Path, scope: dict):
    """Run an example as the file that Triton and error messages want to read it in."""
    file.write_text(code)
    exec(compile(code, file, "exec"), scope)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "CONTRIBUTING.md"])
def test_python_runs(page, scope, tmp_path):
    """Each page from its top to its bottom."""
    exec("import torch, ralu", scope)
    for code in blocks(page, "python"):
        run(code, tmp_path / "example.py", scope)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_are_known(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mask.png", "face-mask.png"):
        Image.new("L", (8, 8)).save(name)
    Path("prompts.txt").write_text("fox\n")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            del words[0]
        if not words:
            continue
        if "ralu" in words[:-1] and words[0] != "pip":
            assert cli._parser().parse_args(words[words.index("ralu") + 1 :]).run, line
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        else:
            assert words[0] in ("pip", "git", "cd", "python", "pre-commit"), line


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = next(path.parent for path in (ROOT / page, ROOT / "docs" / page) if path.exists())
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith(("https://", "http://")):
            place, _, anchor = link.partition("#")
            assert (folder / place).exists(), link
            assert not anchor or anchor in anchors(Path(place or page).name), link


def test_examples_of_contributing_are_those_that_are_tested():
    code = blocks("CONTRIBUTING.md", "python")
    for toy in ("toy_family.py", "toy_cache.py"):
        source = (ROOT / "tests" / toy).read_text()
        assert any(source.endswith(block) for block in code), toy


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """Register the operation of CONTRIBUTING, once."""
    scope = {}
    run(example("CONTRIBUTING.md", "scaled_square"), tmp_path_factory.mktemp("op") / "example.py", scope)
    return scope["scaled_square"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_contributing(contributed, block_backend, dtype, device):
    x = torch.randn(2, 123, 11, device=device).to(dtype).transpose(1, 2)
    exact = x.double().square() * 0.3
    torch.testing.assert_close(contributed(x, 0.3, backend=block_backend), exact.to(dtype))
    with pytest.raises(ValueError, match="scale"):
        contributed(x, float("nan"), backend=block_backend)


def test_kernels_in_a_plain_loop():
    scope = {"velocity": exact}
    exec(example("kernels.md", "upsample_renoise"), scope)
    assert_exact(scope["x"], 2, 16, 64, 64)


def test_three_stages_in_a_plain_loop():
    scope = {"velocity": exact}
    exec(example("README.md", "upsample_remaining"), scope)
    assert scope["plan"].cu_seqlens.tolist() == [0, 1024 + 3 * 204, 2 * (1024 + 3 * 204)]
    assert_exact(scope["x0"], 2, 1024, 64)
    assert_exact(scope["x"], 2, 4096, 64)


def test_sample():
    scope = {"model": exact, "noise": torch.randn(1, 64, 16), "grid": (8, 8)}
    exec(example("models.md", "ralu.sample"), scope)
    assert_exact(scope["tokens"], 1, 64, 16)


def test_budgets():
    pipe, seen = tiny.flux(), []
    for line in example("methods.md", "speedup=6").splitlines():
        exec(line, {"pipe": pipe, "ralu": ralu})
        seen.append(pipe.scheduler.schedule)
    assert seen == [ralu.schedule_for(6, pipe, height=h, width=w) for h, w in ((256, 256), (512, 768))]


def test_regions(tmp_path, monkeypatch):
    """Each line's choice of tokens, in an image of 8x8 low tokens whose left half is masked."""
    monkeypatch.chdir(tmp_path)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    Image.fromarray((mask * 255).byte().numpy()).save("face-mask.png")
    pipe, plans = tiny.flux(), []

    def keep(pipe, step, timestep, kwargs):
        if pipe.scheduler.layout and pipe.scheduler.layout.plan:
            plans.append(pipe.scheduler.layout.plan)
        return kwargs

    scope = {"pipe": pipe, "ralu": ralu, "mask": mask}
    for line in example("usage.md", "face-mask").splitlines():
        exec(line, scope)
        if "enable" in line:
            tiny.generate(pipe, callback_on_step_end=keep)
    chosen = [plan.source[plan.child == 0] for plan in plans[::5]]
    left = torch.arange(64).view(8, 8)[:, :4].flatten()
    assert [len(tokens) for tokens in chosen] == [19, 32, 12, 12, 12]
    assert torch.isin(chosen[0], left).all() and torch.equal(chosen[1], left)
