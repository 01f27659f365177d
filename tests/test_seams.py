"""A family and a cache of one file each: registered, they are everywhere."""

import sys

import pytest
import tiny
import torch

import ralu
from ralu import caches, families
from ralu.cli import main
from ralu.method import Method


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Register them for a test, and forget them after it."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    for name in ("components", "models", "pipeline", "blocks"):
        module = sys.modules.get(f"ralu.{name}")
        if hasattr(module, "FAMILIES"):
            monkeypatch.setattr(module, "FAMILIES", families.FAMILIES)
    for name in ("toy_family", "toy_cache"):
        sys.modules.pop(name, None)
        __import__(name)
    yield sys.modules["toy_family"]
    del caches.CACHES["again"]


@pytest.fixture
def pipe(toys):
    flux = tiny.flux()
    transformer = toys.ToyTransformer.from_config(flux.transformer.config).eval()
    transformer.load_state_dict(flux.transformer.state_dict())
    pipe = toys.ToyPipeline(**{**flux.components, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_enable_serves_the_new_family(pipe):
    expected = tiny.generate(ralu.enable(tiny.flux(), "flux-7x"))
    assert torch.equal(tiny.generate(ralu.enable(pipe)), expected) and pipe.num_timesteps == 10
    assert torch.equal(
        tiny.generate(ralu.enable(pipe, fused=True)), tiny.generate(ralu.enable(tiny.flux(), "flux-7x", fused=True))
    )
    with pytest.raises(ValueError, match="preset must be one of flux-7x or a Schedule"):
        ralu.enable(pipe, "flux-5x")


def test_enable_serves_the_new_cache(pipe):
    stock = tiny.generate(pipe, num_inference_steps=4)
    plain = tiny.generate(ralu.enable(pipe))
    assert torch.equal(tiny.generate(ralu.enable(pipe, cache="again(every=1)")), plain)
    calls = []
    hook = pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    ralu.enable(pipe, "flux-7x+again")
    cached = tiny.generate(pipe)
    hook.remove()
    assert not torch.equal(cached, plain)
    assert len(calls) == 1 + 2 + 3  # of 2, 3 and 5 steps: the history begins anew in every stage
    assert pipe.transformer.again["begun"] == [(1, 2), (2, 3), (3, 5)]
    ralu.disable(pipe)
    assert torch.equal(tiny.generate(pipe, num_inference_steps=4), stock) and not hasattr(pipe.transformer, "again")
    with pytest.raises(ValueError, match="cache Again serves toy, flux, and the pipeline's family is sd3"):
        ralu.enable(tiny.sd3(), cache="again")


def test_the_grammar_and_the_estimator_know_them(pipe):
    assert str(Method.parse("flux-7x+again(every=3)")) == "flux-7x+again(every=3)"
    published = ralu.estimate("toy-1", "stock-20")
    assert [part.calls for part in published.parts if "resolution" in part.name] == [20]
    estimate = ralu.estimate(pipe, height=64, width=64)
    assert [part.calls for part in estimate.parts if "resolution" in part.name] == [2, 3, 5]


def test_the_command_line_and_evaluation_know_them(pipe, tmp_path, capsys):
    folder, out = str(tmp_path / "model"), tmp_path / "out"
    pipe.save_pretrained(folder)
    call = ["--model", folder, "--size", "64"]
    assert main(["generate", tiny.PROMPTS[0], *call, "-o", str(tmp_path / "one.png")]) == 0
    assert "10 transformer calls" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:2]))
    methods = ["stock-4", "flux-7x", "flux-7x+again(every=3)"]
    arguments = ["evaluate", "--prompts", str(tmp_path / "prompts.txt"), "--methods", *methods, *call, "-o", str(out)]
    assert main([*arguments, "--metrics", "geneval"]) == 0
    images = {method: sorted((out / method).glob("*.png")) for method in methods}
    assert all(len(files) == 2 for files in images.values())
    assert images["flux-7x"][0].read_bytes() != images["flux-7x+again(every=3)"][0].read_bytes()
    manifest = (out / "manifest.json").read_text()
    assert "flux-7x+again(every=3)" in manifest and '"every": 3' in manifest
    assert main(["estimate", "--model", folder, "--methods", "stock-20", "flux-7x", "--size", "64"]) == 0
    assert "stage 3, full resolution" in capsys.readouterr().out
