"""The command line: `ralu generate`, `compare` and so on, a file each. Heavy imports wait until they are needed."""

import os
import sys

from ..errors import UsageError, lacking, shortened
from . import calibrate, compare, estimate, evaluate, generate, info, regions, schedule
from .arguments import HelpFormatter, Parser, Version

COMMANDS = (generate, compare, evaluate, regions, schedule, estimate, calibrate, info)


def _parser() -> Parser:
    parser = Parser(
        prog="ralu",
        formatter_class=HelpFormatter,
        description="Region-adaptive latent upsampling: FLUX and SD3 several times cheaper, without training.",
        epilog="""examples:
  ralu generate "fox" -o fox.png
  ralu compare                          stock and RALU side by side, with times
  ralu compare --model mini-sd3         the same for SD3
  ralu evaluate --prompts prompts.txt   many images, scored, with a report
  ralu regions --ratios .1 .2 .3        which regions go to full resolution first
  ralu schedule --steps 4 5 6 --ends .3 .45 1
  ralu estimate --model sd3-medium      operations and memory, before anything runs
  ralu calibrate teacache -o FILE.json  what a cache has to know of a model
  ralu info                             versions, backends, models, and what is missing
  ralu COMMAND --help                   a command's options""",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 0, 2 after a `UsageError`, which is told in one line, and 130 after ctrl-C. Other errors are raised.
    """
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        if "run" not in args:
            parser.error("which command? generate, compare, evaluate, regions, schedule, estimate, calibrate or info")
        args.run(args)
    except BrokenPipeError:  # `ralu schedule | head`: nobody reads on, and Python would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        reason = lacking(error, "this command")
        if reason is error:
            raise
        print(f"ralu: {reason}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"ralu: {shortened(error, limit=1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nralu: interrupted", file=sys.stderr)
        return 130
    return 0
