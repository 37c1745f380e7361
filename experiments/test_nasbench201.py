"""Tests of the search on NAS-Bench-201, against an oracle and against what is published.

    python -m pytest -q experiments/test_nasbench201.py
"""
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import figures, nasbench201
from experiments.nasbench201 import (SuperNet201, from_text, look_up, rank_sum_p,
                                     signed_rank_p, to_text)
from model import place
from test_experiments import stop_and_resume
from test_vsdarts import (CPU, a_folder_of_its_own, assert_equals_oracle, checkpoints, float64,
                          norm_at, read_log, refusal, slow_norm, tensors_equal)

TINY = ["--dataset=digits", "--device=cpu", "--limit=128", "--batch_size=32", "--layers=3",
        "--init_channels=2"]


# ---------------------------------------------------------------- cells and their accuracies

# The trials of the first cell on CIFAR-10 were 94.26, 94.68 and 94.18. Any two edges differ in one
# of these cells.
@pytest.mark.parametrize("cell, accuracies, rank", [
    ("|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|"
     "+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|", [94.37, 73.22, 46.71], 1),
    ("|none~0|+|skip_connect~0|none~1|+|skip_connect~0|nor_conv_1x1~1|none~2|",
     [86.57, 58.13, 28.50], 12583),
    ("|avg_pool_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|none~0|nor_conv_1x1~1|avg_pool_3x3~2|",
     [87.94, 61.12, 25.75], 11553)])
def test_a_cell_has_its_published_accuracies_and_its_rank(capsys, cell, accuracies, rank):
    assert to_text(from_text(cell)) == cell
    values, found = look_up(from_text(cell))
    assert [*values.values()] == accuracies and found == rank
    nasbench201.main(["--cell", cell])
    assert capsys.readouterr().out.startswith(f"CIFAR-10 {accuracies[0]:.2f}%, CIFAR-100 ")


@pytest.mark.parametrize("flag, value, said", [
    ("--cell", "|max_pool_3x3~0|+|none~0|none~1|", "'max_pool_3x3' is none of none, "),
    ("--cell", "|none~1|+|none~0|none~1|+|none~0|none~1|none~2|", "a cell is |op~0|+|op~0|"),
    ("--space", "s1", "--space and --stem_multiplier belong to search.py"),
    ("--layers", "4", "--layers 4 is not a multiple of 3"),
    ("--image_size", "10", "--image_size 10 is not a multiple of 4")])
def test_what_is_not_of_nasbench201_is_refused_in_one_line(flag, value, said):
    assert said in refusal(nasbench201.main, [flag, value, "--out=new"])


# ---------------------------------------------------------------- the super-network

def slow_conv(p, name, x, stride=1):
    """ReLU, convolution, batch norm: NAS-Bench-201's ReLUConvBN, from its parameters."""
    weight = p[f"{name}.body.0.weight"]
    x = F.conv2d(F.relu(x), weight, stride=stride, padding=weight.shape[-1] // 2)
    return norm_at(p, f"{name}.body.1", x)


def slow_cell(p, name, x, node_norm, sqrt_beta):
    """Node 3. The rows of alpha are the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3."""
    nodes, row = [x], 0
    for j in (1, 2, 3):
        x_j = torch.zeros_like(x)
        for i in range(j):
            ops, inside = f"{name}.edges.{i}-{j}.ops", F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
            outputs = (torch.zeros_like(x), nodes[i],
                       slow_conv(p, f"{ops}.nor_conv_1x1.1", nodes[i]),
                       slow_conv(p, f"{ops}.nor_conv_3x3", nodes[i]),
                       slow_norm(F.avg_pool2d(nodes[i], 3, 1, 1) / inside))   # without the padding
            beta = torch.exp(p["alphas.cell"][row])
            beta = beta / beta.sum()
            for beta_o, output in zip(beta, outputs, strict=True):
                x_j = x_j + (beta_o.sqrt() if sqrt_beta else beta_o) * output
            row += 1
        nodes.append(slow_norm(x_j) if node_norm else x_j)
    return nodes[3]


def slow_supernet(p, cells, node_norm, sqrt_beta, x):
    """Three stages of so many cells, a residual block before the second and the third."""
    x, stage = norm_at(p, "stages.0.1", F.conv2d(x, p["stages.0.0.weight"], padding=1)), 1
    for block in range(3):
        if block > 0:
            name = f"stages.{stage}"
            shortcut = F.conv2d(F.avg_pool2d(x, 2), p[f"{name}.shortcut.1.weight"])
            x = shortcut + slow_conv(p, f"{name}.convs.1", slow_conv(p, f"{name}.convs.0", x, 2))
            stage += 1
        for _ in range(cells):
            x, stage = slow_cell(p, f"stages.{stage}", x, node_norm, sqrt_beta), stage + 1
    x = F.relu(norm_at(p, "norm", x)).mean((2, 3))
    return F.linear(x, p["classifier.weight"], p["classifier.bias"])


@pytest.mark.parametrize("node_norm, sqrt_beta, cells",
                         [(False, False, 1), (True, False, 2), (False, True, 1), (True, True, 2)])
def test_supernet_equals_the_oracle_in_values_and_gradients(float64, node_norm, sqrt_beta, cells):
    torch.manual_seed(0)
    net = place(SuperNet201(3, 3 * cells, 10, node_norm, sqrt_beta), CPU)
    for p in [*net.alphas.values(), *(w for w in net.weights if w.dim() == 1)]:
        p.data.normal_()                                    # betas uneven, batch norms not 1 and 0
    images = torch.randn(6, 3, 12, 8)
    assert_equals_oracle(net, slow_supernet, cells, node_norm, sqrt_beta, images)


# ---------------------------------------------------------------- the search

def test_each_flag_reaches_its_own_place_in_the_super_network():
    def made(*flags):
        net = nasbench201.make_net(nasbench201.parse(flags), 7)
        cells = [stage for stage in net.stages if isinstance(stage, nasbench201.Cell)]
        norm = type(cells[-1].normalize[0])
        return len(cells), norm, net.sqrt_beta, net.classifier.weight.shape
    assert made("--node_norm") == (15, nn.BatchNorm2d, False, (7, 64))
    assert made("--sqrt_beta", "--layers=6") == (6, nn.Identity, True, (7, 64))
    assert made("--init_channels=4") == (15, nn.Identity, False, (7, 16))


def test_a_stopped_run_goes_on_and_every_epoch_has_the_cell_of_the_largest_betas():
    flags = [*TINY, "--epochs=2", "--node_norm", "--larc", "--sqrt_beta"]
    stop_and_resume(nasbench201.main, [], flags, 1)
    assert tensors_equal(checkpoints("whole"), checkpoints("parts"))
    [result], [other] = read_log("whole/result.json"), read_log("parts/result.json")
    log = read_log("whole/log.jsonl")
    for record in log:
        cell = [row.index(max(row)) for row in record["alphas"]["cell"]]
        assert record["cell"] == to_text(cell)
        assert (record["accuracies"], record["rank"]) == look_up(cell)
    assert result == other
    assert result["accuracy"] == [record["accuracies"]["CIFAR-10"] for record in log]


def test_a_run_in_one_line_has_its_changed_flags_its_new_cells_and_its_last_betas():
    args = nasbench201.parse(["--node_norm", "--seed=7", "--out=run", "--device=cpu"])
    cells, betas = ["A", "A", "B"], 6 * [[0.1, 0.2, 0.4, 0.2, 0.1]]
    log = [{"cell": cell, "accuracies": {"CIFAR-100": 1, "CIFAR-10": 9}} for cell in cells]
    log[-1]["alphas"] = {"cell": torch.tensor(betas).log().tolist()}
    assert nasbench201.summary(args, log) == {
        "method": "norm", "seed": 7, "flags": {"node_norm": True, "seed": 7},
        "cells": ["A", None, "B"], "accuracy": [9, 9, 9], "betas": betas}


# ---------------------------------------------------------------- comparison of methods

def test_the_rank_sum_test_is_exact():
    assert rank_sum_p([1, 2, 3], [4, 5, 6, 7]) == pytest.approx(2 / 35)


def test_the_rank_sum_test_with_ties_equals_brute_force():
    """Counted by pairs, as Mann and Whitney do: a value of x above one of y, a tie half."""
    values = [84.3, 84.3, 54.3, 84.3, 88.2, 93.3, 54.3, 93.3]

    def pairs_above(chosen):
        others = [values[k] for k in range(8) if k not in chosen]
        return sum((values[k] > y) + (values[k] == y) / 2 for k in chosen for y in others)
    ways = [abs(pairs_above(chosen) - 8) for chosen in itertools.combinations(range(8), 4)]
    expected = sum(way >= ways[0] for way in ways) / len(ways)
    assert 0.1 < expected < 0.9 and rank_sum_p(values[:4], values[4:]) == pytest.approx(expected)


def test_the_signed_rank_test_is_exact():
    assert signed_rank_p([1, 2, 3, 4, 5]) == signed_rank_p([-1, -2, -3, -4, -5]) == 2 / 32
    assert signed_rank_p([1, 2, 3, 4, -5]) == 20 / 32      # 10 of 32 ways sum to 5 or less below 0


def test_the_signed_rank_test_with_ties_and_zeros_equals_brute_force():
    """Gaps of 0.1 0.1 -0.3 0.3 2 have ranks 1.5 1.5 3.5 3.5 5: with signs their sum is 8."""
    sums = [1.5 * a + 1.5 * b + 3.5 * c + 3.5 * d + 5 * e
            for a, b, c, d, e in itertools.product((-1, 1), repeat=5)]
    expected = sum(abs(value) >= 8 for value in sums) / 32
    assert signed_rank_p([90.1 - 90, 0, 0.1, -0.3, 92.3 - 92, 2]) == expected


# ---------------------------------------------------------------- the picture and the table

def made_up(method, seed, accuracy, **flags):
    betas = [[0.1, 0.2 + seed / 100, 0.3, 0.3, 0.1 - seed / 100]] * 6
    return {"method": method, "seed": seed, "flags": {"epochs": 3, "layers": 3, **flags},
            "cells": [None] * len(accuracy), "accuracy": accuracy, "betas": betas}


DARTS = [made_up("darts_l2", seed, [92.0, 91.0, 90.0 - seed ** 2])
         for seed in range(3)]
VS_DARTS = [made_up("vs_darts_1", 0, [60.0, 93.0, 94.0], node_norm=True),
            made_up("vs_darts_1", 1, [70.0, 92.0, 93.0])]


def table(capsys, runs, *flags):
    """The rows of the table of these runs."""
    Path("runs.jsonl").write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    figures.main(["nasbench201", "runs.jsonl", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| --- |")
    return lines[3:]


def test_the_picture_has_every_seed_the_median_and_the_marks():
    matplotlib = pytest.importorskip("matplotlib.figure")
    ax = matplotlib.Figure().subplots()
    figures.draw201([ax], figures.measure201(DARTS, None))
    lines = [(line.get_label(), [*line.get_ydata()]) for line in ax.lines]
    assert lines[:4] == [("a seed", [92, 91, 90]), ("a seed", [92, 91, 89]),
                         ("a seed", [92, 91, 86]), ("median", [92, 91, 89])]
    assert [label for label, _ in lines[4:]] == [
        "best cell, 94.37", "mean of all cells, 87.06", "all skip connections, 54.30"]
    assert [*ax.lines[0].get_xdata()] == [1, 2, 3]


def test_the_table_equals_a_plain_computation(capsys):
    darts, vs_darts = table(capsys, [*VS_DARTS, *DARTS])
    deviation = statistics.stdev([90, 89, 86])
    p = 2 / math.comb(5, 2)                                 # all above, or all below
    assert darts == (f"| DARTS-L2 | 3 | 89.00 | {265 / 3:.2f} ± {deviation:.2f} "
                     "| 86.00 | 90.00 | 2 | - | - | 0.210 | 0.100 |")
    assert vs_darts == ("| VS-DARTS | 2 | 93.50 | 93.50 ± 0.71 | 93.00 | 94.00 | 0 "
                        f"| {p:.4f} | 0.5000 | 0.205 | 0.100 |")


def test_seeds_are_paired_by_their_numbers_not_their_places(capsys):
    """Seeds 2, 1, 0 of DARTS-L2 end at 86, 89, 90; those of VS-DARTS above; its seed 7 is alone."""
    ends = {7: 1.0, 0: 91.0, 1: 90.0, 2: 87.0}
    above = [made_up("vs_darts_1", seed, [0.0, 0.0, end]) for seed, end in ends.items()]
    row = table(capsys, [*DARTS[::-1], *above])[1]
    assert row.split(" | ")[8] == f"{2 / 2 ** 3:.4f}"       # all three, or none, above


def test_an_unfinished_run_is_shown_but_not_tested(capsys):
    unfinished = {**VS_DARTS[1], "accuracy": [70.0]}
    _, row = table(capsys, [*DARTS, VS_DARTS[0], unfinished])
    assert row.startswith("| VS-DARTS | 2 (1 unfinished) | 82.00 | 82.00 ± 16.97 |")
    assert " | 1 | - | - | " in row                         # one below 90 %, and no p


def test_a_run_counts_once_and_methods_can_be_chosen(capsys):
    before = {**VS_DARTS[0], "accuracy": [60.0]}
    [row] = table(capsys, [before, *DARTS, *VS_DARTS, before], "--method=VS-DARTS")
    assert row.startswith("| VS-DARTS | 2 | 93.50 |")


def test_a_run_is_read_from_its_folder_too(capsys):
    nasbench201.main([*TINY, "--epochs=1", "--out=run"])
    [record] = read_log("run/log.jsonl")
    figures.main(["nasbench201", "run"])
    accuracy = record["accuracies"]["CIFAR-10"]
    assert f"| DARTS-L2 | 1 | {accuracy:.2f} |" in capsys.readouterr().out


def test_runs_of_two_settings_and_what_is_no_run_are_refused(capsys):
    other = made_up("darts", 0, [90.0], layers=6)
    for said, *given in (
            ("the settings of the runs differ: {", [*DARTS, other]),
            ("runs.jsonl has no run of experiments.", [{"epoch": 0}]),
            ("these runs are of other methods", DARTS, "--method=DARTS")):
        assert refusal(table, capsys, *given).startswith(said)
