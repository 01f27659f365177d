"""`ralu generate`: an image for each prompt."""

import argparse
from dataclasses import replace

from ..errors import UsageError, usage
from ..method import CHOICES, Method
from ..models import find_model
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "generate",
        "generate images",
        "Several prompts make several numbered files.",
        """  ralu generate "fox"
  ralu generate "fox" "penguin" --preset flux-7x --seed 3 -o images/animal.png
  ralu generate "fox" --preset "flux-5x(ratio=0.3,granularity=token)"
  ralu generate "fox" --model mini-sd3 --speedup 4
  ralu generate "fox" --preset stock --steps 50
  ralu generate "a lighthouse at dusk" --model black-forest-labs/FLUX.1-dev --size 1024x768""",
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT")
    add(
        "--preset", type=arguments.method, metavar="METHOD",
        help=f"{arguments.PRESET_NAMES}, also as 'flux-5x(ratio=0.3)', or stock (default: the model's first)",
    )  # fmt: skip
    arguments.add_speedup(parser)
    add("--steps", type=arguments.count, metavar="N", help="for --preset stock alone: a RALU preset has its own")
    add("--ratio", type=arguments.share, help="share of the regions to upsample early (default: the preset's)")
    arguments.add_regions(parser)
    add("--solver", choices=CHOICES["solver"], help=f"of the steps (default: {CHOICES['solver'][0]})")
    arguments.add_output(parser, "out.png")
    arguments.add_model(parser)


def run(args: argparse.Namespace):
    """Generate and save."""
    method = _method(args)
    model, size = arguments.checked_model(args, [method])
    arguments.check_output(args.output)
    runner = arguments.make_runner(args, model, size)
    runner.use(method)
    print(f"{runner.description}, {method}")
    for i, prompt in enumerate(args.prompts):
        result = runner.generate([prompt], label=prompt[:40], seeds=[args.seed + i])
        path = args.output
        if len(args.prompts) > 1:
            path = path.with_stem(f"{path.stem}-{i + 1:0{len(str(len(args.prompts)))}d}")
        arguments.save(result.images[0], path)
        print(f"{path}: {result.seconds:.1f} s, {result.calls} transformer calls, seed {args.seed + i}")


def _method(args: argparse.Namespace) -> Method:
    """Return --preset or --speedup with --steps, --ratio, --regions and --solver as part of it."""
    method = args.preset
    if args.speedup:
        if method:
            raise UsageError("--speedup: give a speedup, or a --preset, not both")
        method = Method(f"speedup-{args.speedup}")
    if args.steps:
        if method is None or method.preset:
            raise UsageError("--steps: RALU's presets have their own steps, only --preset stock takes a number")
        if method.steps:
            raise UsageError(f"--steps: {method.spatial} says how many steps already, give --preset stock")
        method = replace(method, spatial=f"stock-{args.steps}")
    if method is None:
        method = Method(find_model(args.model).presets[0])
    for name in ("ratio", "regions", "solver"):
        value = getattr(args, name)
        if value is None:
            continue
        if not method.preset and name != "solver":
            names = arguments.REGION_PRESETS
            raise UsageError(f"--{name}: {method} upsamples nothing and has no regions, choose one of {names}")
        if getattr(method.options, name) is not None:
            raise UsageError(f"--{name}: --preset {method} says so already")
        with usage(f"--{name}"):
            method = replace(method, options=replace(method.options, **{name: value}))
    return method
