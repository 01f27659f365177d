"""The embedded models: how they are packed, unpacked into a cache and loaded."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import ralu
from ralu.cli import main
from ralu.mini import NAMES, cache_folder, pack, train, unpack

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny pipelines with the same autoencoder, by the models that they are packed as."""
    folder = tmp_path_factory.mktemp("saved")
    flux, sd3 = tiny.flux(), tiny.sd3()
    sd3.vae = flux.vae
    for name, pipe in (("mini-flux", flux), ("mini-sd3", sd3)):
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    """Weights and cache of their own, with both pipelines packed."""
    for module in (pack, unpack):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setenv("RALU_CACHE", str(tmp_path / "cache"))
    for name in ("mini-flux", "mini-sd3"):
        pack.pack(name, saved / name)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked_contents(name):
    return contents(ralu.mini_path(name))


# ---- packing ----


def test_every_channel_is_rounded_to_127_levels_of_its_own():
    weight = torch.randn(5, 3, 4) * torch.tensor([1e-6, 1e-2, 1, 1e3, 0])[:, None, None]
    levels, scale = unpack.int8(weight)
    assert levels.dtype == torch.int8 and scale.shape == (5,)
    for row, of, step in zip(weight.flatten(1).tolist(), levels.flatten(1).tolist(), scale.tolist(), strict=True):
        assert max(map(abs, of)) == (127 if any(row) else 0)
        for value, level in zip(row, of, strict=True):
            assert abs(value - level * step) <= step / 2 * (1 + 1e-5)


def test_a_pipeline_comes_back(saved, place):
    """Large weights within half a level of their channel and half a float16 digit, everything else as it was."""
    for name in ("mini-flux", "mini-sd3"):
        stock = DiffusionPipeline.from_pretrained(saved / name)
        pipe = DiffusionPipeline.from_pretrained(ralu.mini_path(name))
        large = 0
        for part, module in stock.components.items():
            got = pipe.components[part]
            if part.startswith("tokenizer"):
                assert got(tiny.PROMPTS).input_ids == module(tiny.PROMPTS).input_ids
            elif not isinstance(module, torch.nn.Module):
                assert (got and dict(got.config)) == (module and dict(module.config))
            else:
                found = got.state_dict()
                for key, value in module.state_dict().items():
                    # Not text encoders: transformers loads half precision as it is, diffusers as float32.
                    half = not part.startswith("text")
                    assert found[key].dtype == value.dtype == torch.float32
                    if part == "vae" or not key.endswith("weight") or value.ndim < 2 or value.numel() < 4096:
                        assert torch.equal(found[key], value.half().float() if half else value), (part, key)
                        continue
                    large += 1
                    step = value.abs().flatten(1).amax(1).view(-1, *[1] * (value.ndim - 1)) / 127
                    allowed = step * (0.5 + 1e-4) + value.abs() * 2.0**-11 * half
                    assert ((found[key] - value).abs() <= allowed).all(), (part, key)
                    assert not torch.equal(found[key], value.half().float())
        assert large > 10


def test_what_is_alike_is_there_once(saved, place, tmp_path):
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (place / "weights" / "mini-flux" / weights).exists()
    assert not (place / "weights" / "mini-sd3" / "vae").exists()
    assert json.loads((place / "weights" / "mini-flux" / "shared.json").read_text()) == {}
    before = unpacked_contents("mini-sd3")
    assert before[weights] == unpacked_contents("mini-flux")[weights]
    other = tiny.flux(seed=1)
    other.save_pretrained(tmp_path / "other")
    pack.pack("mini-flux", tmp_path / "other")
    assert unpacked_contents("mini-sd3") == before  # it has its own again
    assert unpacked_contents("mini-flux")[weights] != before[weights]
    assert b"_name_or_path" not in b"".join(file.read_bytes() for file in (place / "weights").rglob("*.json"))


def test_a_transformer_alone(place, tmp_path):
    before = unpacked_contents("mini-flux")
    other = tiny.flux(seed=1).transformer
    other.save_pretrained(tmp_path / "transformer")
    pack.pack("mini-flux", tmp_path / "transformer")
    after = unpacked_contents("mini-flux")
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys() and changed == {unpack.TRANSFORMER}
    got = FluxTransformer2DModel.from_pretrained(ralu.mini_path() / "transformer").proj_out.weight
    torch.testing.assert_close(got, other.proj_out.weight, rtol=0, atol=other.proj_out.weight.abs().max().item() / 250)


def test_a_distilled_model_is_a_lora(place, tmp_path):
    """Its weights are those that diffusers makes of the base model's and the same LoRA."""
    pipe = FluxPipeline.from_pretrained(ralu.mini_path())
    targets = ["to_q", "ff.net.2", "proj_mlp"]
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.transformer))
    with pytest.raises(ValueError, match="source must be the folder of a pipeline, a transformer or, for mini-schnell"):
        pack.pack("mini-schnell", tmp_path / "lora")  # its scheduler is missing
    tiny.flux(dynamic=False).scheduler.save_pretrained(tmp_path / "lora" / "scheduler")
    pack.pack("mini-schnell", tmp_path / "lora")
    own = {path.name for path in (place / "weights" / "mini-schnell").rglob("*") if path.is_file()}
    assert {LORA, "shared.json"} <= own <= {LORA, "shared.json", "scheduler_config.json"}

    base = FluxPipeline.from_pretrained(ralu.mini_path())
    before = {name: value.clone() for name, value in base.transformer.state_dict().items()}
    base.load_lora_weights(ralu.mini_path("mini-schnell"))  # it is in the folder
    base.fuse_lora()
    base.unload_lora_weights()
    distilled = FluxPipeline.from_pretrained(ralu.mini_path("mini-schnell"))
    assert not distilled.scheduler.config.use_dynamic_shifting
    changed = 0
    for name, value in distilled.transformer.state_dict().items():
        expected = base.transformer.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=2.0**-10, atol=1e-4)  # float16, of the base and of the sum
        changed += not torch.allclose(expected, before[name], atol=1e-3)
    assert changed == 2 + 2 + 2 + 2  # to_q of all four blocks, two of each other

    other = tiny.flux().transformer
    other.add_adapter(LoraConfig(r=3, target_modules=["proj_mlp"]))
    layers = {name.replace("proj_mlp", "mlp"): value for name, value in get_peft_model_state_dict(other).items()}
    pipe.save_lora_weights(tmp_path / "lora", layers)
    with pytest.raises(ValueError, match=r"mlp\.lora_[AB]\.weight is no factor"):
        pack.pack("mini-schnell", tmp_path / "lora")


def test_the_packing_command(saved, place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pack", "mini-flux", str(saved / "mini-flux")])
    pack.main()
    size = sum(file.stat().st_size for file in (place / "weights" / "mini-flux").rglob("*") if file.is_file())
    assert f"mini-flux: {size / 1e6:.2f} MB" in capsys.readouterr().out
    before = contents(place / "weights")
    broken = place / "broken"
    shutil.copytree(saved / "mini-flux", broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for source, words in ((broken, "vae has no whole file of weights"), (place, "must be the folder of a pipeline")):
        monkeypatch.setattr(sys, "argv", ["pack", "mini-flux", str(source)])
        with pytest.raises(SystemExit):
            pack.main()
        assert words in capsys.readouterr().err
    assert contents(place / "weights") == before


def test_the_packed_models_are_small():
    files = {name: [file for file in (unpack.WEIGHTS / name).rglob("*") if file.is_file()] for name in NAMES}
    assert sum(file.stat().st_size for some in files.values() for file in some) < 36e6
    assert json.loads((unpack.WEIGHTS / "mini-flux" / "shared.json").read_text()) == {}  # a wheel has it alone


# ---- the cache ----


def test_another_pack_is_another_folder(place, saved):
    first = ralu.mini_path("mini-sd3")
    stamp = first.stat().st_mtime_ns
    assert first.parent == place / "cache" and ralu.mini_path("mini-sd3") == first
    assert first.stat().st_mtime_ns == stamp
    file = place / "weights" / "mini-flux" / "vae" / "config.json"  # shared
    file.write_text(file.read_text()[:-1] + " ")  # of the same size
    second = ralu.mini_path("mini-sd3")
    assert second != first and first.is_dir()
    assert (second / "vae" / "config.json").read_text() == file.read_text()


# Stops in the middle of unpacking, when some files are written, until it is told to go on.
CHILD = """
import pathlib, sys
import safetensors.torch
from ralu.mini import unpack
unpack.WEIGHTS = pathlib.Path(sys.argv[1])
load, ready = safetensors.torch.load, []
def waiting(data):
    if not ready:
        ready.append(print("ready", flush=True))
        sys.stdin.readline()
    return load(data)
safetensors.torch.load = waiting
print(unpack.unpacked("mini-flux"), flush=True)
"""


def test_several_processes_at_once(place, saved, tmp_path):
    """All give out one whole folder; of one killed in the middle nothing is taken for a model, or stays."""
    command = [sys.executable, "-c", CHILD, str(place / "weights")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    assert len(list((place / "cache").glob("unpacking-*/mini-flux/model_index.json"))) == 2
    folder = ralu.mini_path()
    whole = contents(folder)
    assert processes[0].communicate("go\n")[0] == f"{folder}\n"
    processes[1].kill()
    assert processes[1].wait() != 0 and contents(folder) == whole
    (left,) = (place / "cache").glob("unpacking-*")
    assert {path.name for path in (place / "cache").iterdir()} == {left.name, folder.name}
    ralu.mini_path("mini-sd3")
    assert left.exists()  # it may be somebody's who is at work
    shutil.rmtree(ralu.mini_path("mini-sd3"))
    os.utime(left, (time.time() - 7200,) * 2)
    ralu.mini_path("mini-sd3")
    assert not left.exists()


def test_a_write_that_is_cut_off(place):
    """As on a full disk: an error that says what to do, nothing left, and a later try succeeds."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot unpack mini-flux into .*/cache \(File too large\): RALU_CACHE can"):
            ralu.mini_path()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((place / "cache").iterdir()) == []
    assert FluxPipeline.from_pretrained(ralu.mini_path())


@pytest.mark.parametrize("obstacle", ["file", "permissions", "/proc"])
def test_a_cache_that_cannot_be_written(obstacle, place, monkeypatch, capsys):
    if obstacle == "permissions" and os.geteuid() == 0:
        pytest.skip("root may write in every folder, whatever its permissions")
    if obstacle == "/proc" and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, where not even root can make files")
    cache = {"file": place / "file" / "cache", "permissions": place / "closed", "/proc": Path("/proc")}[obstacle]
    (place / "file").touch()
    (place / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("RALU_CACHE", str(cache))
    with pytest.raises(OSError, match=rf"cannot unpack mini-flux into {cache} \(.+\): RALU_CACHE can name another"):
        ralu.mini_path()
    assert main(["estimate", "--model", "mini-flux"]) == 2
    assert capsys.readouterr().err.startswith(f"ralu: --model: cannot unpack mini-flux into {cache} (")


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", None, "{home}/.cache/ralu"),
        ("linux", "XDG_CACHE_HOME", "/there/ralu"),
        ("darwin", None, "{home}/Library/Caches/ralu"),
        ("win32", "LOCALAPPDATA", "/there/ralu"),
        ("linux", "RALU_CACHE", "/there"),
    ],
)
def test_where_the_cache_is(platform, variable, folder, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("RALU_CACHE", "")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "/there")
    assert str(cache_folder()) == folder.format(home=Path.home())


# ---- names and loading ----


@pytest.mark.parametrize("name", ["mini", "flux", "sd3", "schnell", "mini_flux", "", None, 3, Path("mini-flux")])
def test_models_have_one_name(name):
    message = f"name must be mini-flux, mini-sd3 or mini-schnell, got {re.escape(repr(name))}"
    for function in (ralu.mini_path, ralu.mini_pipeline):
        with pytest.raises(ValueError if isinstance(name, str) else TypeError, match=message):
            function(name)


def test_a_model_that_is_not_installed(place, capsys):
    with pytest.raises(FileNotFoundError, match=r"^mini-schnell is no part of the wheel: install RALU from its source"):
        ralu.mini_path("mini-schnell")
    assert main(["estimate", "--model", "mini-schnell"]) == 2
    assert capsys.readouterr().err.startswith("ralu: --model: mini-schnell is no part of the wheel: install")
    assert main(["info"]) == 0
    assert "mini-schnell  mini-schnell is no part of the wheel" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_loaded_without_a_size_or_a_warning(name):
    """Diffusers' loggers do not propagate, so pytest's own handler would not hear them."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        pipe = ralu.mini_pipeline(name)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert messages == []
    pipe.set_progress_bar_config(disable=True)
    assert pipe("fox", num_inference_steps=1, max_sequence_length=16).images[0].size == (256, 256)


def test_loaded_in_another_dtype(place):
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype or None, got 'bfloat16'"):
        ralu.mini_pipeline(dtype="bfloat16")
    for dtype in (None, torch.bfloat16):
        pipe = ralu.mini_pipeline("mini-flux", dtype)
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert len(modules) == 4 and {module.dtype for module in modules} == {dtype or torch.float32}


def test_further_training_starts_from_the_embedded_model_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    images = torch.rand(len(train.CAPTIONS), 3, 256, 256).mul(2).sub(1)
    small = replace(train.FAMILIES["mini-flux"], turns=((128, 1),))
    monkeypatch.setattr(train, "pictures", lambda cache: images)
    monkeypatch.setattr(train, "sheet", lambda pipe, **call: Image.new("RGB", (8, 8)))
    monkeypatch.setitem(train.FAMILIES, "mini-flux", small)
    embedded = FluxTransformer2DModel.from_pretrained(ralu.mini_path() / "transformer").state_dict()
    steps = []
    for _ in range(2):
        train.main(["--minutes", "1e-3", "--out", str(tmp_path), "--device", "cpu"])
        steps.append(torch.load(tmp_path / "transformer.pt")["step"])
    assert 0 < steps[0] < steps[1]
    trained = FluxTransformer2DModel.from_pretrained(tmp_path / "mini-flux").state_dict()
    for name, weights in embedded.items():
        torch.testing.assert_close(trained[name], weights, rtol=0, atol=0.01)  # a few steps of rates that still rise
    assert any(not torch.equal(trained[name], weights) for name, weights in embedded.items())
