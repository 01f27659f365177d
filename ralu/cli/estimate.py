"""`ralu estimate`: operations and memory of a run that is not made."""

import argparse
import json

from ..errors import UsageError, usage
from ..method import Method
from ..models import find_model, published, published_model
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "estimate",
        "count a run's operations and memory before it is run",
        "Nothing is allocated and no weights are read. Operations are those of matrix products and convolutions, a "
        "multiply-add being two, without and with attention's two matrix products; the paper's figures are without. "
        "The memory is that of a pipeline that is wholly on the device. Of a cache that "
        "goes by the image, what is expected is counted.",
        """  ralu estimate
  ralu estimate --model sd3-medium --methods stock-28 sd3-2x sd3-3x --batch 4
  ralu estimate --size 2048x1024 --ratio .3 --json""",
    )
    add = parser.add_argument
    known = "flux-dev, sd3-medium, ..., mini-flux, mini-sd3, a pipeline folder, or a hub id (default: flux-dev)"
    add("--model", default="flux-dev", help=known)
    arguments.add_methods(parser, "stock-50 flux-5x; for SD3 stock-28 sd3-2x")
    arguments.add_size(parser, "(default: 1024; 256 for the embedded models)")
    add("--ratio", type=arguments.share, help="share of the regions to upsample early (default: the preset's)")
    tokens = "of T5 (default: 512, for SD3 256, for the embedded models 32)"
    add("--text-tokens", type=arguments.count, metavar="N", help=tokens)
    add("--batch", type=arguments.count, default=1, metavar="N", help="images in one run (default: 1)")
    add(
        "--guidance",
        action=argparse.BooleanOptionalAction,
        help="with a pass for a negative prompt in every step; FLUX: true CFG (default: for SD3 alone)",
    )
    add("--no-preview", action="store_true", help="regions by gradient, which decodes no preview")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16)")
    add("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace):
    """Estimate every method and print tables or JSON."""
    model = published_model(args.model) if args.model in published() else find_model(args.model, published())
    methods = args.methods or [Method(f"stock-{model.stock_steps}"), Method(model.presets[0])]
    model.check_methods(methods)
    for method in methods:
        if not (method.preset or method.steps):
            raise UsageError("--methods: stock needs its number of steps, such as stock-50")
        if method.options.threshold is not None:
            raise UsageError(f"--methods: how many regions {method} upsamples early depends on the image; give a ratio")
    width, height = arguments.chosen_size(args, 256 if model.embedded else 1024)
    model.check_size(width, height)

    from ..runner import quiet

    with quiet():
        import torch

        from ..components import describe
        from ..cost import estimate

        with usage("--model", ValueError, OSError):  # configurations of its parts that are damaged, or not to be had
            describe(model.location)
        estimates = {
            str(method): estimate(
                model.location,
                method,
                height=height,
                width=width,
                ratio=_ratio(args, method),
                text_tokens=args.text_tokens or model.call_arguments.get("max_sequence_length"),
                batch=args.batch,
                guided=args.guidance,
                preview=method.options.regions in (None, "canny") and not args.no_preview,
                dtype=getattr(torch, args.dtype),
            )
            for method in methods
        }
    if args.json:
        settings = {"model": args.model, "height": height, "width": width, "batch": args.batch, "dtype": args.dtype}
        print(json.dumps(settings | {"methods": {name: cost.to_dict() for name, cost in estimates.items()}}, indent=2))
        return
    print(f"{args.model}, {width}×{height} pixels, {args.batch} in a batch, {args.dtype}")
    (base, first), *_ = estimates.items()
    for name, cost in estimates.items():
        print(f"\n{name}{' (at most: what the cache saves is not known)' * cost.at_most}\n{cost}")
        if cost is not first:
            less, within = first.tflop / cost.tflop, first.total / cost.total
            print(f"{base} takes {less:.2f} times as many operations, with attention {within:.2f} times")


def _ratio(args: argparse.Namespace, method: Method) -> float | None:
    if not method.has_regions or args.ratio is None:
        return method.options.ratio
    if method.options.ratio is not None:
        raise UsageError(f"--ratio: {method} says so already")
    return args.ratio
