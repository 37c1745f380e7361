"""Tests of the figures, tables and baselines, against the same computed the slow, obvious way.

    python -m pytest -q experiments
"""
import copy
import functools
import itertools
import json
import math
import pkgutil
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.func import functional_call
from torch.testing import assert_close

import data
import retrain
import search
from experiments import baselines, figures, nasbench201, tables
from genotypes import DARTS_PRIMITIVES, EDGES, PUBLISHED, SPACES, load_genotype, to_json
from model import SuperNet
from run import make_seed, read_json, write
from test_vsdarts import (SMALL, a_folder_of_its_own, open_split, program, refusal, slow_norm,
                          tensors_equal)

VS_DARTS = ["--node_norm", "--larc", "--sqrt_beta"]
CELL_TYPES = ("normal", "reduce")


def small(*flags):
    """Flags of a search of two steps an epoch."""
    return [*SMALL, "--limit=128", "--batch_size=32", "--space=five", *flags]


@pytest.fixture(scope="module", autouse=True)
def five():
    """A space of five edges, into nodes 2 and 3, for what does not depend on the space."""
    edges = {edge: ("none", "noise", "sep_conv_3x3") for edge in EDGES[:5]}
    SPACES["five"] = {"normal": edges, "reduce": edges}
    yield
    del SPACES["five"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Finished searches, in S3 with their super-networks, and folders that programs refuse."""
    root = tmp_path_factory.mktemp("kept")
    for name, flags in {"darts": ["--space=s3", "--keep_nets"], "s2": ["--space=s2"],
                        "vs": ["--space=s3", "--keep_nets", *VS_DARTS],
                        "five": ["--epochs=1", "--node_norm"]}.items():
        search.main(small("--epochs=2", *flags, f"--out={root / name}"))
    for name, program in {"unfinished": "search.py", "pt": "experiments.baselines perturbation",
                          "es": "experiments.baselines es"}.items():
        shutil.copytree(root / "vs", root / name)
        config = root / name / "config.json"
        config.write_text(config.read_text().replace("search.py", program))
    for name in ("genotype.json", "net-2.pt"):              # it goes on after its first epoch
        (root / "unfinished" / name).unlink()
    log = (root / "vs/log.jsonl").read_text().splitlines()
    (root / "unfinished/log.jsonl").write_text(log[0])
    (root / "pt/log.jsonl").write_text('{"decision": 0}\n')
    retrained(root / "r", None)
    return root


def read(folder):
    return figures.read_search(str(folder), figures.parse(["3", str(folder)]))[1]


def read_log(path):
    return [*map(json.loads, Path(path).read_text().splitlines())]


def without_clock(value):
    """The same without what the clock measured, at any depth."""
    if isinstance(value, dict):
        return {key: without_clock(part) for key, part in value.items()
                if key not in ("seconds", "images_per_second")}
    return [*map(without_clock, value)] if isinstance(value, (list, tuple)) else value


def contents(folder):
    """{name: content} of all logs, checkpoints and cells in a folder, without the clock."""
    readers = {"log*.jsonl": read_log, "*.pt": torch.load, "genotype.json": Path.read_text}
    return {str(path.relative_to(folder)): without_clock(read(path))
            for pattern, read in readers.items() for path in Path(folder).rglob(pattern)}


@pytest.fixture
def pages(monkeypatch):
    """The pages that are drawn."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    pages, savefig = [], Figure.savefig

    def spied(page, *given, **options):
        pages.append(page)
        savefig(page, *given, **options)
    monkeypatch.setattr(Figure, "savefig", spied)
    return pages


def slow_walk(net, images, weights=None):
    """Edge by edge: logits; of each cell its nodes, and of each edge (input, outputs, mixed)."""
    weights = weights or net.mixing_weights()               # {cell type: (edges, operations)}
    s0 = s1 = net.stem(images)
    cells = []
    for cell_type, cell in zip(net.cell_types, net.cells):
        nodes, edges = [cell.preprocess0(s0), cell.preprocess1(s1)], {}
        for (i, j), row in zip(EDGES, weights[cell_type]):
            weight = dict(zip(net.space[cell_type][i, j], row))
            outputs = {name: op(nodes[i]) for name, op in cell.edges[f"{i}-{j}"].ops.items()}
            mixed = sum(weight[name] * output for name, output in outputs.items())
            edges[i, j] = nodes[i], outputs, mixed
            x_j = mixed if i == 0 else x_j + mixed
            if i == j - 1:                                  # the last edge into node j
                nodes.append(cell.normalize[j - 2](x_j))
        cells.append((nodes, edges))
        s0, s1 = s1, torch.cat(nodes[2:], 1)
    return net.classifier(s1.mean((2, 3))), cells


def slow_covariance(x, y):
    """One channel after the other, in numpy."""
    x, y = (z.detach().transpose(0, 1).flatten(1).numpy() for z in (x, y))
    return np.mean([np.cov(a, b, bias=True)[0, 1] for a, b in zip(x, y)])


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def tiny_net(space="s3", node_norm=True, sqrt_beta=True, layers=3):
    """A super-network with alphas far from uniform, and a batch; float64."""
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 2, layers, 10, node_norm, sqrt_beta, stem_multiplier=1)
    for alpha in net.alphas.values():
        alpha.data.normal_()
    return net.double().train(), torch.randn(16, 3, 8, 8).double(), torch.randint(10, (16,))


def slow_step(args, w, g):
    """Of SGD or LARC at a rate of 0.1, without momentum, over that rate."""
    factor = 1
    if args.larc:                                           # the factor is taken as a constant
        factor = (args.larc_trust * w.norm() / (g.norm() + 5e-3 * w.norm() + 1e-8)).detach()
        factor = min(factor / 0.1, 1) if args.larc_clip else factor
    return factor * (g + 5e-3 * w)


# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("name", ["darts", "vs"])
def test_figure_3_equals_brute_force_after_every_epoch(kept, name):
    """On the first batch of the half for alpha; epoch 0 is the network that the seed makes."""
    searched, split = read(kept / name), open_split("digits")
    values = figures.measure3(searched, None)["variance"]
    images = data.normalize(split.images[64:96], split.spec)
    torch.manual_seed(2)
    net = search.make_supernet(searched, 10).train()
    for epoch in range(3):
        if epoch > 0:
            net.load_state_dict(torch.load(kept / f"{name}/net-{epoch}.pt"))
        nodes = slow_walk(net, images)[1][0][0]
        expected = [slow_covariance(x_j, x_j) for x_j in nodes[2:]]
        assert [line[epoch] for line in values.values()] == approx(expected, rel=1e-3)


def test_figure_4_is_the_mean_beta_of_none_by_node():
    alphas = {"normal": torch.randn(14, 8), "reduce": torch.randn(14, 8)}
    lists = {cell_type: alpha.tolist() for cell_type, alpha in alphas.items()}
    log = [{"beta_none": 0.125}, {"beta_none": 0.2, "alphas": lists}]
    numbers = figures.measure4(SimpleNamespace(space="darts", log=log), None)
    for cell_type, alpha in alphas.items():
        betas = alpha[:, 0].exp() / alpha.exp().sum(1)
        for j, into in zip("2345", betas.split([2, 3, 4, 5])):
            assert numbers["none"][cell_type[0].upper() + j] == approx(into.mean().item())
    assert (numbers["uniform"], numbers["mean_by_epoch"]) == (1 / 8, [0.125, 0.2])


@pytest.mark.parametrize("switches", [
    "--grad_clip 0.01", "--larc", "--larc --larc_clip --larc_trust 0.02"])
def test_figure_5_equals_a_step_of_the_optimizer(switches):
    net, images, labels = tiny_net()
    args = search.parse(["--learning_rate", "0.1", *switches.split()])
    loss = F.cross_entropy(net(images), labels)
    grads = dict(zip(net.weights, torch.autograd.grad(loss, net.weights)))
    clip = min(1, args.grad_clip / norm(grads.values()))
    measured = figures.sep_conv_gradients(net, 0, images, labels, args)
    for i in range(5):
        weights = [*net.cells[0].edges[f"{i}-5"].ops["sep_conv_3x3"].parameters()]
        w, g = norm(weights), norm([grads[w] for w in weights])
        step = 0.1 * norm([slow_step(args, w, clip * grads[w]) for w in weights])
        assert measured[f"{i}-5"] == approx([g, g / w, step / w])


def test_figure_5_takes_the_half_for_w_and_the_rates_of_the_epoch(kept, monkeypatch):
    searched, split, seen = read(kept / "darts"), open_split("digits"), []
    searched.log[1]["weight_decay"] = 0.03                  # as ADA logs it

    def gradients(net, layer, images, labels, args):
        assert_close(images, data.normalize(split.images[:32], split.spec))
        seen.append((args.learning_rate, args.weight_decay))
        return {"0-5": (1, 2, 3)}
    monkeypatch.setattr(figures, "sep_conv_gradients", gradients)
    sizes = figures.measure5(searched, None)
    assert [line["0-5"] for line in sizes.values()] == [[1] * 3, [2] * 3, [3] * 3]
    assert sum(seen, ()) == approx((0.025, 5e-3, 0.013, 0.03, 0.013, 0.03))


@pytest.mark.parametrize("cell_type, layer, i, j, sqrt_beta", [
    ("normal", 2, 2, 4, False), ("reduce", 3, 1, 3, True)])
def test_figure_6_equals_brute_force(cell_type, layer, i, j, sqrt_beta):
    net, images, _ = tiny_net("darts", sqrt_beta=sqrt_beta, layers=5)       # cells N R N R N
    row = EDGES.index((i, j))
    values = figures.mixed_variance(net, cell_type, row, images)
    x, outputs, mixed = slow_walk(net, images)[1][layer][1][i, j]
    variance = slow_covariance(mixed, mixed)
    ratio = variance / slow_covariance(x, x)
    assert (values["variance"], values["variance ratio"]) == approx((variance, ratio))
    assert values["sigma ratio"] == approx(math.sqrt(ratio))
    beta = dict(zip(DARTS_PRIMITIVES, torch.softmax(net.alphas[cell_type][row], 0).tolist()))
    for suffix, total in (("", 1), ("_without_none", 1 - beta["none"])):
        squares = C = 0
        for a, b in itertools.product(outputs, outputs):
            covariance = slow_covariance(outputs[a], outputs[b])
            assert values["covariances"][a][b] == approx(covariance, abs=1e-12)
            weights = beta[a] * beta[b] / total ** 2
            term = covariance * (math.sqrt(weights) if sqrt_beta else weights)
            if a == b:
                squares += term
            else:
                C += term
        assert (values[f"squares{suffix}"], values[f"C{suffix}"]) == approx((squares, C))


def test_tau_counts_pairs_and_its_ceiling_is_that_of_two_halves_of_the_images():
    right = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    numbers = figures.compare([0.2, 0.3, 0.5], [*right.bool()])     # even: 3 1 0; odd: 1 1 3
    assert numbers["accuracy"] == approx([100 * 4 / 6, 100 * 2 / 6, 100 * 3 / 6])
    assert numbers["tau"] == approx((-1 - 1 + 1) / 3)
    assert numbers["ceiling"] == approx((0 - 1 - 1) / 3)             # a tie counts for neither


def test_figure_2_on_a_rigged_super_network(monkeypatch):
    """The larger an operation's beta, the more images it gets right; when tuned, the fewer."""
    net, images = tiny_net("darts")[0], torch.linspace(-10, 10, 20_000)
    strengths = {key: alpha.argsort(1).argsort(1) - 3.5 for key, alpha in net.alphas.items()}
    net.sign, before = 1, copy.deepcopy(net.betas())

    def answers(net, half, limit):
        betas = net.betas()
        return images < net.sign * sum((betas[key] * strengths[key]).sum() for key in betas) / 28
    monkeypatch.setattr(figures, "answers", answers)
    monkeypatch.setattr(figures, "tune", lambda net, *_: setattr(net, "sign", -1))
    monkeypatch.setattr(figures, "load_net", lambda run, epoch: net)
    monkeypatch.setattr(search, "read_halves", lambda run, device: (None, None))
    options = SimpleNamespace(epoch=None, edge=["normal:0-2"], tune=3, images=None)
    numbers = figures.measure2(SimpleNamespace(log=[], device="cpu", folder="rigged"), options)
    edges = numbers["edges"].values()
    assert [edge["operations"] for edge in edges] == 28 * [[*DARTS_PRIMITIVES[1:]]]
    assert [edge["at once"]["tau"] for edge in edges] == 28 * [1]
    assert numbers["means"]["mean tau, at once"] == 1 and numbers["means"]["mean tau, tuned"] == -1
    assert tensors_equal(net.betas(), before)


def test_one_operation_alone_equals_brute_force():
    """Against weights of 1 for that operation, and 0 for the others."""
    net, images, _ = tiny_net("s3")
    cell_type, row, primitives = figures.edge_row(SPACES["s3"], "reduce:2-5")
    weights = {key: weight.detach() for key, weight in net.mixing_weights().items()}
    for operation in range(len(primitives)):
        figures.alone(net, cell_type, row, operation)
        weights[cell_type][EDGES.index((2, 5))] = torch.eye(3)[operation]
        assert_close(net(images), slow_walk(net, images, weights)[0])


def test_answers_are_those_of_images_normalized_by_batch():
    net, half = tiny_net("s2")[0].float(), open_split("digits")
    images = data.normalize(half.images[:700], half.spec)
    logits = torch.cat([slow_walk(net, part)[0] for part in images.split(512)])
    expected, right = logits.argmax(1) == half.labels[:700], figures.answers(net.eval(), half, 700)
    assert right.shape == (700,) and (right == expected).float().mean() > 0.995


def test_tuning_equals_a_plain_loop(kept):
    """On the half for w, by the search's SGD over a whole cosine, step by step."""
    searched = read(kept / "darts")
    searched.batch_size = 16                                # 4 steps an epoch
    w_half, _ = search.read_halves(searched, torch.device("cpu"))
    net, plain = figures.load_net(searched, 2), figures.load_net(searched, 2)
    figures.tune(net, searched, w_half, 2)
    batches = data.make_batches(w_half, 16, make_seed(2, "tune"))
    optimizer = torch.optim.SGD(plain.weights, 0.025, 0.9, weight_decay=5e-3)
    for step, (images, labels) in enumerate([*batches.epoch(0), *batches.epoch(1)]):
        optimizer.param_groups[0]["lr"] = 0.001 + 0.024 * (1 + math.cos(math.pi * step / 8)) / 2
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.weights, 5)
        optimizer.step()
    for a, b in zip(net.weights, plain.weights):
        assert_close(a, b)


@pytest.mark.parametrize("figure", [
    "1", "2 --images=20 --tune=1 --edge=normal:0-2", "3", "4", "5", "6", "overview"])
def test_every_figure_of_a_finished_and_an_unfinished_search_is_drawn(
        kept, monkeypatch, tmp_path, capsys, figure):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(kept)
    figures.main([*figure.split(), "darts", "unfinished", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    picture, numbers = map(Path, said.splitlines()[0].split(" and "))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    _, unfinished = read_json(numbers)
    assert unfinished == "VS-DARTS, 1 of 2 epochs: unfinished"
    assert ("\n  " in said) == (figure[0] in "23456")       # what a claim of the paper rests on


def test_the_numbers_printed_for_the_claims():
    """Values plain to see; "early" and "after the early stages" leave out what they say."""
    variances = {"node 2": [9, 0.5], "node 3": [1, 2.0]}
    assert [*figures.claim3({"variance": variances}).values()] == [4]
    assert [*figures.claim4({"mean_by_epoch": [0.2, 0.3]}).values()] == [0.3]
    edges = {"0-5": [3] * 9, "1-5": [6, 24] * 3 + [300] * 3}
    sizes = {"|g| / |w|": edges, "|step| / |w|": {"0-5": [1] * 9}}
    assert [*figures.claim5(sizes).values()] == approx([4, 1])              # 2 and 8 times: 4
    pairs = {"avg_pool_3x3": {"skip_connect": [0, 0.8], "sep_conv_3x3": [0, 0.1]},
             "skip_connect": {"sep_conv_3x3": [0, 0.3]}, "sep_conv_3x3": {}}
    edge = {"variance ratio": [9, 1, 2, 3, 2], "sigma ratio": [9, 3, 2, 4, 3],
            "C": [5, 0.2], "squares": [1, 0.8], "covariances": pairs}
    assert [*figures.claim6({"normal:1-3": edge}).values()] == approx([1, 2 / 3, 0.25, 0.8, 0.2])
    *_, other = figures.claim6({"reduce:1-3": edge}).values()   # its skip connection has weights
    assert other == approx(0.4)


# ---------------------------------------------------------------- tables

def searched(*flags, **others):
    """The search.json of a search of 36 seconds."""
    return {**vars(search.parse([*flags])), "seconds": 36, "device": "Tesla", **others}


def retrained(folder, source, error=3.0, *flags, genotype="runs/1/genotype.json"):
    """A folder as retrain.py leaves it. source: the search.json that its cell is from, or None."""
    Path(folder).mkdir()
    args = retrain.parse([f"--genotype={genotype}", f"--out={folder}", *flags])
    result = {"test_error": error, "parameters": 1_000_000 + 100_000 * error}
    write(Path(folder, "config.json"), json.dumps({**vars(args), "search": source}))
    write(Path(folder, "result.json"), json.dumps(result))


def printed(capsys, *arguments):
    """The rows of a table, by their first column."""
    tables.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    return {line.split(" | ")[0][2:]: line for line in lines if line.startswith("|")}


def test_a_row_has_the_mean_over_the_searches_of_a_method(capsys):
    for seed, error in enumerate((3.0, 4.0, 5.0)):
        retrained(f"vs{seed}", searched(*VS_DARTS, seconds=1800 * (seed + 2)), error)
    retrained("published", None, 2.0, genotype="P_DARTS")
    folders = ["vs0", "vs1", "vs2", "published"]
    ours = "4.00 ± 1.00 (3.00 4.00 5.00) | 1.400 | 1.50 h, Tesla |"
    assert printed(capsys, "4", *folders)["VS-DARTS"] == f"| VS-DARTS | 2.43 | {ours}"
    rows = printed(capsys, "1", *folders)
    assert rows["VS-DARTS (avg)"] == f"| VS-DARTS (avg) | 3.4 ± 0.3 | 2.50 ± 0.05 | 0.4 | {ours}"
    assert rows["VS-DARTS (best)"].endswith("| 0.4 | 3.00 (3.00) | 1.300 | 1.00 h, Tesla |")
    assert rows["P-DARTS"] == "| P-DARTS | 3.4 | 2.50 | 0.2 | 2.00 (2.00) | 1.200 | - |"


METHODS = """\
DARTS, first order |  | --weight_decay=3e-4
VS-DARTS, trust 0.5 |  | --node_norm --larc --sqrt_beta --larc_trust=0.5
DARTS-L2 + LARC, weight decay 0.1, clip |  | --larc --larc_clip --weight_decay=0.1
DARTS-ES | es | --weight_decay=3e-4
DARTS, second order | second_order | --weight_decay=3e-4
R-DARTS | r_darts | --weight_decay=3e-4
DARTS+PT | perturbation | --weight_decay=3e-4
"""                                                         # a row of Table 1 | program | flags


@pytest.mark.parametrize("line", METHODS.splitlines())
def test_a_row_is_of_a_method_and_says_what_differs_from_it(capsys, line):
    name, own, flags = line.split(" | ")
    retrained("run", searched(*flags.split(), method=own.strip()))
    assert " 3.00 (3.00) " in printed(capsys, "1", "run")[name]


def test_runs_of_two_protocols_share_no_table():
    retrained("es5", searched(method="es", window=5))
    retrained("ada", searched(method="ada", window=7))      # that of another method may differ
    retrained("longer", searched(), 3.0, "--epochs=7")
    retrained("s2", searched("--space=s2"))
    retrained("es7", searched(method="es", window=7))
    tables.main(["1", "es5", "ada"])
    for folder, said in {"longer": "--epochs 7 in longer, 600 in es5",
                         "s2": "search's --space s2 in s2, darts in es5",
                         "es7": "es's --window 7 in es7, 5 in es5"}.items():
        assert refusal(tables.main, ["1", "es5", folder]) == f"protocols differ: {said}"


@pytest.mark.parametrize("case", [
    "4 darts --dataset=cifar100", "4 darts --limit=100", "4 darts --image_size=16", "4 s2",
    "3 s2 --layers=8", "3 darts"])
def test_published_numbers_beside_their_like_only(capsys, case):
    number, space, *flags = case.split()
    retrained("run", searched(*VS_DARTS, f"--space={space}"), 3.0, *flags)
    _, _, row = printed(capsys, number, "run").values()
    assert row == "| VS-DARTS | - | 3.00 (3.00) | 1.300 | 0.01 h, Tesla |"


def test_table_3_is_one_for_each_data_set_and_space(capsys):
    retrained("s2", searched(*VS_DARTS, "--space=s2"), 9.0)
    retrained("s4", searched(*VS_DARTS, "--space=s4"), 20.0, "--dataset=cifar100")
    tables.main(["3", "s2", "s4"])
    lines = capsys.readouterr().out.splitlines()
    assert "| DARTS | 4.85 | - | - | - |" in lines and "| DARTS-ADA | 23.20 | - | - | - |" in lines
    assert "| VS-DARTS | 2.57 | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |" in lines
    assert "| VS-DARTS | 20.69 | 20.00 (20.00) | 3.000 | 0.01 h, Tesla |" in lines


def test_table_2_counts_the_published_cells(monkeypatch, capsys):
    monkeypatch.setattr(tables, "PUBLISHED", {"DARTS_V2": PUBLISHED["DARTS_V2"]})
    numbers = "3,349,342 (3.3) | 2.76 | 4,718,752 (4.7) | 529,911,552 (574) | 26.7"
    assert numbers in printed(capsys, "2")["DARTS_V2"]


# ---------------------------------------------------------------- baselines

def step_by_hand(net, optimizer, args, loss):
    """{name: weight} after a step of momentum SGD or LARC, differentiable in the alphas."""
    named = [pair for pair in net.named_parameters() if "alphas" not in pair[0]]
    grads, moved = torch.autograd.grad(loss, net.weights, create_graph=True), {}
    for (name, w), g in zip(named, grads):
        momentum = 0.9 * optimizer.state[w]["momentum_buffer"]
        moved[name] = w - 0.1 * (momentum + slow_step(args, w, g))
    return moved


@pytest.mark.parametrize("flags", ["", "--larc", "--larc --larc_clip --larc_trust=0.02"])
def test_second_order_equals_double_backward(monkeypatch, flags):
    """Its error falls as epsilon squared, which the kinks of ReLU would hide."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    net, images, labels = tiny_net("s2")
    args = search.parse(["--learning_rate=0.1", *flags.split()])
    optimizer, _, _ = search.make_optimizers(net, args)
    search.weight_step(net, optimizer, images, labels, 5.0)     # so that there is momentum
    valid = torch.randn_like(images)
    moved = step_by_hand(net, optimizer, args, F.cross_entropy(net(images), labels))
    loss = F.cross_entropy(functional_call(net, moved, valid), labels)
    exact = torch.cat(torch.autograd.grad(loss, [*net.alphas.values()]))

    def error(epsilon):
        batches = (valid, labels), (images, labels)
        found = baselines.second_order_gradient(net, optimizer, *batches, epsilon)
        return (torch.cat(found) - exact).abs().max()
    assert error(1e-3) < 1e-3 * exact.abs().max() and 90 < error(1e-2) / error(1e-3) < 110


def test_the_second_order_step_moves_alphas_only_and_draws_one_noise_for_each_batch(monkeypatch):
    net, *batch = tiny_net("s4")
    optimizers, seeds, seed = search.make_optimizers(net, search.parse([])), [], torch.manual_seed
    search.weight_step(net, optimizers[0], *batch, 5.0)
    before = copy.deepcopy([net.state_dict(), optimizers[0].state_dict()])
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    parts = SimpleNamespace(net=net, w_optimizer=optimizers[0], alpha_optimizer=optimizers[1])
    baselines.second_order_step(parts, batch, batch)
    w, moved, plus, minus = seeds
    assert w == plus == minus != moved
    after = [net.state_dict(), optimizers[0].state_dict()]
    for name in ("alphas.normal", "alphas.reduce"):
        assert not torch.equal(before[0].pop(name), after[0].pop(name))
    assert tensors_equal(before, after)


def test_second_order_gets_both_batches_of_its_step(monkeypatch):
    def gradient(net, w_optimizer, *batches):
        given.append(batches)
        return [torch.zeros_like(alpha) for alpha in net.alphas.values()]
    given = []
    monkeypatch.setattr(baselines, "second_order_gradient", gradient)
    baselines.main(["second_order", *small("--epochs=1", "--out=run")])
    w_half, alpha_half = search.read_halves(search.parse(small()), torch.device("cpu"))
    w = data.make_batches(w_half, 32, make_seed(2, "w")).epoch(0)
    alpha = data.make_batches(alpha_half, 32, make_seed(2, "alpha")).epoch(0)
    assert tensors_equal(given, [*zip(alpha, w)])


def test_eigenvalue_equals_that_of_the_full_hessian():
    net, *batch = tiny_net("five")
    record, validation = {"epoch": 0, "seconds": 1}, SimpleNamespace(epoch=lambda _: iter([batch]))
    baselines.look_at_hessian(SimpleNamespace(net=net, validation=validation), record)

    def loss(alphas):
        normal, reduce = alphas.view(2, 5, 3)
        values = {"alphas.normal": normal, "alphas.reduce": reduce}
        return F.cross_entropy(functional_call(net, values, batch[0]), batch[1])
    alphas = torch.cat([alpha.detach().flatten() for alpha in net.alphas.values()])
    largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, alphas))[-1]
    assert record["eigenvalue"] == approx(largest.item(), rel=1e-9)
    assert record["seconds"] > 1


def test_a_look_at_the_hessian_changes_nothing_of_the_search():
    """In S4, where every forward pass draws noise."""
    flags = small("--epochs=2", "--space=s4", "--weight_decay=3e-4")
    search.main([*flags, "--out=plain"])
    baselines.main(["es", *flags, "--out=es"])
    plain, es = torch.load("plain/checkpoint.pt"), torch.load("es/checkpoint.pt")
    assert all(math.isfinite(record.pop("eigenvalue")) for record in es["log"])
    assert tensors_equal(without_clock(plain), without_clock(es))


def alarms(values, window, ratio, first):
    """alarm() after 0, 1, ... epochs."""
    args = SimpleNamespace(window=window, ratio=ratio, first=first)
    log = [{"eigenvalue": value} for value in values]
    return [baselines.alarm(SimpleNamespace(args=args, log=log[:epochs]))
            for epochs in range(len(log) + 1)]


def test_alarm_on_made_up_eigenvalues():
    values = [1, 1, 1, 1, 2, 4, 8]                          # averages of two: 1, 1, 1, 1, 1.5, 3, 6
    assert alarms(values, 2, 0.75, first=3) == [None] * 5 + [3, 4, 5]
    assert alarms(values, 2, 0.75, first=7) == [None] * 7 + [5]
    assert alarms([1, 100, 100], 2, 0.75, first=1) == [None] * 3 + [1]      # there is no epoch 0
    assert alarms([1] * 20, 5, 0.75, first=10) == [None] * 21


@pytest.fixture
def rising(monkeypatch):
    """Eigenvalues that grow as the learning rate falls: they depend on the epoch alone."""
    monkeypatch.setattr(baselines, "look_at_hessian",
                        lambda parts, record: record.update(eigenvalue=record["lr"] ** -2))


@pytest.mark.parametrize("ratio, said", [(0.6, "\nalarm after "), (1e-9, "\nno alarm after 8 ")])
def test_es_stops_and_returns_to_the_epoch_before(rising, capsys, ratio, said):
    flags = small("--epochs=8", "--window=2", "--first=3", f"--ratio={ratio}")
    baselines.main(["es", *flags, "--out=run"])
    log = torch.load("run/checkpoint.pt")["log"]
    *before, back = alarms([record["eigenvalue"] for record in log], 2, ratio, first=3)
    assert said in capsys.readouterr().out and not any(before)
    assert (back is None) == (len(log) == 8)
    assert load_genotype("run/genotype.json")._asdict() == log[(back or 8) - 1]["genotype"]


def test_ada_goes_back_and_raises_the_weight_decay(rising, monkeypatch):
    """Both alarms go back to one epoch: the end is that of a search which there turns to 0.03."""
    flags = small("--epochs=6", "--weight_decay=3e-4")
    baselines.main(["ada", *flags, "--window=1", "--first=2", "--out=ada"])
    names = ("log-before-0.003", "log-before-0.03", "log")
    [first], [second], log = (read_log(f"ada/{name}.jsonl") for name in names)
    spent = sum(record["seconds"] for record in (first, second, *log))
    assert read_json("ada/search.json")["seconds"] == approx(spent)
    assert [first["weight_decay"], second["weight_decay"], log[-1]["weight_decay"]] == [
        3e-4, 0.003, 0.03]

    def train_epoch(parts, epoch, real=search.train_epoch):
        decay = 3e-4 if epoch < first["epoch"] else 0.03
        parts.w_optimizer.param_groups[0]["weight_decay"] = decay
        return real(parts, epoch)
    monkeypatch.setattr(search, "train_epoch", train_epoch)
    search.main([*flags, "--out=plain"])
    plain, ada = torch.load("plain/checkpoint.pt"), torch.load("ada/checkpoint.pt")
    assert all(tensors_equal(plain[name], ada[name]) for name in plain if name != "log")


def test_ada_goes_back_to_ever_earlier_epochs(monkeypatch, capsys):
    def look(parts, record):
        first = parts.w_optimizer.param_groups[0]["weight_decay"] == 3e-4
        record["eigenvalue"] = record["lr"] ** (-1 if first else -4)
    monkeypatch.setattr(baselines, "look_at_hessian", look)
    baselines.main(["ada", *small("--epochs=9", "--window=3", "--first=4", "--out=run")])
    first, second = map(int, re.findall(r"back to (\d+),", capsys.readouterr().out))
    assert second < first and len(read_log("run/log.jsonl")) == 9
    assert not [*Path("run").glob("checkpoint-*.pt")]


def test_r_darts_keeps_the_cell_of_the_lowest_validation_error(monkeypatch):
    """Of two that are as good, that of less weight decay."""
    errors, seen = {3e-4: 30, 9e-4: 20, 27e-4: 20, 81e-4: 25}, []
    monkeypatch.setattr(search, "search", lambda args, run: seen.append(args.weight_decay))
    monkeypatch.setattr(baselines, "train_briefly", lambda *given: errors[seen[-1]])
    monkeypatch.setattr(baselines, "load_genotype", str)
    monkeypatch.setattr(baselines, "finish", lambda run, cell: seen.append(cell))
    baselines.main(["r_darts", *small("--out=run")])
    assert seen == [*errors, "run/weight_decay-0.0009/genotype.json"]


def test_brief_training_sees_the_training_split_only(monkeypatch):
    """It trains on the half for w and is tested, not augmented, on that for alpha."""
    args, given = baselines.parse(small("--image_size=16", "--amp"), "r_darts"), []
    halves = search.read_halves(args, torch.device("cpu"))
    write("genotype.json", to_json(PUBLISHED["VS_DARTS"].genotype))
    monkeypatch.setattr(retrain, "train", lambda *these: given.extend(these))
    refusal(baselines.train_briefly, args, Path(), *halves)         # nothing was trained
    _, flags, _, batches = given
    train, test = batches(flags, None)
    tested = torch.cat([images for images, _ in test.epoch(0)])
    assert train.split is halves[0] and (train.train, train.cutout) == (True, 4)
    assert torch.equal(tested, data.normalize(halves[1].images, halves[1].spec))
    assert (flags.epochs, flags.layers, flags.init_channels, flags.amp) == (100, 8, 16, True)


@pytest.mark.parametrize("removed", [("normal", 5, 2), ("reduce", 5, slice(None))])
def test_decisions_take_the_place_of_beta(removed):
    net, images, _ = tiny_net("darts")
    decisions, betas = baselines.Decisions(net), net.mixing_weights()
    for weights in (decisions.get_buffer("normal"), betas["normal"].detach_()):
        weights[3], weights[4] = torch.eye(8)[4], 0
    betas[removed[0]].detach_()[removed[1:]] = 0
    logits, _ = slow_walk(net, images, betas)
    batches = [(images, logits.argmax(1)), (images, logits.argmin(1))]
    parts = SimpleNamespace(net=net.eval(), validation=SimpleNamespace(epoch=lambda turn: batches))
    assert baselines.accuracy_without(parts, decisions, 0, removed) == 50
    assert decisions.removed is None
    decisions.removed = removed
    assert_close(net(images), logits)


def test_an_edge_keeps_the_operation_without_which_accuracy_is_lowest():
    def kept(space, accuracies):
        decisions = baselines.Decisions(tiny_net(space)[0])
        record = decisions.decide_operation(
            "reduce", (1, 4), lambda removed: accuracies[removed[2]])
        return record["kept"], decisions.reduce[EDGES.index((1, 4))].tolist()
    assert kept("s3", [3, 2, 2]) == ("skip_connect", [0, 1, 0])
    assert kept("s3", [1, 2, 2]) == ("none", [1, 0, 0])
    assert kept("darts", [*range(8)])[0] == "max_pool_3x3"  # where DARTS+PT has no `none`


def test_a_node_loses_the_edge_without_which_accuracy_is_highest():
    decisions = baselines.Decisions(tiny_net("s3")[0])
    without = {0: 50, 1: 70, 2: 70, 3: 60, 4: 40}           # 2 goes, then 1, then 3
    record = decisions.decide_inputs("normal", 5, lambda removed: without[removed[1] - 9])
    assert record["kept"] == [0, 4] and record["accuracies"][0] == without
    assert [[*tried] for tried in record["accuracies"][1:]] == [[0, 1, 3, 4], [0, 3, 4]]
    assert (decisions.normal[9:] == 0).all(1).tolist() == [False, True, True, True, False]


def test_edges_are_decided_at_random_in_each_cell_in_turn_and_then_nodes():
    turns = baselines.Decisions(tiny_net("darts")[0]).order(2)
    types, _, things = zip(*turns)
    normal, reduce = [*things[:28:2]], [*things[1:28:2]]
    assert types == ("normal", "reduce") * 17 and sorted(things[28::2]) == [3, 4, 5]
    assert sorted(normal) == sorted(reduce) == sorted(EDGES)
    assert [*EDGES] != normal != reduce != [*EDGES]


def test_where_none_was_kept_the_next_operation_takes_its_edge():
    decisions = baselines.Decisions(tiny_net("s3")[0])
    decisions.normal[:], decisions.reduce[:] = torch.eye(3)[2], torch.eye(3)[0]     # 0: `none`
    for fixed in decisions.buffers():                       # each node keeps its last two edges
        fixed[[i < j - 2 for i, j in EDGES]] = 0
    cell = decisions.genotype()
    for name, nodes in {"sep_conv_3x3": cell.normal, "skip_connect": cell.reduce}.items():
        assert [*nodes] == [((name, j - 2), (name, j - 1)) for j in (2, 3, 4, 5)]


def test_perturbation_tunes_between_pairs_of_decisions(monkeypatch, kept):
    """At a tenth of the search's rate; not after the last pair."""
    seen = []
    for owner, name in ((baselines.Decisions, "decide_operation"), (search, "train_epoch"),
                        (baselines.Decisions, "decide_inputs")):
        def spied(*given, name=name, real=getattr(owner, name)):
            seen.append((name, given[1]))
            return real(*given)
        monkeypatch.setattr(owner, name, spied)
    baselines.main(["perturbation", str(kept / "five"), "--tune_epochs=2", "--out=run"])
    expected = []
    for first in range(0, 10, 2):
        expected += [("decide_operation", "normal"), ("decide_operation", "reduce")]
        expected += [("train_epoch", first), ("train_epoch", first + 1)]
    assert seen == [*expected, ("decide_inputs", "normal"), ("decide_inputs", "reduce")]
    saved = torch.load("run/checkpoint.pt")
    assert saved["w_optimizer"]["param_groups"][0]["lr"] == 0.0025


def test_perturbation_starts_from_the_searchs_network_and_costs_its_seconds_too(kept):
    baselines.main(["perturbation", str(kept / "five"), "--tune_epochs=0", "--out=run"])
    before, after = (torch.load(f"{folder}/checkpoint.pt") for folder in (kept / "five", "run"))
    assert torch.equal(before["net"]["classifier.weight"], after["net"]["classifier.weight"])
    found = read_json("run/search.json")
    spent = sum(record["seconds"] for record in before["log"] + after["log"])
    assert found["seconds"] == approx(spent) and found["method"] == "perturbation"


# ---------------------------------------------------------------- stopped baselines

ALARM = ["--window=1", "--first=3", "--ratio=1000"]         # after three epochs in any case
FLAGS = {
    "second_order": ["--epochs=3"], "es": ["--epochs=6", *ALARM], "ada": ["--epochs=3", *ALARM],
    "r_darts": ["--epochs=1", "--train_epochs=2", "--train_channels=2", "--train_layers=3"],
    "perturbation": ["--tune_epochs=1"]}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, kept):
    """A function: the folder and the arguments of a method's run that nothing has stopped."""
    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp("whole") / method
        flags = [str(kept / "five")] if method == "perturbation" else small()
        arguments = [method, *flags, *FLAGS[method]]
        baselines.main([*arguments, f"--out={folder}"])
        return folder, arguments
    return run


def stop(arguments, name, call=1):
    """Runs a baseline in `parts` until the function of this name was called `call` times."""
    real, calls = pkgutil.resolve_name(name), itertools.count(1)

    def stopping(*given):
        result = real(*given)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(name, stopping)
        baselines.main([*arguments, "--out=parts"])


@pytest.mark.parametrize("method, call, name", [
    ("second_order", 1, "search.weight_step"), ("second_order", 2, "run.Run.end_epoch"),
    ("es", 1, "search.weight_step"), ("es", 3, "run.Run.end_epoch"),        # an alarm is due
    ("ada", 1, "search.weight_step"), ("ada", 3, "run.Run.end_epoch"),      # an alarm is due
    ("ada", 1, "experiments.baselines.to_bytes"),           # the undone epochs' log is written
    ("ada", 2, "run.Run.load"),                             # it has gone back for the second time
    ("r_darts", 1, "search.weight_step"), ("r_darts", 2, "experiments.baselines.train_briefly"),
    ("r_darts", 2, "run.Run.end_epoch"),                    # in the first brief training
    ("perturbation", 1, "experiments.baselines.accuracy_without"),      # nothing is decided
    ("perturbation", 3, "run.Run.end_epoch"), ("perturbation", 3, "search.train_epoch")])
def test_a_stopped_run_goes_on_to_the_same_end(whole_runs, method, call, name):
    whole, arguments = whole_runs(method)
    stop(arguments, name, call)
    baselines.main([method, "--resume=parts"])
    assert tensors_equal(contents(whole), contents("parts"))


def test_an_infinite_loss_ends_es_in_one_line():
    flags = small("--learning_rate=2e9", "--grad_clip=2e9", "--out=run")
    assert "not finite after epoch 0" in refusal(baselines.main, ["es", *flags])


def test_r_darts_is_not_started_anew_over_its_finished_parts(whole_runs):
    """A run of other flags would mix its cells with theirs."""
    _, arguments = whole_runs("r_darts")
    stop(arguments, "search.weight_step", call=3)           # in the second search
    new = [*arguments, "--seed=3", "--out=parts"]
    assert "--resume parts" in refusal(baselines.main, new)
    assert read_json("parts/config.json")["seed"] == 2


def test_a_corrected_command_of_r_darts_corrects_the_flags_of_its_parts(whole_runs):
    _, arguments = whole_runs("r_darts")
    stop(arguments, "search.weight_step")                   # in the first search
    stop([*arguments, "--seed=3"], "search.weight_step")
    for config in ("parts/config.json", "parts/weight_decay-0.0003/config.json"):
        assert read_json(config)["seed"] == 3


@pytest.fixture
def other_images(monkeypatch):
    """A function: from then on the digits are others."""
    images, labels, classes = data.load_digits(True)
    others = 255 - images, labels, classes
    return lambda: monkeypatch.setattr(data, "load_digits", lambda train: others)


def test_r_darts_goes_on_with_the_same_images_only(whole_runs, other_images):
    stop(whole_runs("r_darts")[1], "search.weight_step", call=3)    # one search is finished
    other_images()
    said = refusal(baselines.main, ["r_darts", "--resume=parts"])
    assert "weight_decay-0.0003: the train_split was 128 images" in said


def test_perturbation_decides_on_the_images_and_classes_of_its_search_only(
        kept, other_images, monkeypatch):
    command = ["perturbation", str(kept / "five")]
    other_images()
    said = refusal(baselines.main, [*command, "--out=images"])
    assert "five/checkpoint.pt: the train_split was 128 images" in said
    images, labels, _ = data.load_digits(True)
    monkeypatch.setattr(data, "load_digits", lambda train: (images, labels, range(11)))
    said = refusal(baselines.main, [*command, "--out=classes"])
    assert "the classes differ (10)" in said


def test_perturbation_needs_its_search_until_the_first_decision_is_saved(kept):
    shutil.copytree(kept / "five", "five")
    stop(["perturbation", "five", "--tune_epochs=0"], "run.Run.end_epoch")
    shutil.rmtree("five")
    baselines.main(["perturbation", "--resume=parts"])
    assert Path("parts/genotype.json").exists()


def test_perturbation_by_default_has_a_folder_for_each_setting_never_too_long(kept):
    shutil.copytree(kept / "five", 250 * "x")
    folders = {baselines.parse_perturbation([250 * "x", *flags], "perturbation").out
               for flags in ([], ["--tune_epochs=1"])}
    assert len(folders) == 2 and all(len(Path(folder).name) < 256 for folder in folders)


def test_perturbation_takes_the_proxy_file_that_its_search_kept(kept):
    shutil.copytree(kept / "five", "five")
    config = read_json("five/config.json")
    write("five/config.json", json.dumps({**config, "proxy": "gone", "limit": None}))
    args = baselines.parse_perturbation(["five"], "perturbation")
    assert args.proxy == "five/proxy.json"


# ---------------------------------------------------------------- the script of our runs

ALL = "--node_norm --larc --sqrt_beta "
ROWS = {  # runs.sh: a run's name without space and seed, its flags not at their defaults
    "darts": "--weight_decay 3e-4", "es": "--weight_decay 3e-4", "darts_l2": "",
    "norm": "--node_norm", "norm_sqrt": "--node_norm --sqrt_beta",
    "norm_larc": "--node_norm --larc", "vs_darts": ALL, "vs_darts_1": ALL,
    "vs_darts_trust_0.1": ALL + "--larc_trust 0.1", "vs_darts_0.1": ALL + "--larc_trust 0.1",
    "vs_darts_0.3": ALL + "--larc_trust 0.3", "release": ALL + "--larc_trust 0.02 --larc_clip"}


def listed(which):
    """The commands of runs.sh for DATA and runs, started here, in words."""
    script = Path(baselines.__file__).with_name("runs.sh")
    launcher = ("env", "-C", Path.cwd(), "PYTHON=python", "bash")
    out, errors, status = program(script, which, "DATA", "runs", "--dry_run", launcher=launcher)
    assert (errors, status) == ("", 0)
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("which, count", [("small", 38), ("nasbench201", 90)])
def test_each_run_of_the_script_has_the_flags_of_its_name(which, count):
    """And alpha's rate times its steps is the paper's."""
    commands = listed(which)
    flags = "node_norm", "larc", "sqrt_beta", "larc_trust", "larc_clip", "weight_decay"
    for words in commands:
        parser = baselines.make_parser("es") if "es" in words else None     # has another default
        args = search.parse(words[words.index("--dataset"):], parser)
        _, row, seed = Path(args.out).name.split("-")
        named = vars(search.parse(ROWS[row].split()))
        assert [named[flag] for flag in flags] == [getattr(args, flag) for flag in flags]
        assert (args.data, args.seed) == ("DATA", int(seed))
        steps = args.epochs * math.ceil(args.limit / 2 / args.batch_size)
        assert steps * args.arch_learning_rate == approx(391 * 50 * 3e-4, 0.01)
    assert len({words[-1] for words in commands}) == count


def test_the_script_runs_five_seeds_of_nine_methods_and_then_five_more():
    names = [words[-1].split("-")[1:] for words in listed("nasbench201")]
    methods = [*nasbench201.METHODS.values()]
    assert names == [[method, seed] for five in ("01234", "56789")
                     for method in methods for seed in five]


def test_the_script_leaves_out_what_is_finished_and_resumes_what_has_begun():
    before = listed("small")
    for file in ("s3-darts_l2-0/genotype.json", "s3-vs_darts-0/config.json", "s4-es-2/config.json"):
        Path("runs", file).parent.mkdir(parents=True)
        Path("runs", file).touch()
    resumed = ["python", "search.py", "--resume", "runs/s3-vs_darts-0"]
    last = ["python", "-m", "experiments.baselines", "es", "--resume", "runs/s4-es-2"]
    assert listed("small") == [resumed, *before[2:-1], last]


def test_the_script_leaves_out_the_lines_of_nasbench201_jsonl():
    before = listed("nasbench201")
    Path("experiments").mkdir()
    done = [{"method": "darts_l2", "seed": 0, "x": 1}, {"method": "norm", "seed": 9, "x": 1}]
    write("experiments/nasbench201.jsonl", "\n".join(map(json.dumps, done)))
    assert listed("nasbench201") == [words for words in before if words[-1] not in (
        "runs/nb201-darts_l2-0", "runs/nb201-norm-9")]


# ---------------------------------------------------------------- bad input

BAD = [  # a command, and words of the line that refuses it
    ("figures 3 s2", "s2/net-1.pt is missing: --keep_nets"),
    ("figures 4 s2", "s2: there is no `none` in space s2"),
    ("figures 6 darts --edge normal:3-2", "--edge normal:3-2: there is none"),
    ("figures 5 darts --edge normal:0-2", "--edge is not for figure 5"),
    ("figures 2 darts vs --epoch 3", "darts/net-3.pt is missing"),
    ("figures 2 darts --images 1", "--images"),
    ("figures 1 nothing", "nothing is no published cell"),
    ("figures 3 nothing", "nothing/config.json cannot be read"),
    ("figures 3 vs r", "r is a run of retrain.py, not of search.py"),
    ("figures overview pt", "pt is a run of experiments.baselines perturbation, not of search.py"),
    ("figures overview darts --out darts/config.json/new", "config.json/new cannot be written"),
    ("tables 4", "take folders"),
    ("tables 2 darts", "table 2 takes none"),
    ("tables 4 darts", "table 4 needs finished retrainings"),
    ("tables 3 r", "table 3 those of searched cells"),
    ("tables 1 nothing", "nothing/config.json cannot be read"),
    ("baselines nothing", "no method nothing: choose one of second_order, es, ada, r_darts, "),
    ("baselines es --max_decay=1", "unrecognized arguments: --max_decay=1"),
    ("baselines ada --weight_decay=0", "must be above 0 and below --max_decay 0.03"),
    ("baselines ada --weight_decay=0.1", "must be above 0 and below --max_decay 0.03"),
    ("baselines r_darts --weight_decay=1e-3", "r_darts takes no --weight_decay"),
    ("baselines ada --resume=es", "es is not a run of experiments.baselines ada"),
    ("baselines perturbation", "perturbation needs a finished run of search.py, and RUN is none"),
    ("baselines perturbation unfinished", "a finished run of search.py, and unfinished is none"),
    ("baselines perturbation es", "es is not a run of search.py"),
    ("baselines perturbation vs --learning_rate=1", "unrecognized arguments: --learning_rate=1"),
]


@pytest.mark.parametrize("command, said", BAD)
def test_bad_input_ends_in_one_line_and_changes_nothing(kept, monkeypatch, capsys, command, said):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in kept.rglob("*")}
    monkeypatch.chdir(kept)
    monkeypatch.setattr(figures, "find_spec", lambda name: True)
    before = files()
    name, *arguments = command.split()
    with pytest.raises(SystemExit) as error:
        {"figures": figures, "tables": tables, "baselines": baselines}[name].main(arguments)
    text = capsys.readouterr().err if error.value.code == 2 else f"{error.value}\n"
    assert said in text and text.count("\n") == 1
    assert files() == before


def test_every_method_has_a_help_and_none_runs_under_torchrun(monkeypatch):
    for method in baselines.METHODS:
        with pytest.raises(SystemExit, match="0"):
            baselines.main([method, "--help"])
    monkeypatch.setattr(baselines, "WORLD", 2)
    assert "without torchrun" in refusal(baselines.main, ["es", "--resume=nothing"])
