"""Errors that a command reports in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An error that the user can correct: a wrong argument, or a file that is absent or damaged.

    The command line reports it in one line. Every other error is a fault of the program and keeps its traceback.
    """


@contextmanager
def usage(subject: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of these kinds (default: ValueError and TypeError) as a `UsageError` that begins with `subject`.

    Only for calls that take a user's arguments or files and do nothing else: around a whole run it would hide faults.
    """
    kinds = kinds or (ValueError, TypeError)
    try:
        yield
    except kinds as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{subject}: {error}") from error


def nearest_sizes(width: int, height: int, unit: int) -> str:
    """Name the sizes in pixels that divide by `unit`, as "are 64x48 and 72x48", or "is 64x48" where there is one."""
    rounded = [[unit * max(1, (pixels + up) // unit) for pixels in (width, height)] for up in (0, unit - 1)]
    sizes = list(dict.fromkeys(f"{width}x{height}" for width, height in rounded))
    return f"{'is' if len(sizes) == 1 else 'are'} {' and '.join(sizes)}"


def shortened(error: BaseException, limit: int = 200) -> str:
    """Return a library's error, which may be pages long, as part of a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 2 - 3) :]}"


# What the extra "pipelines" brings, by the names of the modules.
PIPELINES = ("diffusers", "transformers", "accelerate", "cv2", "scipy", "PIL", "matplotlib", "tqdm")


def lacking(error: ModuleNotFoundError, what: str) -> ImportError:
    """Return an error that names the extra to install, where a package of it is absent; else the error itself."""
    package = (error.name or "").partition(".")[0]
    if package not in PIPELINES:
        return error
    return ImportError(f'{what} needs {package}, which is not installed: pip install "ralu[pipelines]"', name=package)
