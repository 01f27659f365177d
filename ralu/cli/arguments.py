"""Types, groups and checks of the arguments that several commands share.

Types raise argparse's ArgumentTypeError, checks UsageError: either way the user reads one line.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..budget import check_speedup
from ..errors import UsageError, usage
from ..method import CHOICES, SPATIAL, Method
from ..mini import NAMES
from ..models import Model, find_model

if TYPE_CHECKING:
    from ..runner import Runner

PRESET_NAMES = f"{', '.join(SPATIAL)}, speedup-X"
REGION_PRESETS = ", ".join([*(name for name in SPATIAL if Method(name).has_regions), "speedup-X"])
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_SEED = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """Raise `UsageError` where argparse would print its usage and exit."""

    def error(self, message):
        """Raise UsageError with the message in one line."""
        raise UsageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class Version(argparse.Action):
    """Print the version, which is that of `ralu_kernels`: reading it imports PyTorch."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print it and exit."""
        from .. import __version__

        print(f"ralu {__version__}")
        parser.exit()


class HelpFormatter(argparse.HelpFormatter):
    """Keep the lines of examples, fill all other paragraphs."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def add_command(commands, run: Callable, name: str, summary: str, more: str, examples: str) -> argparse.ArgumentParser:
    """Add the parser of a command, which `run(args)` executes."""
    description = f"{summary[0].upper()}{summary[1:]}. {more}"
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n{examples}", formatter_class=HelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


# ---- types ----


def method(text: str) -> Method:
    """Parse a method."""
    try:
        return Method.parse(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def speedup(text: str) -> float:
    """Parse how many times less work than a stock run's."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    try:
        return check_speedup(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> tuple[int, int]:
    """Parse "256" or "1024x768" to (width, height)."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[x×]([1-9]\d{0,5}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels, such as 256, nor WIDTHxHEIGHT")
    return int(match[1]), int(match[2] or match[1])


def share(text: str) -> float:
    """Parse a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value


def region_source(text: str):
    """Return what `ralu.enable` takes: a name, or a mask that is read now, so that a missing file is told at once."""
    if text in CHOICES["regions"]:
        return text
    from PIL import Image

    try:
        with Image.open(text) as mask:
            mask.load()
            return mask
    except (OSError, ValueError) as error:  # truncated data, or a size that no image has
        names = ", ".join(CHOICES["regions"])
        raise argparse.ArgumentTypeError(f"{text!r} is none of {names}, nor an image that can be read") from error


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Parse a whole number that PyTorch takes as a seed, also after prompts and samples are added."""
    if not re.fullmatch(r"\d{1,19}", text) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {LARGEST_SEED}")
    return int(text)


def file(*suffixes: str) -> Callable[[str], Path]:
    """Return a type for files that end so."""

    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(suffixes)}")
        return Path(text)

    return path


# ---- groups ----


def add_model(parser: argparse.ArgumentParser):
    """Add --model and how to run it."""
    group = parser.add_argument_group("model")
    known = f"{', '.join(NAMES)} (embedded), a pipeline folder, or a hub id (default: mini-flux)"
    group.add_argument("--model", default="mini-flux", help=known)
    add_size(group, "(default: the model's own; 256 for the embedded)")
    group.add_argument("--seed", type=seed, default=0, help="of the first prompt; each next one adds 1 (default: 0)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, the best)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto (default) is float32 on a CPU, else bfloat16",
    )


def add_size(parser, default: str):
    """Add --size, --width and --height."""
    parser.add_argument("--size", type=size, help=f"pixels: 256, or WIDTHxHEIGHT {default}")
    parser.add_argument("--width", type=count, metavar="N", help="in pixels, instead of --size")
    parser.add_argument("--height", type=count, metavar="N", help="in pixels, instead of --size")


def add_speedup(parser: argparse.ArgumentParser, more: str = ""):
    """Add --speedup."""
    how = "how many times less work than in a stock run the transformer shall do, from 1.5 to 12, instead of a preset"
    parser.add_argument("--speedup", type=speedup, metavar="X", help=how + more)


def add_regions(parser: argparse.ArgumentParser):
    """Add --regions."""
    parser.add_argument(
        "--regions", type=region_source, metavar="SOURCE",
        help="what goes first: canny (edges of a preview), gradient (of the latent), change (of the latent from step "
        "to step), grid (evenly spaced), random, or an image as a mask, bright places first (default: canny)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser, default: str, *more: str):
    """Add --output for an image, or a file that ends in one of `more`."""
    parser.add_argument(
        "-o", "--output", type=file(*IMAGE_FILES, *more), default=Path(default), metavar="FILE",
        help=f"where to save (default: {default})",
    )  # fmt: skip


def add_methods(parser: argparse.ArgumentParser, default: str):
    """Add --methods."""
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method,
        metavar="METHOD",
        help=f"{PRESET_NAMES}, or stock-STEPS, with options as in 'flux-5x(ratio=0.3)' and a cache as in "
        f"'flux-5x+CACHE(option=value)' (default: {default})",
    )


# ---- checks ----


def chosen_size(args: argparse.Namespace, default: int) -> tuple[int, int]:
    """Return the width and height that the arguments ask for."""
    if args.size and (args.width or args.height):
        raise UsageError("--size: give a size, or --width and --height, not both")
    return args.size or (args.width or default, args.height or default)


def checked_model(args: argparse.Namespace, methods: Iterable[Method]) -> tuple[Model, tuple[int, int]]:
    """Return the model and the size that the arguments ask for; refuse what does not fit, before anything is loaded."""
    model = find_model(args.model)
    methods = list(methods) or model.methods
    model.check_methods(methods)
    width, height = chosen_size(args, model.pixels)
    model.check_size(width, height)
    if budgets := [method for method in methods if method.speedup is not None]:
        from ..runner import quiet

        with quiet():
            for method in budgets:
                model.budget(method, width, height)
    return model, (width, height)


def make_runner(args: argparse.Namespace, model: Model, size: tuple[int, int]) -> "Runner":
    """Load the model."""
    from ..runner import Runner

    return Runner(model, *size, seed=args.seed, device=args.device, dtype=args.dtype)


def check_output(path: Path):
    """Find out before the work, not after it, whether a file can be written; nothing is created."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"--output: cannot create the folder {path.parent}: {folder} is a file")
    target = path if path.exists() else folder
    if path.is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"--output: cannot write to {path}")


def save(image, path: Path):
    """Save an image and make its folder; a full disk is no fault of the program."""
    with usage("--output", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
