"""`ralu schedule`: a preset's times and noise levels, or those of a schedule that is solved for."""

import argparse

from ..errors import UsageError, usage
from ..method import SPATIAL, Method
from ..models import find_model, published, published_model
from ..presets import SOLVED, preset
from ..schedule import RESOLUTIONS, solve
from . import arguments


def add(commands):
    """Add the command to the command line."""
    parser = arguments.add_command(
        commands,
        run,
        "schedule",
        "print and plot a time schedule",
        "A preset's, the one of a speedup, or the best one for given steps and stage ends, which is solved for.",
        """  ralu schedule --preset flux-7x
  ralu schedule --speedup 3 --model sd3-medium
  ralu schedule --steps 4 5 6 --ends .3 .45 1 --shift 3""",
    )
    add = parser.add_argument
    add("--preset", choices=SPATIAL, metavar="PRESET", help=f"{', '.join(SPATIAL)} (default: flux-5x)")
    arguments.add_speedup(parser)
    known = "flux-dev, sd3-medium, ..., mini, mini-sd3, a pipeline folder, or a hub id (default: flux-dev)"
    add("--model", default="flux-dev", help=f"for --speedup: {known}")
    arguments.add_size(parser, "for --speedup (default: 1024; 256 for the embedded models)")
    add("--steps", nargs=3, type=arguments.count, metavar="N", help="transformer calls of the three stages")
    add("--ends", nargs=3, type=float, metavar="T", help="times at which the three stages end, the last 1")
    shifts = "the model's own: 3 for FLUX.1-dev, 1 for FLUX.1-schnell (default: the preset's own, else 3)"
    add("--shift", type=float, help=shifts)
    arguments.add_output(parser, "outputs/schedule.png", ".svg", ".pdf")


def run(args: argparse.Namespace):
    """Print the stages and the transitions, and save the plot."""
    if (args.steps is None) != (args.ends is None):
        raise UsageError("--steps and --ends belong together: give both, or a --preset")
    if sum(map(bool, (args.preset, args.speedup, args.steps))) > 1:
        raise UsageError("--preset, --speedup, and --steps and --ends: give one of them, not both")
    if args.shift is None:
        args.shift = (SOLVED[args.preset].shift if args.preset in SOLVED else None) or 3.0
    if not 0 < args.shift < float("inf"):
        raise UsageError(f"--shift: must be positive and finite, got {args.shift:g}")
    arguments.check_output(args.output)
    if args.speedup:
        method = Method(f"speedup-{args.speedup}")
        model = published_model(args.model) if args.model in published() else find_model(args.model, published())
        size = arguments.chosen_size(args, 256 if model.embedded else 1024)
        model.check_size(*size)

        from ..runner import quiet

        with quiet():
            name, schedule = str(method), model.budget(method, *size, shift=args.shift)
    elif args.steps:
        with usage("--ends"):
            name, schedule = "solved", solve(tuple(args.steps), tuple(args.ends), shift=args.shift)
    else:
        name = args.preset or "flux-5x"
        schedule = preset(name, shift=args.shift)

    from ..figures import plot_schedule

    title = f"{name}: {sum(schedule.steps)} transformer calls, c = {schedule.c:.4f}"
    with usage("--output", OSError):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        plot_schedule(schedule, args.shift, args.output, title)
    print(f"{title}{f', ratio = {schedule.ratio:g}' if schedule.mixed else ''}\n")
    print("stage                from t    to t  shift h  steps  sigmas")
    for k, (stage, start) in enumerate(zip(schedule.stages, schedule.starts, strict=True), 1):
        sigmas = " ".join(f"{sigma:.4f}" for sigma in schedule.sigmas(k))
        name = RESOLUTIONS[stage.resolution]
        print(f"{k} {name:<18}{start:>7.4f} {stage.end:>7.4f}  {stage.shift:>7.4f}  {stage.steps:>5}  {sigmas}")
    print("\njump     from t  back to t  scale a  noise scale b")
    for k, transition in enumerate(schedule.transitions):
        times = f"{schedule.ends[k]:>6.4f}  {transition.start:>9.4f}"
        print(f"{k + 1} to {k + 2}   {times}  {transition.scale:>7.4f}  {transition.noise_scale:>13.4f}")
    print(f"\n{args.output}")
