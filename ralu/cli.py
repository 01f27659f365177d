"""The command line: `ralu generate`, `compare` and so on. Heavy imports wait until they are needed."""

import argparse
import json
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import __version__
from .mini import mini_path
from .schedule import DISTILLED, PRESETS, Schedule, preset, presets, solve

PROMPTS = ["fox", "penguin", "strawberry", "hamburger", "sunflower", "tropical fish"]  # names the embedded models know
METHODS = {
    "flux": ["stock-50", "stock-10", "flux-5x", "flux-7x"],
    "sd3": ["stock-28", "stock-10", "sd3-2x", "sd3-3x"],
}
NAMES = ", ".join([*PRESETS, *DISTILLED])
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MINI = {"mini": "flux", "mini-flux": "flux", "mini-sd3": "sd3"}  # the embedded models' families
# The embedded models' captions are short; padding them to hundreds of tokens would only cost time.
MINI_CALL = {"flux": {"max_sequence_length": 32}, "sd3": {"max_sequence_length": 32, "guidance_scale": 2.0}}
FIRST = {family: presets(family)[:1] for family in METHODS}
DEFAULT = "flux-5x, or sd3-2x for SD3"


class Mistake(Exception):
    """What the user can put right: one line, exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text, width, indent):  # keep the lines of examples, fill all other paragraphs
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


@dataclass(frozen=True)
class Method:
    """How to sample: RALU with a preset, or the stock pipeline (preset None) with so many steps (None: its default)."""

    name: str
    preset: str | None = None
    steps: int | None = None


def _method(text: str) -> Method:
    if text in PRESETS or text in DISTILLED:
        return Method(text, preset=text)
    stock = re.fullmatch(r"stock(?:-([1-9]\d*))?", text)
    if not stock:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {NAMES}, stock, stock-STEPS")
    return Method(text, steps=int(stock[1]) if stock[1] else None)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels, such as 256, nor HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _file(*suffixes: str) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(suffixes)}")
        return Path(text)

    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ralu",
        formatter_class=_Help,
        description="Region-adaptive latent upsampling: FLUX and SD3 several times cheaper, without training.",
        epilog="""examples:
  ralu generate "fox" -o fox.png
  ralu compare                          stock and RALU side by side, with times
  ralu compare --model mini-sd3         the same for SD3
  ralu regions --ratios .1 .2 .3        which regions go to full resolution first
  ralu schedule --steps 4 5 6 --ends .3 .45 1
  ralu estimate --model sd3-medium      operations and memory, before anything runs
  ralu COMMAND --help                   a command's options""",
    )
    parser.add_argument("--version", action="version", version=f"ralu {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for add in (_add_generate, _add_compare, _add_regions, _add_schedule, _add_estimate):
        add(commands)
    return parser


def _add(commands, run: Callable, name: str, summary: str, more: str, examples: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {more}"
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n{examples}", formatter_class=_Help
    )
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("model").add_argument
    known = "mini or mini-sd3 (embedded FLUX and SD3), a pipeline folder, or a hub id (default: mini)"
    add("--model", default="mini", help=known)
    add("--size", type=_size, help="pixels: 256, or HEIGHTxWIDTH (default: the model's own; 256 for the embedded)")
    add("--seed", type=int, default=0, help="of the first prompt; each further one adds 1 (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, the best there is)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto (default) is float32 on a CPU, else bfloat16",
    )


def _add_output(parser: argparse.ArgumentParser, default: str, *more: str):
    kind = _file(*PICTURES, *more)
    parser.add_argument(
        "-o", "--output", type=kind, default=Path(default), metavar="FILE", help=f"where to save (default: {default})"
    )


def _add_generate(commands):
    parser = _add(
        commands,
        _generate,
        "generate",
        "paint pictures",
        "Several prompts make several numbered files.",
        """  ralu generate "fox"
  ralu generate "fox" "penguin" --preset flux-7x --seed 3 -o pictures/animal.png
  ralu generate "fox" --model mini-sd3
  ralu generate "fox" --preset stock --steps 50
  ralu generate "a lighthouse at dusk" --model black-forest-labs/FLUX.1-dev --size 1024x768""",
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT")
    add("--preset", type=_method, help=f"{NAMES}, or stock (default: {DEFAULT})")
    add("--steps", type=_count, help="for --preset stock alone: a RALU preset has its own")
    add("--ratio", type=_share, help="share of the regions to enlarge early (default: the preset's)")
    _add_output(parser, "out.png")
    _add_model(parser)


def _add_compare(commands):
    parser = _add(
        commands,
        _compare,
        "compare",
        "paint the same pictures with several methods and time them",
        "A row for each method, a column for each prompt. A method's pictures are made in one batch, after a short "
        "warm-up that is not timed. Speed-ups are against the first method.",
        """  ralu compare
  ralu compare "fox" "pizza" --methods stock-20 flux-5x --seed 7
  ralu compare "a red bicycle" --model black-forest-labs/FLUX.1-dev""",
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help=f"(default: {', '.join(PROMPTS)})")
    add(
        "--methods",
        nargs="+",
        type=_method,
        metavar="METHOD",
        help=f"{NAMES}, stock-STEPS (default: {' '.join(METHODS['flux'])}; for SD3 {' '.join(METHODS['sd3'])})",
    )
    _add_output(parser, "outputs/compare.png")
    _add_model(parser)


def _add_regions(commands):
    parser = _add(
        commands,
        _regions,
        "regions",
        "show which regions go to full resolution first",
        "They are the blue squares over the half-resolution preview at the end of stage 1. The last row is the "
        "finished picture, painted with the preset's own ratio.",
        """  ralu regions
  ralu regions "fox" "pizza" --ratios .1 .2 .3""",
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help=f"(default: {', '.join(PROMPTS)})")
    add("--ratios", nargs="+", type=_share, metavar="RATIO", help="shares to show (default: the preset's)")
    add("--preset", type=_method, help=f"{NAMES} (default: {DEFAULT})")
    _add_output(parser, "outputs/regions.png")
    _add_model(parser)


def _add_schedule(commands):
    parser = _add(
        commands,
        _schedule,
        "schedule",
        "print and plot a time schedule",
        "Either a preset's, or the best one for given steps and stage ends, which is solved for.",
        """  ralu schedule --preset flux-7x
  ralu schedule --steps 4 5 6 --ends .3 .45 1 --shift 3""",
    )
    add = parser.add_argument
    add("--preset", choices=[*PRESETS, *DISTILLED], metavar="PRESET", help=f"{NAMES} (default: flux-5x)")
    add("--steps", nargs=3, type=_count, metavar="N", help="transformer calls of the three stages")
    add("--ends", nargs=3, type=float, metavar="T", help="times at which the three stages end, the last 1")
    add("--shift", type=float, default=3.0, help="the model's own: 3 for FLUX.1-dev, 1 for FLUX.1-schnell (default: 3)")
    _add_output(parser, "outputs/schedule.png", ".svg", ".pdf")


def _add_estimate(commands):
    parser = _add(
        commands,
        _estimate,
        "estimate",
        "count a run's operations and memory before it is run",
        "Nothing is allocated and no weights are read. Operations are those of matrix products and convolutions, a "
        "multiply-add being two, without and with attention's two matrix products; the paper's figures are without. "
        "The memory is that of a pipeline that is wholly on the device.",
        """  ralu estimate
  ralu estimate --model sd3-medium --methods stock-28 sd3-2x sd3-3x --batch 4
  ralu estimate --size 2048x1024 --ratio .3 --json""",
    )
    add = parser.add_argument
    known = "flux-dev, sd3-medium, ..., mini, mini-sd3, a pipeline folder, or a hub id (default: flux-dev)"
    add("--model", default="flux-dev", help=known)
    add(
        "--methods",
        nargs="+",
        type=_method,
        metavar="METHOD",
        help=f"{NAMES}, stock-STEPS (default: stock-50 flux-5x; for SD3 stock-28 sd3-2x)",
    )
    add("--size", type=_size, help="pixels: 256, or HEIGHTxWIDTH (default: 1024; 256 for the embedded models)")
    add("--ratio", type=_share, help="share of the regions to enlarge early (default: the preset's)")
    add("--text-tokens", type=_count, metavar="N", help="of T5 (default: 512, for SD3 256, for the embedded models 32)")
    add("--batch", type=_count, default=1, metavar="N", help="pictures in one run (default: 1)")
    add(
        "--guidance",
        action=argparse.BooleanOptionalAction,
        help="with a pass for a negative prompt in every step; FLUX: true CFG (default: for SD3 alone)",
    )
    add("--no-preview", action="store_true", help="regions by gradient, which decodes no preview")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16)")
    add("--json", action="store_true", help="print JSON instead of tables")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' notices about optional packages, and without bars over files that load in a second."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (of_diffusers, of_transformers)]
    try:
        for log, _, _ in before:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _source(model: str, names: Iterable[str] = MINI) -> str:
    """The folder or hub id that --model means. names: what else it may be, for the error."""
    if model in MINI:
        return str(mini_path(MINI[model]))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise Mistake(f"--model: the folder {model} is no pipeline, it has no model_index.json")
        return str(folder)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise Mistake(f"--model: {model} is neither {', nor '.join(names)}, nor a folder, nor a hub id (owner/name)")
    return model


def _is_mini(source: str, family: str) -> bool:
    try:
        return Path(source).resolve() == mini_path(family).resolve()
    except ValueError:  # a checkout without it
        return False


def _place(args: argparse.Namespace) -> tuple[str, str]:
    """The names of the device and of the dtype."""
    import torch

    device = args.device
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Mistake(f"--device: {device} cannot be used: {_short(error)}") from error
    if args.dtype != "auto":
        return device, args.dtype
    return device, "float32" if device.startswith("cpu") else "bfloat16"


def _load(model: str, source: str, dtype: str):
    import torch
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, dtype=getattr(torch, dtype))
    except Exception as error:  # the hub, the network and every file format have errors of their own
        why = "" if Path(source).is_dir() else "there is no such folder, and the hub did not give it: "
        raise Mistake(f"--model: cannot load {model}: {why}{_short(error)}") from error


@dataclass
class Painting:
    """What one batch gave: pictures, wall seconds, and the transformer calls that were counted."""

    images: list
    seconds: float
    calls: int


class Painter:
    """A pipeline with the size, device and seeds that the arguments ask for.

    methods: what it is going to paint with; None for a family's own, by the lists in `default`.
    """

    def __init__(self, args: argparse.Namespace, methods: list[Method] | None, default: dict[str, list[str]]):
        source = _source(args.model)
        with _quiet():
            from .pipeline import family  # its imports are chatty too

            device, dtype = _place(args)
            self.pipe = _load(args.model, source, dtype).to(device)
        name = family(self.pipe)
        self.methods = methods or [_method(text) for text in default[name]]
        mini = _is_mini(source, name)
        own = 256 if mini else self.pipe.default_sample_size * self.pipe.vae_scale_factor
        height, width = args.size or (own, own)
        self._check_presets(presets(name))
        self._check_size(height, width)
        self.seed = args.seed
        self.call = {"height": height, "width": width} | (MINI_CALL[name] if mini else {})
        self.where = f"{args.model} on {device}, {dtype}, {height}×{width} pixels"

    def _check_presets(self, fitting: list[str]):
        for method in self.methods:
            if method.preset and method.preset not in fitting:
                raise Mistake(f"{method.name} is not for a {type(self.pipe).__name__}; choose of {', '.join(fitting)}")

    def _check_size(self, height: int, width: int):
        """The pipeline would round other sizes; say so before it does."""
        unit = self.pipe.vae_scale_factor * (4 if any(method.preset for method in self.methods) else 2)
        if height % unit or width % unit:
            near = [[unit * max(1, pixels // unit + up) for pixels in (height, width)] for up in (0, 1)]
            raise Mistake(
                f"--size: height and width must divide by {unit}, got {height}x{width}; "
                f"the nearest are {near[0][0]}x{near[0][1]} and {near[1][0]}x{near[1][1]}"
            )

    def use(self, method: Method, schedule: Schedule | None = None, **options):
        """Switch the pipeline to a method; a schedule replaces the preset's."""
        from .pipeline import disable, enable

        if method.preset is None:
            disable(self.pipe)
        else:
            enable(self.pipe, schedule or method.preset, **options)

    def warm_up(self, method: Method, prompts: list[str]):
        """As few steps as can be at every resolution of a method: compilation and first allocations happen here."""
        self.use(method)
        if method.preset:
            self.use(method, replace(self.pipe.scheduler.schedule, steps=(1, 1, 1)))
        self.paint(replace(method, steps=1), prompts, f"{method.name}, warm-up", leave=False)

    def paint(self, method: Method, prompts: list[str], label: str, first: int = 0, **bar) -> Painting:
        """A picture for each prompt, in one batch. first: the first prompt's place among all, which sets its seed."""
        import torch

        calls = []
        hook = self.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        self.pipe.set_progress_bar_config(desc=label, dynamic_ncols=True, **({"leave": True} | bar))
        # A preset has its own number whatever is asked for, but SD3's progress bar goes by what is asked for.
        count = sum(self.pipe.scheduler.schedule.steps) if method.preset else method.steps
        steps = {"num_inference_steps": count} if count else {}
        generators = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(prompts))]
        try:
            start = time.perf_counter()
            images = self.pipe(prompts, generator=generators, **steps, **self.call).images
            return Painting(images, time.perf_counter() - start, len(calls))
        finally:
            hook.remove()


def _generate(args: argparse.Namespace):
    method, ratio = args.preset, {} if args.ratio is None else {"ratio": args.ratio}
    stock = method is not None and not method.preset
    if args.steps and not stock:
        raise Mistake("--steps: RALU's presets have their own steps, only --preset stock takes a number")
    if stock and ratio:
        raise Mistake(f"--ratio: {method.name} has no regions, choose one of {NAMES}")
    if args.steps:
        method = replace(method, steps=args.steps)
    painter = Painter(args, method and [method], FIRST)
    method = painter.methods[0]
    painter.use(method, **ratio)
    print(f"{painter.where}, {method.name}")
    for i, prompt in enumerate(args.prompts):
        painting = painter.paint(method, [prompt], label=prompt[:40], first=i)
        path = args.output
        if len(args.prompts) > 1:
            path = path.with_stem(f"{path.stem}-{i + 1:0{len(str(len(args.prompts)))}d}")
        painting.images[0].save(path)
        print(f"{path}: {painting.seconds:.1f} s, {painting.calls} transformer calls, seed {args.seed + i}")


def _compare(args: argparse.Namespace):
    painter = Painter(args, args.methods, METHODS)
    prompts = args.prompts or PROMPTS
    print(f"{painter.where}, {len(prompts)} pictures with each method")
    warm, paintings = set(), []
    for method in painter.methods:
        if method.preset not in warm:  # all stock methods share their shapes
            painter.warm_up(method, prompts)
            warm.add(method.preset)
        painter.use(method)
        paintings.append(painter.paint(method, prompts, method.name))

    from .figures import Row, fitted, grid

    rows = []
    wide = max(len("method"), *(len(method.name) for method in painter.methods))
    print(f"\n{'method':<{wide}}  seconds  transformer calls  speed-up")
    for method, painting in zip(painter.methods, paintings, strict=True):
        seconds, calls, speedup = painting.seconds, painting.calls, paintings[0].seconds / painting.seconds
        print(f"{method.name:<{wide}}  {seconds:>7.2f}  {calls:>17}  {speedup:>7.2f}x")
        details = [f"{seconds:.1f} s", f"{calls} transformer calls"]
        rows.append(Row(method.name, [fitted(image) for image in painting.images], details, f"{speedup:.1f}×"))
    note = f"{painter.where}. Seconds for a row, in one batch; speed-up over the first row. Same seeds in all rows."
    grid(prompts, rows, note).save(args.output)
    print(f"\n{args.output}")


def _regions(args: argparse.Namespace):
    method, prompts = args.preset, args.prompts or PROMPTS
    if method and not method.preset:
        raise Mistake(f"--preset: {method.name} has no regions, choose one of {NAMES}")
    painter = Painter(args, method and [method], FIRST)
    method = painter.methods[0]

    from ralu_kernels import plan_tokens

    from .figures import Row, fitted, grid, overlay
    from .flux import decode
    from .regions import edge_density

    seen = {}

    def scorer(x0, cells):
        """The pipeline's own scorer; it keeps what it saw."""
        previews = decode(painter.pipe, x0, cells)
        seen.update(cells=cells, scores=edge_density(previews, cells))
        seen["previews"] = painter.pipe.image_processor.postprocess(previews.detach(), output_type="pil")
        return seen["scores"]

    painter.use(method, regions=scorer)
    own = painter.pipe.scheduler.schedule.ratio
    print(f"{painter.where}, {method.name}")
    painting = painter.paint(method, prompts, method.name)

    cells, total, rows = seen["cells"], seen["scores"].shape[1], []
    finished = [fitted(image) for image in painting.images]
    previews = [preview.resize(finished[0].size) for preview in seen["previews"]]
    for ratio in args.ratios or [own]:
        plan = plan_tokens(seen["scores"], cells, ratio=ratio)
        chosen = [_promoted(plan, i) for i in range(len(prompts))]
        marked = [overlay(preview, tokens, cells) for preview, tokens in zip(previews, chosen, strict=True)]
        rows.append(Row(f"{ratio:.0%} first", marked, [f"{len(chosen[0])} of {total} regions", "over the preview"]))
        print(f"ratio {ratio:g}: {len(chosen[0])} of {total} regions")
    rows.append(Row("finished", finished, [f"{method.name}, {own:.0%} first", f"{painting.calls} transformer calls"]))
    note = f"{painter.where}. The preview is the picture predicted at the end of stage 1, at half resolution."
    grid(prompts, rows, note).save(args.output)
    print(args.output)


def _promoted(plan, sample: int) -> list[int]:
    """The low tokens that go to full resolution first, by their place in the raster."""
    rows = slice(*plan.cu_seqlens[sample : sample + 2].tolist())
    return plan.source[rows][plan.child[rows] == 0].tolist()


def _schedule(args: argparse.Namespace):
    from .figures import plot_schedule

    if (args.steps is None) != (args.ends is None):
        raise Mistake("--steps and --ends belong together: give both, or a --preset")
    if args.steps and args.preset:
        raise Mistake("--preset: give a preset, or --steps and --ends, not both")
    if not args.shift > 0:
        raise Mistake(f"--shift: must be positive, got {args.shift:g}")
    if args.steps:
        name, schedule = "solved", solve(tuple(args.steps), tuple(args.ends), shift=args.shift)
    else:
        name = args.preset or "flux-5x"
        schedule = preset(name, shift=args.shift)

    title = f"{name}: {sum(schedule.steps)} transformer calls, c = {schedule.c:.4f}"
    plot_schedule(schedule, args.shift, args.output, title)
    print(f"{title}, ratio = {schedule.ratio:g}\n")
    print("stage                from t    to t  shift h  steps  sigmas")
    for k, stage in enumerate(("half resolution", "mixed resolution", "full resolution")):
        start, end, shift, steps = (x[k] for x in (schedule.starts, schedule.ends, schedule.shifts, schedule.steps))
        sigmas = " ".join(f"{sigma:.4f}" for sigma in schedule.sigmas(k + 1))
        print(f"{k + 1} {stage:<18}{start:>7.4f} {end:>7.4f}  {shift:>7.4f}  {steps:>5}  {sigmas}")
    print("\njump     from t  back to t  scale a  noise scale b")
    for k, move in enumerate(schedule.transitions):
        times = f"{schedule.ends[k]:>6.4f}  {move.start:>9.4f}"
        print(f"{k + 1} to {k + 2}   {times}  {move.scale:>7.4f}  {move.noise_scale:>13.4f}")
    print(f"\n{args.output}")


def _estimate(args: argparse.Namespace):
    with _quiet():
        import torch

        from .cost import MODELS, describe, estimate

        source = args.model if args.model in MODELS else _source(args.model, [*MODELS, *MINI])
        family = describe(source).family
        mini = _is_mini(source, family)
        height, width = args.size or ((256, 256) if mini else (1024, 1024))
        tokens = args.text_tokens or (MINI_CALL[family]["max_sequence_length"] if mini else None)
        estimates = {}
        for method in args.methods or [_method(text) for text in (METHODS[family][0], FIRST[family][0])]:
            if not (method.preset or method.steps):
                raise Mistake("--methods: stock needs its number of steps, such as stock-50")
            estimates[method.name] = estimate(
                source,
                method.preset or method.steps,
                height=height,
                width=width,
                ratio=args.ratio if method.preset else None,
                text_tokens=tokens,
                batch=args.batch,
                guided=args.guidance,
                preview=not args.no_preview,
                dtype=getattr(torch, args.dtype),
            )
    if args.json:
        where = {"model": args.model, "height": height, "width": width, "batch": args.batch, "dtype": args.dtype}
        print(json.dumps(where | {"methods": {name: cost.to_dict() for name, cost in estimates.items()}}, indent=2))
        return
    print(f"{args.model}, {height}×{width} pixels, {args.batch} in a batch, {args.dtype}")
    (base, first), *_ = estimates.items()
    for name, cost in estimates.items():
        print(f"\n{name}\n{cost}")
        if cost is not first:
            less, within = first.tflop / cost.tflop, first.total / cost.total
            print(f"{base} takes {less:.2f} times as many operations, with attention {within:.2f} times")


def _make_room(path: Path):
    """Create the output's folder, and find out before the work, not after it, whether it can be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output: cannot create the folder {path.parent}: {error.strerror}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Mistake(f"--output: cannot write to {path}")


def _short(error: BaseException, limit: int = 200) -> str:
    """A library's error, which may be pages long, as part of a line."""
    return textwrap.shorten(str(error), limit, placeholder=" …") or type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 after a mistake (told in one line), 130 after ctrl-C."""
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        if "run" not in args:
            parser.error("which command? generate, compare, regions, schedule or estimate")
        if "output" in args:
            _make_room(args.output)
        args.run(args)
    except BrokenPipeError:  # `ralu schedule | head`: nobody reads on, and Python would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Mistake, ValueError, OSError) as error:
        print(f"ralu: {_short(error, limit=1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nralu: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
