"""The command line's figures: a labelled grid of images, the selected regions over a preview, a schedule's plot."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .schedule import RESOLUTIONS, Schedule, densities

INK, MUTED, LINES, PAPER, BLUE = "#1f2328", "#59636e", "#afb8c1", "#ffffff", "#0057ff"
STAGES = {"low": "#0057ff", "mixed": "#e8710a", "full": "#12855a"}


@dataclass
class Row:
    """One line of a grid: its label on the left (title, details, a highlighted last line) and its images."""

    title: str
    images: list[Image.Image]
    details: list[str] = field(default_factory=list)
    highlight: str = ""


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: on every machine, with far more letters than Pillow's default font."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 3) -> list[str]:
    """Break a text between words into lines of at most `width` pixels; an ellipsis stands for the rest."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    shown = wrapped[:lines]
    if len(wrapped) > lines:
        shown[-1] += " …"
    return [_clip(line, font, width) for line in shown]


def _clip(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def fitted(image: Image.Image, shortest: int = 192, longest: int = 512) -> Image.Image:
    """Return an image at a size that suits a grid; those in between stay untouched, pixel for pixel.

    shortest, longest: bounds of the longer side, in pixels; small images are scaled up by whole factors.
    """
    width, height = image.size
    whole = max(1, -(-shortest // max(width, height)))
    if whole > 1:
        return image.resize((width * whole, height * whole), Image.Resampling.NEAREST)
    factor = min(1, longest / max(width, height))
    return image.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)


def grid(columns: list[str], rows: list[Row], note: str = "") -> Image.Image:
    """Draw rows of images of one size (see `fitted`): captions above the columns, labels left of rows, a note below.

    Raises ValueError for images of several sizes, or a row with more or fewer images than columns.
    """
    sizes = {image.size for row in rows for image in row.images}
    if len(sizes) != 1 or any(len(row.images) != len(columns) for row in rows):
        raise ValueError(f"a grid needs images of one size, {len(columns)} in every row; got sizes {sorted(sizes)}")
    width, height = sizes.pop()
    unit = max(width, height) / 256  # all sizes are for images of 256 pixels
    gap, margin, line = round(10 * unit), round(28 * unit), round(22 * unit)
    text, small, strong, large = (
        _font(round(size * unit), bold) for size, bold in ((16, False), (13, False), (20, True), (30, True))
    )
    captions = [_wrap(caption, text, width) for caption in columns]
    labels = [[(row.title, strong, INK), *((detail, text, MUTED) for detail in row.details)] for row in rows]
    for row, label in zip(rows, labels, strict=True):
        label += [(row.highlight, large, BLUE)] if row.highlight else []

    left = margin + round(max(font.getlength(part) for label in labels for part, font, _ in label) + 26 * unit)
    top = margin + line * max(map(len, captions)) + gap // 2
    right = left + len(columns) * (width + gap) - gap
    bottom = top + len(rows) * (height + gap)
    notes = _wrap(note, small, right - margin) if note else []
    paper = Image.new("RGB", (right + margin, bottom + line * len(notes) + margin // 2), PAPER)
    draw = ImageDraw.Draw(paper)

    for column, caption in enumerate(captions):
        center = left + column * (width + gap) + width / 2
        for i, part in enumerate(reversed(caption)):
            draw.text((center, top - gap - i * line), part, font=text, fill=INK, anchor="ms")
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + k * (height + gap)
        for column, image in enumerate(row.images):
            x = left + column * (width + gap)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#d8dee4")  # white images need an edge
            paper.paste(image, (x, y))
        spaces = [round(font.size * 1.45) for _, font, _ in label]
        above = y + (height - sum(spaces)) / 2
        for (part, font, color), space in zip(label, spaces, strict=True):
            draw.text((margin, above + space / 2), part, font=font, fill=color, anchor="lm")
            above += space
    for i, part in enumerate(notes):
        draw.text((margin, bottom + line * (i + 0.5)), part, font=small, fill=MUTED, anchor="lm")
    return paper


def overlay(image: Image.Image, tokens: Iterable[int], cells: tuple[int, int]) -> Image.Image:
    """Return a copy of an image with a blue square around each of these tokens, in raster order of a grid (h, w)."""
    (h, w), (width, height) = cells, image.size
    places = [divmod(int(token), w) for token in tokens]
    boxes = [(x * width // w, y * height // h, (x + 1) * width // w - 1, (y + 1) * height // h - 1) for y, x in places]
    veil = Image.new("L", image.size, 0)
    for box in boxes:
        ImageDraw.Draw(veil).rectangle(box, fill=28)
    marked = Image.composite(Image.new("RGB", image.size, BLUE), image.convert("RGB"), veil)
    for box in boxes:
        ImageDraw.Draw(marked).rectangle(box, outline=BLUE, width=max(1, round(width / w / 14)))
    return marked


def plot_schedule(schedule: Schedule, shift: float, path: str | Path, title: str = "Time schedule") -> Path:
    """Save a plot: time over transformer calls with the two jumps back, and below it where in time the work is done.

    Returns the path.

    shift: the model's own timestep shift, which makes the density that the flow asks for.
    path:  its suffix chooses the format (png, svg, pdf, jpg, webp).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9, 7.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), facecolor=PAPER)
    figure.suptitle(title, x=0.015, ha="left", color=INK, fontsize=14, fontweight="bold")
    above, below = figure.subplots(2, 1, height_ratios=(1.55, 1))
    _plot_time(above, schedule)
    _plot_work(below, schedule, shift)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINES)
        axes.tick_params(colors=MUTED)
        axes.grid(color="#eaeef2", linewidth=0.8)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=MUTED, fontsize=10)
    figure.savefig(path)
    return Path(path)


def _plot_time(axes, schedule: Schedule):
    last, first = sum(schedule.steps), 0
    for number, stage in enumerate(schedule.stages, 1):
        calls, color = stage.steps, STAGES[stage.resolution]
        times = [1 - sigma for sigma in schedule.sigmas(number)]
        label = f"{RESOLUTIONS[stage.resolution]}, {calls} call{'s' * (calls != 1)}, h = {stage.shift:.2f}"
        axes.axvspan(first, first + calls, color=color, alpha=0.06, linewidth=0)
        axes.plot(range(first, first + calls + 1), times, color=color, linewidth=2, label=label, zorder=3)
        axes.scatter(range(first, first + calls), times[:-1], color=color, s=26, zorder=4)
        first += calls
    axes.scatter([last], [1], facecolor=PAPER, edgecolor=STAGES["full"], linewidth=2, s=40, zorder=4)

    arrow = {
        "arrowstyle": "-|>",
        "color": INK,
        "linewidth": 1.6,
        "linestyle": (0, (3, 1.6)),
        "shrinkA": 0,
        "shrinkB": 2,
    }
    leader = {"arrowstyle": "-", "color": LINES, "linewidth": 1, "shrinkB": 3}
    veil = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    height = 0.0
    for k, (end, transition) in enumerate(zip(schedule.ends, schedule.transitions, strict=False)):
        x = sum(schedule.steps[: k + 1])
        axes.annotate("", (x, transition.start), (x, end), arrowprops=arrow, zorder=5)
        height = max(end + 0.2, height + 0.09)  # above the curve and the other jump's label
        axes.annotate(
            f"jump {k + 1}: back from {end:g} to {transition.start:.3f}", (x, end), (max(x, 0.15 * last), height),
            ha="center", color=INK, fontsize=10, arrowprops=leader, bbox=veil, zorder=6,
        )  # fmt: skip
    axes.set(xlim=(-0.02 * last, 1.02 * last), ylim=(-0.04, max(1.06, height + 0.08)))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set(xlabel="transformer call", ylabel="time t (0 is noise, 1 the image)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9.2, labelcolor=INK,
        columnspacing=1.3, handlelength=1.2,
    )  # fmt: skip


def _plot_work(axes, schedule: Schedule, shift: float):
    t, target, achieved = densities(schedule, shift)
    axes.fill_between(t, target, color=LINES, alpha=0.45, linewidth=0, label=f"the flow asks for (shift {shift:g})")
    axes.plot(t, achieved, color=INK, linewidth=1.8, label="this schedule gives")
    for k, transition in enumerate(schedule.transitions):
        color = STAGES[schedule.stages[k + 1].resolution]
        axes.axvspan(transition.start, schedule.ends[k], color=color, alpha=0.07, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="time t (shaded: passed again)", ylabel="density of the work")
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)
