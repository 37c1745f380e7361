"""The paper's tables beside runs of your own, as Markdown. Section 5.

    python -m experiments.tables 1 RUN [RUN ...]        from folders of retrain.py; so are 3 and 4
    python -m experiments.tables 2                      the published cells, counted: half a minute

A table is of one protocol on the same images. What was published stands beside runs on the paper's
data set and in its size; beside others stands a dash. A row is of one method, whose searches each
found their own cell, or of one cell. Folders of other programs are passed over.
"""
import sys
from pathlib import Path

import numpy as np

from genotypes import PUBLISHED, SOURCES, network
from model import count_macs, count_parameters
from run import Parser, read_json, start

METHODS = {"second_order": "DARTS, second order", "es": "DARTS-ES", "ada": "DARTS-ADA",
           "r_darts": "R-DARTS(L2)", "perturbation": "DARTS+PT"}            # of baselines.py
SIZES = {"cifar10": (20, 36), "cifar100": (8, 16), "svhn": (8, 16)}     # the paper's cells, C
TABLE1 = """\
NASNet-A | 3.3 | 2.65 | 2000 | NASNet_A
ENAS | 4.6 | 2.89 | 0.5 | ENAS
AmoebaNet-B | 2.8 | 2.55 | 3150 | AmoebaNet_B
DARTS, first order | 3.3 | 3.00 | 1.5 | DARTS
DARTS, second order | 3.3 | 2.76 | 4.0 | DARTS, second order
SNAS | 2.8 | 2.85 ± 0.30 | 1.5 | SNAS_moderate
GDAS | 3.4 | 2.93 | 0.2 | GDAS
P-DARTS | 3.4 | 2.50 | 0.2 | P_DARTS
PC-DARTS | 3.6 | 2.57 | 0.1 | PC_DARTS
R-DARTS | - | 2.95 ± 0.21 | 1.6 | R-DARTS(L2)
FairDARTS | 3.3 ± 0.5 | 2.54 ± 0.05 | 0.4 | FairDARTS_B
DARTS- | - | 2.59 ± 0.08 | 0.4 | -
PR-DARTS | 3.4 | 2.32 | 0.17 | PR_DARTS
DARTS+PT | 3.0 | 2.61 ± 0.08 | 0.8 | DARTS+PT
VS-DARTS (avg) | 3.4 ± 0.3 | 2.50 ± 0.05 | 0.4 | VS-DARTS
VS-DARTS (best) | 3.38 | 2.43 | 0.4 | VS-DARTS (best)"""       # the last: our row beside it
TABLE2 = """\
NASNet_A | 3.3 | 2.65 | 5.3 | 564 | 26.0 |
AmoebaNet_B | 2.8 | 2.55 | 5.3 | 555 | 26.0 |
ENAS | 4.6 | 2.89 | - | - | - |
DARTS_V1 | 3.3 | 3.0 | - | - | - |
DARTS_V2 | 3.3 | 2.76 | 4.7 | 574 | 26.7 | not reproduced
SNAS_mild | - | - | 4.3 | 522 | 27.3 | not reproduced
SNAS_moderate | 2.8 | 2.85 | - | - | - |
GDAS | 3.4 | 2.93 | 5.3 | 581 | 26.0 | conv+fc
P_DARTS | 3.4 | 2.5 | 4.9 | 557 | 24.4 | ptflops
PC_DARTS | 3.6 | 2.57 | 5.3 | 586 | 25.1 | ptflops
FairDARTS_B | 3.88 | 2.51 | 4.8 | 541 | 24.9 | conv+fc
PR_DARTS | 3.4 | 2.32 | 5.0 | 543 | 24.1 | conv+fc
DARTS_PT_0 | 2.85 | - | - | - | - |
DARTS_PT_1 | 3.05 | - | - | - | - |
DARTS_PT_2 | 2.66 | - | - | - | - |
DARTS_PT_3 | 3.33 | - | - | - | - |
VS_DARTS | 3.38 | 2.43 | 5.3 | 589 | 24.8 | thop"""     # the others have no published figures
NOTES = """
Counted with 20 cells, 36 channels; on ImageNet 14 and 48 (GDAS: 50). Published, in millions, in \
brackets; as
conv+fc, as here; thop, with batch norms and average pools; or ptflops, with batch norms, \
ReLUs and pools.
R-DARTS, PNAS and VS-DARTS + Proxy are not published as cells.
- NASNet_A: published figures are of NASNet's own networks, not of this cell in DARTS's
- AmoebaNet_B: published figures are of its own networks; the ImageNet ones from DARTS's table
- ENAS: the cell drawn in the ENAS paper, in DARTS's network; 4.6M is of ENAS's own
- DARTS_V1: first order
- DARTS_V2: second order
- SNAS_mild: 4.3M is SNAS_moderate's count, not this cell's
- SNAS_moderate: Table 1's SNAS row
- PC_DARTS: found on CIFAR-10
- FairDARTS_B: 3.88M counts the auxiliary head; Table 1's row, 3.3 +- 0.5M, 2.54 %, \
is a mean of seven cells
- DARTS_PT_0: Table 1's 3.0M and 2.61 +- 0.08 % are means of 0 to 3; its ImageNet \
cell is not published
- VS_DARTS: the release's best cell, 3.72M; but Table 1's best row says 3.38M, which is VS_DARTS_2nd
- VS_DARTS_2nd: 3.38M as in Table 1's best row; the three cells' mean, 3.36M, is its \
3.4M (2.50 +- 0.05 %)
- VS_DARTS_without_LARC: no figure is published for it; Table 4 has no row of \
sqrt(beta) without LARC"""
TABLE3 = {  # errors (%) on CIFAR-10, CIFAR-100 and SVHN, each in S1, S2, S3 and S4
    "DARTS": "3.84 4.85 3.34 7.20  29.46 26.05 28.90 28.85  4.58 3.53 3.41 3.05",
    "R-DARTS(L2)": "2.78 3.31 2.51 3.56  24.25 22.24 23.99 21.94  4.79 2.51 2.48 2.50",
    "DARTS-ES": "3.01 3.26 2.74 3.71  28.37 23.25 23.73 21.26  2.72 2.60 2.50 2.51",
    "DARTS-ADA": "3.10 3.35 2.59 4.84  24.03 23.52 23.37 23.20  2.53 2.54 2.50 2.46",
    "PR-DARTS": "3.26 3.63 3.99 2.59  32.74 32.52 26.96 20.80  3.33 4.48 2.75 2.95",
    "DARTS+PT": "3.50 2.79 2.49 2.64  24.48 23.16 22.03 20.80  2.62 2.53 2.42 2.42",
    "VS-DARTS": "2.58 2.57 2.52 2.49  23.87 21.49 22.03 20.69  2.37 2.37 2.37 2.32"}
TABLE4 = """\
DARTS-L2 | 2.91 | DARTS-L2
DARTS-L2 + node norm | 2.71 | DARTS-L2 + node norm
DARTS-L2 + node norm + LARC | 2.60 | DARTS-L2 + node norm + LARC
VS-DARTS | 2.43 | VS-DARTS"""

FREE = {"genotype", "seed", "data", "device", "workers", "processes", "out", "resume", "evaluate",
        "search", "search_seconds", "seconds", "result", "folder", "program", "method", "keep_nets",
        "cell"}
COMPARED = {"node_norm", "larc", "larc_trust", "larc_clip", "sqrt_beta", "weight_decay"}
SPLITS = "train_split", "test_split"                        # what was read; older runs have none
OWN = {*"window ratio first max_decay train_epochs train_layers train_channels tune_epochs".split()}


def method(flags):
    """What the paper calls a search with these flags. What differs from its setting is named."""
    names = {"node_norm": "node norm", "larc": "LARC", "sqrt_beta": "sqrt(beta)"}
    switches = [name for flag, name in names.items() if flags[flag]]
    plain = "DARTS" if flags["weight_decay"] == 3e-4 else "DARTS-L2"
    base = METHODS.get(flags.get("method"), plain)
    if len(switches) == 3 and not flags.get("method"):
        base, switches = "VS-DARTS", []
    details = [" + ".join([base, *switches])]
    if flags["weight_decay"] != (5e-3 if base in ("VS-DARTS", "DARTS-L2") else 3e-4):
        details.append(f"weight decay {flags['weight_decay']:g}")
    if flags["larc"]:
        details += [f"trust {flags['larc_trust']:g}"] * (flags["larc_trust"] != 1)
        details += ["clip"] * flags["larc_clip"]
    return ", ".join(details)


def read_runs(folders):
    """Finished retrainings, each once: their flags, "cell", "result" and "folder".

    "search": the flags of the search that the cell is from, or None.
    """
    runs = {}
    for folder in map(Path, folders):
        config, result = folder / "config.json", folder / "result.json"
        cell = folder / "genotype.json"
        flags = {} if folder.is_dir() and not config.exists() else read_json(config)
        if flags.get("program") != "retrain.py":
            continue
        if not result.exists():
            print(f"{folder} is left out: it is not finished", file=sys.stderr)
            continue
        result = read_json(result)
        run = {"search": None, **flags, "result": result, "folder": folder}
        run["cell"] = read_json(cell) if cell.exists() else None
        run |= {split: result[split] for split in SPLITS if split in result}
        first = runs.setdefault(str([flags, result]), run)  # a link, or a copy, is the same run
        if first is not run:
            print(f"{folder} is left out: it is the same run as {first['folder']}", file=sys.stderr)
    return [*runs.values()]


def row_name(run):
    """The method of a searched cell, the name of a published one, or the file that it was in."""
    if run["search"]:
        return method(run["search"])
    if run["genotype"] in PUBLISHED:
        return run["genotype"]
    return f"{' '.join(run['genotype'].split()):.80} (no search)"


def make_rows(runs):
    """{name: runs}. Cells that differ share no row, but those of a method's searches do."""
    rows = {}
    for run in runs:
        name = row_name(run)
        while not run["search"] and name in rows and rows[name][0]["cell"] != run["cell"]:
            name += " *"                                    # another cell in a file of that name
        rows.setdefault(name, []).append(run)
    return dict(sorted(rows.items()))


def same_protocol(runs):
    """Raises SystemExit if runs differ: in all but FREE, and in searches COMPARED or OWN flags."""
    first = {}
    for run in runs:
        flags = {named(flag): value for flag, value in run.items() if flag not in FREE}
        search = run["search"] or {}
        for flag, value in search.items():
            if flag not in FREE | COMPARED:
                owner = search.get("method") if flag in OWN else "search"
                flags[f"{owner}'s {named(flag)}"] = value
        for flag, value in flags.items():
            other, folder = first.setdefault(flag, (value, run["folder"]))
            if value != other:
                raise SystemExit(
                    f"protocols differ: {flag} {value} in {run['folder']}, {other} in {folder}")


def named(flag):
    return flag if flag in SPLITS else f"--{flag}"


def protocol(run):
    """The data set and the size of a retraining or of a search, in words."""
    size = f" of {run['image_size']} pixels" if run["image_size"] else ""
    space = f", space {run['space']}" if "space" in run else ""
    return (f"{run['dataset']}, {run['limit'] or 'all'} images{size}{space}, "
            f"{run['epochs']} epochs, {run['layers']} cells, {run['init_channels']} channels")


def cells(runs):
    """The columns of a row: the last epoch's test error (%), mean and deviation, and every run's;
    parameters (M); a search's cost."""
    errors = [run["result"]["test_error"] for run in runs]
    deviation = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
    every = " ".join(f"{error:.2f}" for error in errors)
    parameters = np.mean([run["result"]["parameters"] for run in runs]) / 1e6
    cost, searches = "-", [run["search"] for run in runs if run["search"]]
    if searches:
        seconds, devices = zip(*{(search["seconds"], search["device"]) for search in searches})
        cost = f"{np.mean(seconds) / 3600:.2f} h, {', '.join(sorted({*devices}))}"
    return f"{np.mean(errors):.2f}{deviation} ({every})", f"{parameters:.3f}", cost


def published(number, runs):
    """[(name, numbers ..., our row beside it)] of the paper, if runs are on its data and size."""
    run, spaces = runs[0], {run["search"]["space"] for run in runs if run["search"]}
    size, whole = (run["layers"], run["init_channels"]), run["limit"] is None
    if SIZES.get(run["dataset"]) != size or not whole or run["image_size"] not in (None, 32):
        return []
    if number == "3" and spaces != {"darts"}:
        column = 4 * list(SIZES).index(run["dataset"]) + int(spaces.pop()[1]) - 1
        return [(name, line.split()[column], name) for name, line in TABLE3.items()]
    if number == "3" or run["dataset"] != "cifar10" or not spaces <= {"darts"}:
        return []
    return [row.split(" | ") for row in (TABLE1 if number == "1" else TABLE4).splitlines()]


def table(number, runs):
    rows, header = make_rows(runs), ["published: error (%)"]
    if number == "1":
        header = ["published: params (M)", "error (%)", "cost (GPU days)"]
        if "VS-DARTS" in rows:
            best = min(rows["VS-DARTS"], key=lambda run: run["result"]["test_error"])
            rows["VS-DARTS (best)"] = [best]
    searches = [f"; searched on {protocol(run['search'])}" for run in runs if run["search"]]
    print(f"\nRetrained on {protocol(runs[0])}{''.join(searches[:1])}\n")
    print_row("method", *header, "here: error (%), last epoch", "params (M)", "search")
    print_row(*["---"] * (len(header) + 4))
    for name, *numbers, ours in published(number, runs):
        found = rows.pop(ours, None)
        print_row(name, *numbers, *(cells(found) if found else "---"))
    for name, found in rows.items():
        print_row(name, *["-"] * len(header), *cells(found))


def print_row(*row):
    print("| " + " | ".join(row) + " |", flush=True)


def table2():
    """The published cells: counted here, and in brackets as published."""
    print_row("cell", "CIFAR-10: parameters", "error (%)", "ImageNet: parameters", "multiply-adds",
              "top-1 error (%)", "counted as", "source")
    print_row(*["---"] * 8)
    published = {}
    for line in TABLE2.splitlines():
        name, *published[name] = map(str.strip, line.split("|"))
    for name, genotype in PUBLISHED.items():
        small = network(genotype)
        large = network(genotype, 50 if name == "GDAS" else 48, imagenet=True)
        params, error, large_params, macs, top1, counted_as = published.get(name, [*"-----", ""])
        print_row(name, f"{count_parameters(small):,} ({params})", error,
                  f"{count_parameters(large):,} ({large_params})",
                  f"{count_macs(large, 224):,} ({macs})", top1, counted_as, SOURCES[name])
    print(NOTES)


def main(arguments):
    parser = Parser("experiments.tables", description=__doc__)
    parser.add_argument("table", choices="1234", help="which table")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of retrain.py; none for 2")
    options = parser.parse_args(arguments)
    number = options.table
    if bool(options.runs) == (number == "2"):
        parser.error("tables 1, 3 and 4 take folders of runs, and table 2 takes none")
    if number == "2":
        return table2()
    runs = [run for run in read_runs(options.runs) if run["search"] or number != "3"]
    if not runs:
        raise SystemExit(
            f"table {number} needs finished retrainings, and table 3 those of searched cells")
    parts = {}                                              # table 3 is one for each set and space
    for run in runs:
        part = (run["dataset"], run["search"]["space"]) if number == "3" else ()
        parts.setdefault(part, []).append(run)
    for part in sorted(parts):
        same_protocol(parts[part])                          # before anything is printed
    for part in sorted(parts):
        table(number, parts[part])


if __name__ == "__main__":
    start(main)
