"""`ralu evaluate`: a file of prompts, several methods, scores and a report."""

import argparse
from pathlib import Path

from ..evaluation.layouts import LAYOUTS
from ..evaluation.metrics import METRICS, check_scores
from ..evaluation.prompts import Sample, read_prompts
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "evaluate",
        "run a file of prompts with several methods and score the images",
        "An interrupted run goes on where it was; `accelerate launch` spreads it over GPUs or processes. The folder's "
        "report.html has a table and images. A metric that lacks a package or weights is left out and says so.",
        """  ralu evaluate --prompts prompts.txt --methods stock-50 flux-5x --metrics niqe
  accelerate launch --num_processes 8 -m ralu evaluate --prompts evaluation_metadata.jsonl \\
      --samples 4 --metrics geneval --model black-forest-labs/FLUX.1-dev -o geneval""",
    )
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help='text, a prompt a line, or .jsonl with a "prompt"')
    arguments.add_methods(parser, "stock-50 stock-10 flux-5x flux-7x; for SD3 stock-28 stock-10 sd3-2x sd3-3x")
    names = [*METRICS, *LAYOUTS]
    add(
        "--metrics",
        nargs="+",
        choices=names,
        default=["niqe"],
        metavar="METRIC",
        help=f"{', '.join(names)} (default: niqe)",
    )
    samples = "images of a prompt; their seeds differ by 1000000 (default: 1)"
    add("--samples", type=arguments.count, default=1, metavar="N", help=samples)
    add("--batch", type=arguments.count, default=1, metavar="N", help="images generated at once (default: 1)")
    add(
        "-o", "--output", type=Path, default=Path("outputs/evaluation"), metavar="FOLDER",
        help="where all is kept (default: outputs/evaluation)",
    )  # fmt: skip
    arguments.add_model(parser)


def run(args: argparse.Namespace):
    """Generate what the folder lacks, score it, and write the report."""
    folder, prompts = args.output, read_prompts(args.prompts)
    samples = [Sample(prompt, number) for number in range(args.samples) for prompt in prompts]
    model, size = arguments.checked_model(args, args.methods or ())
    methods = list(dict.fromkeys(args.methods or model.methods))
    names, report = [str(method) for method in methods], folder / "report.html"
    arguments.check_output(report)
    check_scores(folder, names, args.metrics)

    from ..evaluation.folder import check_manifest, describe, read_manifest, write_text
    from ..evaluation.generate import check_images, generate, processes
    from ..evaluation.report import page, tabulate

    read_manifest(folder)
    check_images(folder, methods, samples)
    state = processes(args.device)
    if state.num_processes > 1:
        args.device = str(state.device)
    runner = arguments.make_runner(args, model, size)
    check_manifest(folder, describe(runner, methods, prompts), write=state.is_main_process)
    generate(runner, folder, methods, samples, args.batch, state)
    table = tabulate(folder, names, samples, args.metrics, state, str(runner.pipe.device))
    if state.is_main_process:
        write_text(report, page(runner.description, folder, table, prompts))
        for name, cells in table.rows.items():
            print(f"{name}: " + ", ".join(f"{head} {cell}" for head, cell in zip(table.heads, cells, strict=True)))
        print(*table.notes, report, sep="\n")
    state.destroy_process_group()
