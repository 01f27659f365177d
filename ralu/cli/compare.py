"""`ralu compare`: the same images by several methods, side by side."""

import argparse

from ..mini import PROMPTS
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "compare",
        "generate the same images with several methods and time them",
        "A row for each method, a column for each prompt. A method's images are made in one batch, after a short "
        "warm-up that is not timed. Speed-ups are against the first method.",
        """  ralu compare
  ralu compare "fox" "pizza" --methods stock-20 flux-5x --seed 7
  ralu compare --model mini-schnell --methods stock-4 distilled-4
  ralu compare "a red bicycle" --model black-forest-labs/FLUX.1-dev""",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=f"(default: {', '.join(PROMPTS)})")
    arguments.add_methods(parser, "stock-50 stock-10 flux-5x flux-7x; for SD3 stock-28 stock-10 sd3-2x sd3-3x")
    arguments.add_output(parser, "outputs/compare.png")
    arguments.add_model(parser)


def run(args: argparse.Namespace):
    """Generate with each method, print the times, and draw the grid."""
    model, size = arguments.checked_model(args, args.methods or ())
    arguments.check_output(args.output)
    methods, prompts = args.methods or model.methods, args.prompts or PROMPTS
    runner = arguments.make_runner(args, model, size)
    print(f"{runner.description}, {len(prompts)} images with each method")
    warm, results = set(), []
    for method in methods:
        shapes = method.preset and str(method)  # all stock methods share theirs
        if shapes not in warm:
            runner.warm_up(method, prompts)
            warm.add(shapes)
        runner.use(method)
        results.append(runner.generate(prompts, str(method)))

    from ..figures import Row, fitted, grid

    rows = []
    width = max(len("method"), *(len(str(method)) for method in methods))
    print(f"\n{'method':<{width}}  seconds  transformer calls  speed-up")
    for method, result in zip(methods, results, strict=True):
        seconds, calls, speedup = result.seconds, result.calls, results[0].seconds / result.seconds
        print(f"{method!s:<{width}}  {seconds:>7.2f}  {calls:>17}  {speedup:>7.2f}x")
        details = [f"{seconds:.1f} s", f"{calls} transformer calls"]
        rows.append(Row(str(method), [fitted(image) for image in result.images], details, f"{speedup:.1f}×"))
    note = (
        f"{runner.description}. Seconds for a row, in one batch; speed-up over the first. The same seeds in all rows."
    )
    arguments.save(grid(prompts, rows, note), args.output)
    print(f"\n{args.output}")
