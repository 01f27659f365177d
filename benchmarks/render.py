"""The plots and tables of what bench.py, e2e.py, quality.py and solver.py have found; no figure is typed by hand.

    python benchmarks/render.py

For every file of theirs in benchmarks/results this draws docs/NAME.png (but quality.py draws its own pictures), and
rewrites what the README and the pages of docs have between

    <!-- begin benchmarks/results/NAME.csv -->
    <!-- end benchmarks/results/NAME.csv -->

Of rows that measured the same thing the last counts.
"""

import json
import re
from pathlib import Path

import record
from record import RESULTS, ROOT

DOCS = ROOT / "docs"
THEORY = ("copy", "fill", "dense", "eager", "compile", "reference")  # providers that are no kernels of ours
FLUX = ("flux, sd3", "flux-dev")


def latest(path: Path) -> list[dict]:
    """The rows of a file of results, the last of each that measured the same; none of another benchmark's file."""
    rows = record.read(path)
    if not rows or not {"provider", "method"} & rows[0].keys() or "p50_ms" not in rows[0]:
        return []
    return list({record.case(row): row for row in rows}.values())


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find(rows: list[dict], **wanted) -> dict | None:
    return next((row for row in rows if all(row[key] in value for key, value in wanted.items())), None)


def values(rows: list[dict], key: str) -> list[str]:
    """All that occur, numbers in order."""
    found = dict.fromkeys(row[key] for row in rows if row[key])
    return sorted(found, key=int) if all(value.isdigit() for value in found) else list(found)


def origin(rows: list[dict]) -> str:
    row = rows[-1]
    versions = [f"torch {row['torch']}", *([f"Triton {row['triton']}"] if row["cuda"] else [])]
    device = f"{row['device']}, {row['isa']}" if row["isa"] else row["device"]
    commits = " and ".join(values(rows, "commit"))
    return f"{device}; {', '.join(versions)}; commit {commits}; {row['date']}"


# ---- kernels ----


def kernels_on_cpu(rows: list[dict]) -> str:
    timed = [row for row in rows if row["p50_ms"] and row["batch"] == "1" and row["model"] in FLUX]
    native = [row for row in timed if row["provider"] == "native"]
    sizes = [size for size in values(native, "pixels") if size in ("1024", "2048")] or values(native, "pixels")
    columns = [(dtype, threads) for dtype in values(native, "dtype") for threads in values(native, "threads")]
    body, floors = [], []
    for op in values(native, "op"):
        of = [row for row in native if row["op"] == op]
        cells = []
        for dtype, threads in columns:
            found = [find(of, pixels=(size,), dtype=(dtype,), threads=(threads,)) for size in sizes]
            cells.append(" / ".join(f"{float(row['eager_ratio']):.1f}" for row in found if row))
        body.append([f"`{op}`", *cells])
        filled = [row for row in (find(of, pixels=(s,), dtype=("float32",), threads=("1",)) for s in sizes) if row]
        grown = [find(rows, op=(op,), provider=(who,), p50_ms=("",)) for who in ("native", "eager")]
        dense = find(timed, op=(op,), provider=("dense",), pixels=("1024",), threads=("1",))
        of_dense = dense and find(of, pixels=("1024",), dtype=("float32",), threads=("1",))
        if filled and filled[0]["fill_fraction"]:
            floors.append([
                f"`{op}`", " / ".join(f"{1 / float(row['fill_fraction']):.1f}" for row in filled),
                *(f"{float(row['memory']):.1f}" if row else "" for row in grown),
                f"{float(dense['p50_ms']) / float(of_dense['p50_ms']):.0f}" if of_dense else "",
            ])  # fmt: skip
    names = [f"{dtype}, {threads} thread{'s' if threads != '1' else ''}" for dtype, threads in columns]
    parts = [
        f"Times faster than eager PyTorch, images of {' / '.join(sizes)} pixels:", table(["", *names], body),
        "Compiled, float32, one thread:",
        table(["", "time over that of its random numbers alone", "memory grown, over the output", "eager's",
               "the release's dense covariance, over it"], floors),
    ]  # fmt: skip
    return "\n\n".join(parts if floors else parts[:2])


def kernels_on_gpu(rows: list[dict]) -> str:
    sizes = [size for size in values(rows, "pixels") if size in ("1024", "2048")] or values(rows, "pixels")
    usual = [row for row in rows if row["batch"] == "1" and row["model"] in FLUX and row["dtype"] != "float16"]
    head, body = ["", ""], []
    for size in sizes:
        head += [f"µs at {size}", "of a copy's bandwidth", "over eager", "over compile"]
    for op in values(usual, "op"):
        of = [row for row in usual if row["op"] == op]
        dtype = "bfloat16" if "bfloat16" in values(of, "dtype") else of[0]["dtype"]
        for provider in (provider for provider in values(of, "provider") if provider not in THEORY):
            cells = []
            for size in sizes:
                row, compiled = (
                    find(of, provider=(who,), pixels=(size,), dtype=(dtype,)) for who in (provider, "compile")
                )
                over = f"{float(compiled['p50_ms']) / float(row['p50_ms']):.1f}" if row and compiled else ""
                cells += [
                    f"{1e3 * float(row['p50_ms']):.1f}", f"{float(row['copy_fraction']):.0%}",
                    f"{float(row['eager_ratio']):.1f}", over,
                ] if row else [""] * 4  # fmt: skip
            body.append([f"`{op}`, {dtype}", provider, *cells])
    return "Pictures of FLUX, one in a batch; times faster than eager PyTorch and `torch.compile`:\n\n" + table(
        head, body
    )


def draw_kernels(rows: list[dict], path: Path):
    """A panel for an operation and a dtype: bandwidth by shape, a line for a provider, from the 20th to the 80th %."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["gbps"] and row["model"] in FLUX]
    threads = max((row["threads"] for row in rows), key=lambda count: int(count or 0))
    rows = [row for row in rows if row["threads"] == threads]
    panels = {(row["op"], row["dtype"]): None for row in rows}
    shapes = list(dict.fromkeys((int(row["pixels"]), int(row["batch"])) for row in rows))
    shapes.sort(key=lambda shape: (shape[0] ** 2 * shape[1], shape[0]))
    providers = values(rows, "provider")
    columns = min(2, len(panels))
    figure = Figure(figsize=(5.5 * columns, 2.6 * -(-len(panels) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes, (op, dtype) in zip(grid, panels, strict=False):
        for provider in providers:
            of = {(int(r["pixels"]), int(r["batch"])): r for r in rows
                  if (r["op"], r["dtype"], r["provider"]) == (op, dtype, provider)}  # fmt: skip
            x = [i for i, shape in enumerate(shapes) if shape in of]
            p20, p50, p80 = ([float(of[shapes[i]][f"{q}_ms"]) for i in x] for q in ("p20", "p50", "p80"))
            middle = [float(of[shapes[i]]["gbps"]) for i in x]
            colour = "black" if provider == "copy" else f"C{providers.index(provider)}"
            axes.plot(x, middle, "o-", color=colour, markersize=3, label=provider)
            bounds = [[m * b / q for m, b, q in zip(middle, p50, edge, strict=True)] for edge in (p80, p20)]
            axes.fill_between(x, *bounds, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=f"{op}, {dtype}", yscale="log", ylabel="GB/s", xticks=range(len(shapes)))
        axes.set_xticklabels([f"{pixels}px\n×{batch}" for pixels, batch in shapes], fontsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False)
    figure.supxlabel(f"{origin(rows)}{f'; {threads} threads' if threads else ''}", fontsize=7)
    figure.savefig(path, dpi=110)


# ---- whole images ----


def pictures(rows: list[dict], path: Path) -> str:
    parts = []
    for model in values(rows, "model"):
        of = [row for row in rows if row["model"] == model]
        batches, (first, *_) = values(of, "batch"), of
        body = []
        for method in values(of, "method"):
            found = [find(of, method=(method,), batch=(batch,)) for batch in batches]
            row = found[0]
            factors = ""
            if row["tflop"]:
                rate = float(row["tflop_per_s"]) / float(first["tflop_per_s"])
                share = float(row["transformer_share"]) / float(first["transformer_share"])
                factors = f"{float(row['flop_ratio']):.2f} × {rate:.2f} × {share:.2f}"
            body.append([
                f"`{method}`", row["calls"], f"{float(row['p50_ms']) / 1e3:.2f}", f"{float(row['speedup']):.2f}",
                factors, f"{float(row['outside_share']):.1%}",
                " / ".join(f"{float(one['images_per_s']):.2f}" for one in found if one), row["peak_mib"],
            ])  # fmt: skip
        head = ["", "calls", "seconds", "speed-up", "= less work × rate × share", "outside the models"]
        head += [f"images/s in batches of {' / '.join(batches)}", "peak MiB"]
        parts += [f"`{model}`, {first['pixels']} pixels, {first['dtype']}:", table(head, body)]
        profile = path.with_name(f"{path.stem}-{model}.json")
        if profile.exists():
            parts += why(json.loads(profile.read_text()))
    return "\n\n".join(parts)


def why(profile: dict) -> list[str]:
    kinds = list(next(iter(profile["stages"].values()))["shares"])
    body = [
        [name, f"{1e3 * stage['tflop']:.3g}", f"{stage['ms']:.3g}", f"{1e3 * stage['tflop_per_s']:.3g}",
         *(f"{stage['shares'][kind]:.0%}" for kind in kinds)]
        for name, stage in profile["stages"].items()
    ]  # fmt: skip
    fixed, rate = profile["fixed_ms_per_call"], 1e3 * profile["tflop_per_s_beyond"]
    line = f"A transformer call: {fixed:.3g} ms however few its tokens, beyond that {rate:.3g} GFLOP/s (a line's fit)."
    parts = [line, table(["", "GFLOP", "ms", "GFLOP/s", *kinds], body)]
    switched = {method: of for method, of in profile["ms_per_call"].items() if "+" in method}
    if switched:
        tokens = sorted({count for of in profile["ms_per_call"].values() for count in of}, key=int)
        times = [
            [f"`{method}`", *(f"{of[count]:.3g}" if count in of else "" for count in tokens)]
            for method, of in switched.items()
        ]
        parts.append(table(["ms a call", *(f"{count} tokens" for count in tokens)], times))
    return parts


def draw_pictures(rows: list[dict], path: Path):
    """A panel for a model: the smallest batch's runs, cut into their parts."""
    from matplotlib.figure import Figure

    models, parts = values(rows, "model"), ("transformer", "text", "preview", "decode", "outside")
    first = {model: [row for row in rows if row["model"] == model] for model in models}
    first = {model: [row for row in of if row["batch"] == values(of, "batch")[0]] for model, of in first.items()}
    heights = [len(of) for of in first.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.9 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), squeeze=False, height_ratios=heights).flatten()
    for axes, (model, of) in zip(grid, first.items(), strict=True):
        names, left = [row["method"] for row in of], [0.0] * len(of)
        for part in parts:
            seconds = [float(row[f"{part}_ms"]) / 1e3 for row in of]
            axes.barh(names, seconds, left=left, label=part)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for name, end, row in zip(names, left, of, strict=True):
            axes.annotate(f" {float(row['speedup']):.2f}×", (end, name), va="center", fontsize=7)
        axes.invert_yaxis()
        axes.set(title=f"{model}, {of[0]['pixels']} pixels, batch {of[0]['batch']}", xlabel="seconds")
        axes.margins(x=0.1)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(parts), frameon=False)
    figure.supxlabel(origin(rows), fontsize=7)
    figure.savefig(path, dpi=110)


# ---- what the images are worth ----


def quality(path: Path) -> str:
    """Of a file of quality.py's."""
    rows = record.read(path)
    body = [
        [f"`{row['method']}`", f"{row['score']} ({row['score_low']} to {row['score_high']})",
         *(f"{row[name]} ± {row[f'{name}_se']}" for name in ("distance", "frechet", "edge_error", "blockiness")),
         row["flop_ratio"]]
        for row in rows
    ]  # fmt: skip
    head = ["", "score", "distance", "Fréchet", "edge error", "blockiness", "less work"]
    row = rows[-1]
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    counts = f"{row['captions']} captions, seeds {row['seeds']}"
    line = f"{counts}; torch {row['torch']}; commit {row['commit']}; {row['date']} ([{path.name}]({name}))."
    return f"{line}\n\n{table(head, body)}"


def solvers(path: Path) -> str:
    """Of solver.py's file: one line a method, standard deviations 1 / 0.5."""
    rows = record.read(path)
    names = list(rows[0])[2:]
    body = [
        [f"`{method}`", *(" / ".join(f"{100 * float(of[name]):+.1f}" for of in rows if of["method"] == method)
                          for name in names)]
        for method in values(rows, "method")
    ]  # fmt: skip
    return table(["", *(f"`{name}`" for name in names)], body)


# ---- the README ----


def block(path: Path) -> str | None:
    """What is said of a file of results; None for another benchmark's."""
    if path.name.startswith("quality-"):
        return quality(path)
    if path.name == "solver-gaussian.csv":
        return solvers(path)
    if not (rows := latest(path)):
        return None
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if "provider" in rows[0]:
        body = (kernels_on_gpu if rows[0]["cuda"] else kernels_on_cpu)(rows)
    else:
        body = pictures(rows, path)
    return f"{origin(rows)} ([{path.name}]({name})).\n\n{body}\n\n![{path.stem}](docs/{path.stem}.png)"


def rendered(page: str, results: Path = RESULTS) -> str:
    """A page with every block as its file has it."""

    def fresh(match):
        path = results / Path(match[2]).name
        return f"{match[1]}\n\n{block(path)}\n\n{match[4]}"

    return re.sub(r"(<!-- begin (\S+\.csv) -->)(.*?)(<!-- end \2 -->)", fresh, page, flags=re.DOTALL)


def main():
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        page.write_text(rendered(page.read_text()))
    text = (ROOT / "README.md").read_text()
    for path in sorted(RESULTS.glob("*.csv")):
        if rows := latest(path):
            (draw_kernels if "provider" in rows[0] else draw_pictures)(rows, DOCS / f"{path.stem}.png")
            if f"<!-- begin benchmarks/results/{path.name} -->" not in text:
                print(f"{path.name}: the README has no place for it; see the top of {Path(__file__).name}")


if __name__ == "__main__":
    main()
