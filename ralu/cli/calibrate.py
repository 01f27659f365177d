"""`ralu calibrate`: what a cache has to know of a model, measured in runs of the stock pipeline."""

import argparse
import json
from pathlib import Path

from ..errors import usage
from ..method import Method
from ..mini import PROMPTS
from ..models import find_model
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "calibrate",
        "measure what a cache has to know of a model",
        "TeaCache skips a step where the input of the blocks hardly changed. How much the output changes then differs "
        "from model to model; a polynomial of degree 4 is fitted to runs of the stock pipeline.",
        """  ralu calibrate teacache --model mini-sd3 -o teacache.json
  ralu generate "fox" --model mini-sd3 --preset "stock-28+teacache(delta=0.2,coefficients=teacache.json)"
  ralu calibrate teacache --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt -o sd35.json""",
    )
    add = parser.add_argument
    add("cache", choices=["teacache"], metavar="CACHE", help="teacache")
    prompts = 'text, a prompt a line, or .jsonl with a "prompt" (default: the six captions of the embedded models)'
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--steps", type=arguments.count, metavar="N", help="of a run (default: the stock run's that RALU is held to)")
    add("--batch", type=arguments.count, default=1, metavar="N", help="images generated at once (default: 1)")
    add("-o", "--output", type=arguments.file(".json"), required=True, metavar="FILE", help="where to save")
    arguments.add_model(parser)


def run(args: argparse.Namespace):
    """Run the prompts, fit and save."""
    prompts = PROMPTS
    if args.prompts:
        from ..evaluation.prompts import read_prompts

        prompts = [prompt.text for prompt in read_prompts(args.prompts)]
    method = Method(f"stock-{args.steps or find_model(args.model).stock_steps}")
    model, size = arguments.checked_model(args, [Method.parse(f"{method}+{args.cache}")])
    arguments.check_output(args.output)
    runner = arguments.make_runner(args, model, size)
    runner.use(method)

    from ..caches.calibration import fit, recorded

    pairs = []
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first : first + args.batch]
        with recorded(runner.pipe.transformer, len(batch)) as found:
            seeds = [args.seed + first + i for i in range(len(batch))]
            runner.generate(batch, f"{method}, {first + len(batch)} of {len(prompts)} prompts", seeds)
        pairs += found
    with usage("--steps", ValueError):
        polynomial, error = fit(pairs)
    settings = {"cache": args.cache, "model": args.model, "width": size[0], "height": size[1], "steps": method.steps}
    result = settings | {"prompts": len(prompts), **polynomial._asdict(), "rms": error}
    with usage("--output", OSError):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{runner.description}, {method}")
    print(f"{len(pairs)} changes of up to {polynomial.largest:.1%}, of the output {polynomial.mean:.1%} on average")
    print(
        f"p = {' '.join(f'{c:+.6g}' for c in polynomial.coefficients)}, highest power first, to within {error:.1%} rms"
    )
    print(args.output)
