"""Prompt files, and the samples that are made of their prompts."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

SEED_STRIDE = 1_000_000  # between the seeds of a prompt's samples, so that those of neighbouring lines never meet


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file. line: its number, from 0; metadata: the whole object of a line of JSON."""

    line: int
    text: str
    metadata: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Sample:
    """One of the images of a prompt."""

    prompt: Prompt
    number: int

    @property
    def file(self) -> str:
        """The name of its file, in the folder of a method."""
        return f"{self.prompt.line:05d}-{self.number:02d}.png"

    def seed(self, first: int) -> int:
        """Return its seed, by line and number alone: not by the other prompts, the batch or the process."""
        return first + self.prompt.line + SEED_STRIDE * self.number


def read_prompts(path: Path) -> list[Prompt]:
    """Read a text file, a prompt a line up to a tab, or a .jsonl file with a "prompt" in every line's object.

    Blank lines are left out but counted. Raises UsageError, with the file and the line, for a file that cannot be read,
    is not UTF-8, has no prompts, or has a line without one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompts: cannot read {path}: {error.strerror}") from error
    prompts = []
    for line, encoded in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines()):
        place = f"--prompts: line {line + 1} of {path}"
        try:
            text = encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{place} is not UTF-8, at byte {error.start + 1}: {encoded[:80]!r}") from error
        if not text.strip():
            continue
        entry = {"prompt": text.split("\t")[0].strip()}
        if path.suffix == ".jsonl":
            try:
                entry = json.loads(text)
                str.strip(entry["prompt"])
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(f'{place} has no "prompt": {text.strip()}') from error
        if not entry["prompt"].strip():
            raise UsageError(f"{place} has an empty prompt: {text!r}")
        prompts.append(Prompt(line, entry["prompt"], entry))
    if not prompts:
        raise UsageError(f"--prompts: {path} has no prompt")
    return prompts
