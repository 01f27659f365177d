"""`ralu regions`: which regions go to full resolution first."""

import argparse
from dataclasses import replace

from ..errors import UsageError, usage
from ..method import Method
from ..mini import PROMPTS
from ..models import find_model
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "regions",
        "show which regions go to full resolution first",
        "They are the blue squares over the half-resolution preview at the end of stage 1, a row for each share of "
        "regions. The last row is the finished image, generated with the preset's own.",
        """  ralu regions
  ralu regions "fox" "pizza" --ratios .1 .2 .3 --regions gradient
  ralu regions "fox" --regions mask.png""",
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help=f"(default: {', '.join(PROMPTS)})")
    shares = {"nargs": "+", "type": arguments.share, "default": [0.1, 0.2, 0.3, 0.5]}
    add("--ratios", metavar="RATIO", help="shares to show (default: .1 .2 .3 .5)", **shares)
    add(
        "--preset", type=arguments.method, metavar="METHOD",
        help=f"{arguments.REGION_PRESETS} (default: the model's first)",
    )  # fmt: skip
    arguments.add_regions(parser)
    arguments.add_output(parser, "outputs/regions.png")
    arguments.add_model(parser)


def run(args: argparse.Namespace):
    """Run once, and mark the tokens that each ratio would have selected."""
    method, prompts = args.preset, args.prompts or PROMPTS
    if method and not method.has_regions:
        raise UsageError(f"--preset: {method} has no regions, choose one of {arguments.REGION_PRESETS}")
    method = method or Method(find_model(args.model).presets[0])
    if args.regions is not None:
        with usage("--regions"):
            method = replace(method, options=replace(method.options, regions=args.regions))
    model, size = arguments.checked_model(args, [method])
    arguments.check_output(args.output)
    runner = arguments.make_runner(args, model, size)

    from ralu_kernels import plan_tokens

    from ..families import load
    from ..figures import Row, fitted, grid, overlay

    runner.use(method)
    ratio, layouts = runner.pipe.scheduler.schedule.ratio, []

    def note_layout(pipe, step, timestep, tensors):
        layout = pipe.scheduler.layout
        if layout is not None and layout.plan is not None:
            layouts.append(layout)
        return tensors

    print(f"{runner.description}, {method}")
    result = runner.generate(prompts, str(method), callback=note_layout)

    layout, rows = layouts[0], []
    cells, scores = layout.plan.grid, layout.scores
    total = scores.shape[1]
    finished = [fitted(image) for image in result.images]
    decoded = load(model.family).decode(runner.pipe, layout.x0, cells).detach()
    previews = runner.pipe.image_processor.postprocess(decoded, output_type="pil")
    # They are of whole low tokens, which may reach beyond the image.
    sides = zip(finished[0].size, reversed(cells), size, strict=True)
    covered = [round(side * count * 4 * model.latent / pixels) for side, count, pixels in sides]
    previews = [preview.resize(covered) for preview in previews]
    for shown in args.ratios:
        plan = plan_tokens(scores, cells, ratio=shown)
        selected = [_selected(plan, i) for i in range(len(prompts))]
        marked = [overlay(preview, tokens, cells) for preview, tokens in zip(previews, selected, strict=True)]
        marked = [image.crop((0, 0, *finished[0].size)) for image in marked]
        rows.append(Row(f"{shown:.0%} first", marked, [f"{len(selected[0])} of {total} regions", "over the preview"]))
        print(f"ratio {shown:g}: {len(selected[0])} of {total} regions")
    first = "" if method.options.threshold is not None else f", {ratio:.0%} first"
    rows.append(Row("finished", finished, [f"{method}{first}", f"{result.calls} transformer calls"]))
    note = f"{runner.description}. The preview is the image predicted at the end of stage 1, at half resolution."
    arguments.save(grid(prompts, rows, note), args.output)
    print(args.output)


def _selected(plan, sample: int) -> list[int]:
    """Return the low tokens that go to full resolution first, by their place in the raster."""
    rows = slice(*plan.cu_seqlens[sample : sample + 2].tolist())
    return plan.source[rows][plan.child[rows] == 0].tolist()
