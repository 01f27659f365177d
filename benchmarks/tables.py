"""The tables of what the other scripts here have found; no figure is typed by hand.

`rendered` rewrites what a page has between

    <!-- begin benchmarks/results/NAME.csv -->
    <!-- end benchmarks/results/NAME.csv -->

The pages of docs have the whole tables and their pictures, the README their `short` form, "NAME.csv short" in both
lines. Of rows that measured the same thing the last counts.
"""

import json
import re
from pathlib import Path

import record
from record import RESULTS, ROOT

BASELINES = ("copy", "fill", "dense", "eager", "compile", "reference")  # providers that are no kernels of ours
FLUX = ("flux, sd3", "flux-dev")
SHORT = ("stock-50", "stock-10", "stock-7", "flux-5x", "flux-7x")  # of the table of quality


def latest(path: Path) -> list[dict]:
    """Read a file of results, the last row of each that measured the same; nothing of another benchmark's file."""
    rows = record.read(path)
    if not rows or not {"provider", "method"} & rows[0].keys() or "p50_ms" not in rows[0]:
        return []
    return list({record.case(row): row for row in rows}.values())


def table(head: list[str], body: list[list[str]]) -> str:
    """Print a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quoted(label: str) -> str:
    """Quote the method in a label of `record.label`, not its switches."""
    method, *switches = label.split(", ")
    return ", ".join([f"`{method}`", *switches])


def find(rows: list[dict], **wanted) -> dict | None:
    """Return the first row whose columns have one of the values that are wanted; None without one."""
    return next((row for row in rows if all(row[key] in value for key, value in wanted.items())), None)


def values(rows: list[dict], key: str) -> list[str]:
    """List a column's values, numbers in order."""
    unique = dict.fromkeys(row[key] for row in rows if row[key])
    return sorted(unique, key=int) if all(value.isdigit() for value in unique) else list(unique)


def origin(rows: list[dict]) -> str:
    """Say where, when and with which versions rows were measured."""
    row = rows[-1]
    versions = [f"torch {row['torch']}", *([f"Triton {row['triton']}"] if record.on_gpu(row) else [])]
    device = f"{row['device']}, {row['isa']}" if row["isa"] else row["device"]
    commits = " and ".join(values(rows, "commit"))
    return f"{device}; {', '.join(versions)}; commit {commits}; {row['date']}"


# ---- kernels ----


def kernels_on_cpu(rows: list[dict], short: bool = False) -> str:
    """Print the tables of bench.py's rows on a CPU; `short` is the first alone."""
    timed = [row for row in rows if row["p50_ms"] and row["batch"] == "1" and row["model"] in FLUX]
    native = [row for row in timed if row["provider"] == "native"]
    sizes = [size for size in values(native, "pixels") if size in ("1024", "2048")] or values(native, "pixels")
    columns = [(dtype, threads) for dtype in values(native, "dtype") for threads in values(native, "threads")]
    body, floors = [], []
    for op in values(native, "op"):
        timings = [row for row in native if row["op"] == op]
        cells = []
        for dtype, threads in columns:
            by_size = [find(timings, pixels=(size,), dtype=(dtype,), threads=(threads,)) for size in sizes]
            cells.append(" / ".join(f"{float(row['eager_ratio']):.1f}" for row in by_size if row))
        body.append([f"`{op}`", *cells])
        single = [find(timings, pixels=(size,), dtype=("float32",), threads=("1",)) for size in sizes]
        filled = [row for row in single if row]
        grown = [find(rows, op=(op,), provider=(provider,), p50_ms=("",)) for provider in ("native", "eager")]
        dense = find(timed, op=(op,), provider=("dense",), pixels=("1024",), threads=("1",))
        beside = dense and find(timings, pixels=("1024",), dtype=("float32",), threads=("1",))
        if filled and filled[0]["fill_fraction"]:
            floors.append([
                f"`{op}`", " / ".join(f"{1 / float(row['fill_fraction']):.1f}" for row in filled),
                *(f"{float(row['memory']):.1f}" if row else "" for row in grown),
                f"{float(dense['p50_ms']) / float(beside['p50_ms']):.0f}" if beside else "",
            ])  # fmt: skip
    names = [f"{dtype}, {threads} thread{'s' if threads != '1' else ''}" for dtype, threads in columns]
    parts = [
        f"Times faster than eager PyTorch, images of {' / '.join(sizes)} pixels:", table(["", *names], body),
        "Compiled, float32, one thread:",
        table(["", "time over that of its random numbers alone", "memory grown, over the output", "eager's",
               "the release's dense covariance, over it"], floors),
    ]  # fmt: skip
    return "\n\n".join(parts if floors and not short else parts[:2])


def kernels_on_gpu(rows: list[dict]) -> str:
    """Print the table of bench.py's rows on a GPU."""
    sizes = [size for size in values(rows, "pixels") if size in ("1024", "2048")] or values(rows, "pixels")
    usual = [row for row in rows if row["batch"] == "1" and row["model"] in FLUX and row["dtype"] != "float16"]
    head, body = ["", ""], []
    for size in sizes:
        head += [f"µs at {size}", "of a copy's bandwidth", "over eager", "over compile"]
    for op in values(usual, "op"):
        timings = [row for row in usual if row["op"] == op]
        dtype = "bfloat16" if "bfloat16" in values(timings, "dtype") else timings[0]["dtype"]
        for provider in (provider for provider in values(timings, "provider") if provider not in BASELINES):
            cells = []
            for size in sizes:
                row, compiled = (
                    find(timings, provider=(name,), pixels=(size,), dtype=(dtype,)) for name in (provider, "compile")
                )
                over = f"{float(compiled['p50_ms']) / float(row['p50_ms']):.1f}" if row and compiled else ""
                cells += [
                    f"{1e3 * float(row['p50_ms']):.1f}", f"{float(row['copy_fraction']):.0%}",
                    f"{float(row['eager_ratio']):.1f}", over,
                ] if row else [""] * 4  # fmt: skip
            body.append([f"`{op}`, {dtype}", provider, *cells])
    return "Images of FLUX, one in a batch; times faster than eager PyTorch and `torch.compile`:\n\n" + table(
        head, body
    )


# ---- whole images ----


def images(rows: list[dict], path: Path) -> str:
    """Print the tables of e2e.py's rows, and of the files beside them that explain them."""
    parts = []
    for model in values(rows, "model"):
        runs = [row for row in rows if row["model"] == model]
        batches, (first, *_) = values(runs, "batch"), runs
        body = []
        for label in dict.fromkeys(map(record.label, runs)):
            by_batch = sorted((row for row in runs if record.label(row) == label), key=lambda row: int(row["batch"]))
            row = by_batch[0]
            factors = ""
            if row["tflop"]:
                rate = float(row["tflop_per_s"]) / float(first["tflop_per_s"])
                share = float(row["transformer_share"]) / float(first["transformer_share"])
                factors = f"{float(row['flop_ratio']):.2f} × {rate:.2f} × {share:.2f}"
            body.append([
                quoted(label), row["calls"], f"{float(row['p50_ms']) / 1e3:.2f}", f"{float(row['speedup']):.2f}",
                factors, f"{float(row['outside_share']):.1%}",
                " / ".join(f"{float(one['images_per_s']):.2f}" for one in by_batch), row["peak_mib"],
            ])  # fmt: skip
        head = ["", "calls", "seconds", "speed-up", "= less work × rate × share", "outside the models"]
        head += [f"images/s in batches of {' / '.join(batches)}", "peak MiB"]
        parts += [f"`{model}`, {first['pixels']} pixels, {first['dtype']}:", table(head, body)]
        profile = path.with_name(f"{path.stem}-{model}.json")
        if profile.exists():
            parts += why(json.loads(profile.read_text()))
    return "\n\n".join(parts)


def why(profile: dict) -> list[str]:
    """Print the tables of one of e2e.py's explanations."""
    kinds = list(next(iter(profile["stages"].values()))["shares"])
    body = [
        [name, f"{1e3 * stage['tflop']:.3g}", f"{stage['ms']:.3g}", f"{1e3 * stage['tflop_per_s']:.3g}",
         *(f"{stage['shares'][kind]:.0%}" for kind in kinds)]
        for name, stage in profile["stages"].items()
    ]  # fmt: skip
    fixed, rate = profile["fixed_ms_per_call"], 1e3 * profile["tflop_per_s_beyond"]
    line = f"A transformer call: {fixed:.3g} ms however few its tokens, beyond that {rate:.3g} GFLOP/s (a line's fit)."
    parts = [line, table(["", "GFLOP", "ms", "GFLOP/s", *kinds], body)]
    calls = profile["ms_per_call"]
    if switched := [label for label in calls if ", " in label]:
        tokens = sorted({count for by_count in calls.values() for count in by_count}, key=int)
        times = [
            [quoted(label), *(f"{calls[label][count]:.3g}" if count in calls[label] else "" for count in tokens)]
            for label in switched
        ]
        parts.append(table(["ms a call", *(f"{count} tokens" for count in tokens)], times))
    return parts


# ---- what the images are worth ----


MEASURES = {"distance": "distance", "frechet": "Fréchet", "edge_error": "edge error", "blockiness": "blockiness"}


def quality(path: Path, short: bool = False) -> str:
    """Print the table of a file of quality.py's; `short` has the methods of `SHORT` alone."""
    rows = [row for row in record.read(path) if not short or row["method"] in SHORT]
    columns = {"drift": "drift", "flop_ratio": "less work", "seconds": "seconds"}
    columns = {name: title for name, title in columns.items() if any(row.get(name) for row in rows)}
    body = [
        [f"`{row['method']}`", f"{row['score']} ({row['score_low']} to {row['score_high']})",
         *(f"{row[name]} ± {row[f'{name}_se']}" for name in MEASURES), *(row[name] for name in columns)]
        for row in rows
    ]  # fmt: skip
    head = ["", "score", *MEASURES.values(), *columns.values()]
    row = rows[-1]
    counts = ", ".join([f"{row['captions']} captions", f"seeds {row['seeds']}", *filter(None, [row.get("dtype")])])
    commits = " and ".join(values(rows, "commit"))
    line = f"{counts}; torch {row['torch']}; commit {commits}; {row['date']} ({link(path, short)})."
    return f"{line}\n\n{table(head, body)}"


def searched(path: Path) -> str:
    """Print the best schedules of a file of search.py's, numbers to two digits."""
    rows = record.read(path)
    best = {row["less"]: row for row in sorted(rows, key=lambda row: (int(row["less"]), -float(row["frechet"])))}
    draws = len(rows) // len(best)
    names = "work", "steps", "ends", "shifts", "c", "ratio", "upsampler", "solver", "frechet"

    def cell(row, name):
        if name == "ratio" and len(row["steps"].split()) == 2:
            return ""
        return row[name] if name in ("work", "frechet") else " ".join(map(rounded, row[name].split()))

    def rounded(word):
        return f"{float(word):.2g}" if word[0].isdigit() else word

    body = [[f"`searched-{less}x`", *(cell(row, name) for name in names)] for less, row in best.items()]
    row = rows[-1]
    counts = f"{draws} draws each, {row['captions']} captions, seed {row['seed']}"
    line = f"{counts}; torch {row['torch']}; commit {row['commit']}; {row['date']} ({link(path, False)})."
    return f"{line}\n\n{table(['', *names[:-1], 'Fréchet'], body)}"


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


def work(path: Path) -> str:
    """Print the tables of work.py's file."""
    rows, parts = record.read(path), []
    head = ["", "counted", "footing", "with attention", "ours", "paper's", "deviation", ""]
    for number, model in dict.fromkeys((row["table"], row["model"] if row["table"] == "1" else "") for row in rows):
        of = [row for row in rows if row["table"] == number and row["model"].startswith(model)]
        body = [
            [row["name"], quoted(row["method"]), f"{row['text_tokens']}, {row['passes']}", row["total"],
             row["ours"] + "×" * bool(row["over"]), row["paper"], f"{float(row['deviation']):+.1%}", row["note"]]
            for row in of
        ]  # fmt: skip
        parts += [f"Table {number}{f', {model}' if model else ''}:", table(head, body)]
    return f"torch {rows[-1]['torch']}; commit {rows[-1]['commit']}; {rows[-1]['date']}.\n\n" + "\n\n".join(parts)


def saved(path: Path) -> str:
    """Print the table of saved.py's file: how many times less than so many steps of the stock run."""
    rows = {(row["model"], row["method"]): row for row in record.read(path)}
    stock = list(dict.fromkeys(method for _, method in rows if method.startswith("stock-")))
    body = [
        [model, f"`{method}`", row["calls"], f"{float(row['tflop']):.0f}",
         *(f"{float(rows[model, name]['tflop']) / float(row['tflop']):.2f}" for name in stock)]
        for (model, method), row in rows.items() if method not in stock
    ]  # fmt: skip
    return table(["", "", "calls", "TFLOP", *(f"{name.removeprefix('stock-')} steps" for name in stock)], body)


def skipped(path: Path) -> str:
    """Print the table of a file of caches.py's: a line a cache, of each model the last row of it."""
    rows = {(row["model"], row["cache"]): row for row in record.read(path)}
    models, caches = (list(dict.fromkeys(key[k] for key in rows)) for k in (0, 1))
    cells = {key: f"{float(row['ms']):.1f}, {float(row['share']):.1%} / {float(row['host_share']):.1%}"
             for key, row in rows.items()}  # fmt: skip
    body = [[cache, *(cells.get((model, cache), "") for model in models)] for cache in caches]
    return f"{origin([*rows.values()])}.\n\n{table(['', *(f'`{model}`' for model in models)], body)}"


def pareto(path: Path) -> str:
    """Name the picture of a file of quality against work."""
    return f"{path.stem.replace('-mini', '')}.png"


def roofs(path: Path) -> str:
    """Print the table of roof.py's file."""
    rows = record.read(path)
    return table([name.replace("_", " ") for name in rows[0]], [list(row.values()) for row in rows])


def compiled(path: Path) -> str:
    """Print the table of aot.py's file: a line a kernel, the worst of all variants and GPUs by release of Triton."""
    rows, body = record.read(path), []
    releases, architectures, commits = (values(rows, key) for key in ("triton", "arch", "commit"))
    for kernel in values(rows, "kernel"):
        of = [row for row in rows if row["kernel"] == kernel]
        worst = (
            " / ".join(str(max(int(row[key]) for row in of if row["triton"] == release)) for release in releases)
            for key in ("registers", "spill_bytes")
        )
        body.append([f"`{kernel}`", str(len({row["variant"] for row in of})), *worst])
    line = f"Triton {' / '.join(releases)}; {', '.join(architectures)}; commit {' and '.join(commits)}."
    return f"{line}\n\n{table(['', 'variants', 'registers at most', 'bytes spilled at most'], body)}"


def hosts(path: Path) -> str:
    """Print the table of host.py's file: a line a model, the last row of each variant."""
    rows = {(row["model"], row["variant"]): row for row in record.read(path)}
    body = []
    for model in dict.fromkeys(name for name, _ in rows):
        stock, fused = rows[model, "stock"], rows[model, "fused"]
        cells = (f"{row['ms']} ({row['p10']} to {row['p90']})" for row in (stock, fused))
        body.append([model, *cells, fused["ratio"], fused["launches"]])
    head = ["", "stock, ms (10th to 90th percentile)", "fused", "ratio of steps side by side", "launches, fused"]
    return f"{origin([*rows.values()])}.\n\n{table(head, body)}"


# ---- pages ----


def link(path: Path, short: bool) -> str:
    """Link a file of results, from the README where it is short and else from a page of docs."""
    up = "" if short else "../"
    return f"[{path.name}]({up + path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name})"


def block(path: Path, short: bool = False) -> str | None:
    """Write what is said of a file of results; None for another benchmark's."""
    if path.name.startswith("quality-"):
        return quality(path, short)
    if path.name.startswith("pareto-"):
        return quality(path, short) if short else f"![Quality against work]({pareto(path)})\n\n{quality(path)}"
    if path.name.startswith("search-"):
        return searched(path)
    if path.name.startswith("caches-"):
        return skipped(path)
    tables = {"work.csv": work, "saved.csv": saved, "roof.csv": roofs, "host.csv": hosts, "aot.csv": compiled}
    tables["solver-gaussian.csv"] = solvers
    if path.name in tables:
        return tables[path.name](path)
    if not (rows := latest(path)):
        return None
    first = f"{origin(rows)} ({link(path, short)})."
    if "method" in rows[0]:
        body = images(rows, path)
    else:
        body = kernels_on_gpu(rows) if record.on_gpu(rows[0]) else kernels_on_cpu(rows, short)
    return f"{first}\n\n{body}" if short else f"{first}\n\n{body}\n\n![{path.stem}]({path.stem}.png)"


def rendered(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block as its file has it."""

    def fresh(match):
        path = results / Path(match[2]).name
        return f"{match[1]}\n\n{block(path, bool(match[3]))}\n\n{match[5]}"

    return re.sub(r"(<!-- begin (\S+\.csv)((?: short)?) -->)(.*?)(<!-- end \2\3 -->)", fresh, page, flags=re.DOTALL)
