"""Tests: values and gradients against oracles written the slow, obvious way; no download, no GPU, nothing timed.

    python -m pytest -q
"""
import gzip
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import save_image

import baselines
import data
import figures
import genotypes
import model
import retrain
import run
import search
from genotypes import EDGES, PUBLISHED, SPACES, Genotype
from larc import LARC
from model import (OPS, AuxiliaryHead, Cell, FactorizedReduce, MixedOp, Network, ReLUFirst, SearchCell, SuperNet, count_macs,
                   count_parameters, drop_path, mixing_weights)

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # programs: on the CPU
SMALL = ["--dataset", "digits", "--device", "cpu", "--layers", "3", "--init_channels", "2", "--batch_size", "256"]
torch.set_num_threads(1)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture(autouse=True)
def no_reason_to_stop(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(run, "stop", None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


# ---------------------------------------------------------------- the super-network against a slow DARTS

def slow_norm(x):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def slow_pool(name, x, stride):
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), value=float("nan")), 3, stride=stride)
    patches = patches.unflatten(1, (x.shape[1], 9))                                      # (B, C, 9, places)
    inside = ~patches.isnan()
    if name == "max_pool_3x3":
        pooled = patches.masked_fill(~inside, float("-inf")).max(2).values
    else:
        pooled = patches.masked_fill(~inside, 0).sum(2) / inside.sum(2)
    side = (x.shape[2] + stride - 1) // stride
    return pooled.unflatten(2, (side, side))


def slow_reduce(p, prefix, x):
    x = F.relu(x)
    halves = [F.conv2d(x, p[f"{prefix}.body.0.conv1.weight"], stride=2),
              F.conv2d(x[:, :, 1:, 1:], p[f"{prefix}.body.0.conv2.weight"], stride=2)]
    return slow_norm(torch.cat(halves, 1))


def slow_op(name, p, prefix, x, stride):
    C, kernel = x.shape[1], int(name[-1]) if name[-1].isdigit() else None
    if name == "skip_connect":
        return x if stride == 1 else slow_reduce(p, prefix, x)
    if "pool" in name:
        return slow_norm(slow_pool(name, x, stride))
    if "dil" in name:
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.0.weight"], stride=stride, padding=kernel - 1, dilation=2, groups=C)
        return slow_norm(F.conv2d(x, p[f"{prefix}.body.1.weight"]))
    for first, step in ((0, stride), (4, 1)):                                            # sep_conv: twice
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.{first}.weight"], stride=step, padding=kernel // 2, groups=C)
        x = slow_norm(F.conv2d(x, p[f"{prefix}.body.{first + 1}.weight"]))
    return x


def slow_supernet(p, space, layers, node_norm, sqrt_beta, x):
    """DARTS's super-network from its parameters: every edge on its own, edges counted by offsets as DARTS does."""
    x = F.conv2d(x, p["stem.0.weight"], padding=1)
    s0 = s1 = slow_norm(x) * p["stem.1.weight"][:, None, None] + p["stem.1.bias"][:, None, None]
    reduced_before = False
    for layer in range(layers):
        reduction = layer in (layers // 3, 2 * layers // 3)
        kind, cell = ("reduce" if reduction else "normal"), f"cells.{layer}"
        beta = torch.exp(p[f"alpha_{kind}"]) / torch.exp(p[f"alpha_{kind}"]).sum(1, keepdim=True)
        states = [slow_reduce(p, f"{cell}.preprocess0", s0) if reduced_before else
                  slow_norm(F.conv2d(F.relu(s0), p[f"{cell}.preprocess0.body.0.weight"])),
                  slow_norm(F.conv2d(F.relu(s1), p[f"{cell}.preprocess1.body.0.weight"]))]
        offset = 0
        for j in range(2, 6):
            total = 0
            for i in range(j):
                stride = 2 if reduction and i < 2 else 1
                for o, name in enumerate(space[kind][i, j]):
                    if name != "none":
                        weight = beta[offset + i, o].sqrt() if sqrt_beta else beta[offset + i, o]
                        total = total + weight * slow_op(name, p, f"{cell}.edges.{i}->{j}.ops.{name}", states[i], stride)
            offset += j
            if node_norm:                                                                # Eq. 3, channel by channel
                total = torch.stack([(c - c.mean()) / torch.sqrt(c.var(unbiased=False) + 1e-5)
                                     for c in total.unbind(1)], 1)
            states.append(total)
        s0, s1, reduced_before = s1, torch.cat(states[2:], 1), reduction
    return s1.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"]


@pytest.mark.parametrize("node_norm, sqrt_beta, space", [
    (False, False, "darts"), (True, False, "darts"), (False, True, "darts"), (True, True, "darts"), (True, True, "s1")])
def test_supernet_equals_slow_darts(float64, node_norm, sqrt_beta, space):
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 2, 4, 10, node_norm, sqrt_beta)
    for alpha in net.alphas:
        alpha.data.normal_()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    logits = net(images)
    expected = slow_supernet(leaves, SPACES[space], 4, node_norm, sqrt_beta, images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=0, atol=1e-10, msg=name)


def test_supernet_parameter_counts():
    counts = {name: sum(p.numel() for p in SuperNet(space).weights) for name, space in SPACES.items()}
    assert counts == {"darts": 1930618, "s1": 405146, "s2": 665466, "s3": 665466, "s4": 624506}
    assert sum(p.numel() for p in SuperNet(SPACES["darts"], stem_multiplier=1).weights) == 1928154
    assert sum(p.numel() for p in SuperNet(SPACES["s3"], num_classes=100).weights) == 665466 + 23130


def test_alphas_and_weights_share_out_all_parameters():
    net = SuperNet(SPACES["s1"], 2, 3)
    alphas, weights = {id(p) for p in net.alphas}, {id(p) for p in net.weights}
    assert not alphas & weights and alphas | weights == {id(p) for p in net.parameters()}
    assert {"alpha_normal", "alpha_reduce"} <= net.state_dict().keys() and net.alpha_normal.shape == (14, 2)
    other = SuperNet(SPACES["s1"], 2, 3)
    other.load_state_dict(net.state_dict())
    assert search.derive(other.space, other.betas()) == search.derive(net.space, net.betas())
    many = torch.cat([SuperNet(SPACES["darts"], 1, 3).alpha_normal.detach() for _ in range(20)])
    assert abs(many.std().item() / 1e-3 - 1) < 0.1 and abs(many.mean().item()) < 1e-4    # 1e-3 x N(0, 1)


@pytest.mark.parametrize("size", [8, 9, 15, 28])
def test_supernet_takes_odd_and_small_images(size):
    assert SuperNet(SPACES["darts"], 2, 4)(torch.randn(2, 3, size, size)).shape == (2, 10)


def node_variances(**switches):
    """Variances of nodes 2 to 5 of a fresh cell on unit-variance input, averaged over five initialisations."""
    rows = []
    for seed in range(5):
        torch.manual_seed(seed)
        edges, x_j = SPACES["darts"]["normal"], {}
        cell = SearchCell(edges, 16, 16, 16, False, False, switches["node_norm"])
        for j in range(2, 6):
            cell.normalize[j - 2].register_forward_hook(lambda *args, j=j: x_j.update({j: args[2]}))
        with torch.no_grad():
            cell(torch.randn(16, 16, 16, 16), torch.randn(16, 16, 16, 16), mixing_weights(torch.zeros(14, 8), switches["sqrt_beta"]))
        rows.append([x_j[j].var(unbiased=False).item() for j in range(2, 6)])
    return np.mean(rows, axis=0)


def test_node_normalization_makes_node_variances_one():
    np.testing.assert_allclose(node_variances(node_norm=False, sqrt_beta=False), [0.29, 0.62, 1.16, 1.94], rtol=0.15)
    np.testing.assert_allclose(node_variances(node_norm=True, sqrt_beta=False), [1, 1, 1, 1], rtol=1e-3)
    np.testing.assert_allclose(node_variances(node_norm=True, sqrt_beta=True), [1, 1, 1, 1], rtol=1e-3)


def test_sqrt_beta_without_node_norm_explodes():
    np.testing.assert_allclose(node_variances(node_norm=False, sqrt_beta=True), [2.3, 6, 15, 32], rtol=0.2)


def test_node_norm_uses_running_statistics_in_eval_mode(float64):
    torch.manual_seed(0)
    cell = SearchCell({(0, 2): ("skip_connect",), (1, 2): ("none",)}, 2, 2, 2, False, False, node_norm=True)
    beta = torch.ones(2, 1)
    cell(torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4), beta)
    cell.eval()
    norm, x = cell.normalize[0], torch.randn(1, 2, 4, 4)
    x_j = cell.preprocess0(x)
    expected = (x_j - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + 1e-5)
    torch.testing.assert_close(cell(x, x, beta), expected)


# ---------------------------------------------------------------- mixing weights, Eq. 1, 4 and 6

def test_mixing_weights_equal_softmax_and_its_root(float64):
    alpha = torch.randn(14, 8, requires_grad=True)
    for sqrt_beta in (False, True):
        expected = torch.exp(alpha) / torch.exp(alpha).sum(1, keepdim=True)
        expected = expected.sqrt() if sqrt_beta else expected
        got, ramp = mixing_weights(alpha, sqrt_beta), torch.arange(8.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad((w * ramp).sum(), alpha)[0] for w in (got, expected)),
                                   rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [200.0, float("-inf")])
def test_root_of_beta_has_finite_gradients(first):
    alpha = torch.tensor([[first, 0, 0, 1]], requires_grad=True)
    (mixing_weights(alpha, sqrt_beta=True) * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert alpha.grad.isfinite().all()
    naive = torch.softmax(alpha, -1).sqrt()
    torch.testing.assert_close(mixing_weights(alpha, sqrt_beta=True), naive)             # the values are the naive ones


def operation_outputs(mixed, x, names):
    return torch.stack([mixed(x, torch.eye(len(names))[k]).flatten() for k in range(len(names))])


def test_equation_4_is_an_identity(float64):
    torch.manual_seed(0)
    names = genotypes.DARTS_PRIMITIVES[1:]
    mixed, x = MixedOp(4, 1, names), slow_norm(torch.randn(8, 4, 8, 8))
    outputs, beta = operation_outputs(mixed, x, names), torch.softmax(torch.randn(7), 0)
    covariance = torch.cov(outputs, correction=0)
    right = sum(beta[o] ** 2 * covariance[o, o] for o in range(7)) + sum(
        beta[i] * beta[j] * covariance[i, j] for i in range(7) for j in range(7) if j != i)
    torch.testing.assert_close(mixed(x, beta).var(unbiased=False), right, rtol=0, atol=1e-12)


def test_equation_6_keeps_the_variance_whatever_beta(float64):
    torch.manual_seed(0)
    names = genotypes.DARTS_PRIMITIVES[4:]                                               # uncorrelated: C is about 0
    mixed, x = MixedOp(16, 1, names), slow_norm(torch.randn(16, 16, 8, 8))
    with torch.no_grad():
        for scale in (0, 1, 2, 4):
            alpha = scale * torch.randn(4)
            beta = mixing_weights(alpha)
            covariance = torch.cov(operation_outputs(mixed, x, names), correction=0)
            C = (beta.sqrt()[:, None] * covariance * beta.sqrt()).sum() - (beta * covariance.diag()).sum()
            variance = mixed(x, mixing_weights(alpha, sqrt_beta=True)).var(unbiased=False)
            torch.testing.assert_close(variance, 1 + C, rtol=0.01, atol=0)
            assert abs(variance - 1) < 0.15
            torch.testing.assert_close(mixed(x, beta).var(unbiased=False), beta.square().sum(), rtol=0.3, atol=0)  # Eq. 5


def test_mixed_operation_skips_none_but_its_beta_counts(float64):
    mixed, x = MixedOp(2, 1, ("none", "skip_connect")), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(mixed(x, mixing_weights(torch.zeros(2))), x / 2)
    for stride, size in ((1, 5), (2, 3)):                                                # none alone: zeros
        assert torch.equal(MixedOp(2, stride, ("none",))(torch.randn(1, 2, 5, 5), torch.ones(1)), torch.zeros(1, 2, size, size))
    with pytest.raises(ValueError):
        mixed(x, mixing_weights(torch.zeros(3)))                                         # a beta too many


# ---------------------------------------------------------------- operations

@pytest.mark.parametrize("size", [7, 8, 9, 15])
def test_factorized_reduce_on_any_size(float64, size):
    torch.manual_seed(0)
    op, x = FactorizedReduce(3, 6, affine=False), torch.randn(2, 3, size, size)
    got = op(x)
    assert got.shape == (2, 6, (size + 1) // 2, (size + 1) // 2)
    convs, relu = op.body[0], F.relu(x)
    rows = torch.arange(0, size, 2)
    for half, conv, start in ((got[:, :3], convs.conv1, 0), (got[:, 3:], convs.conv2, 1)):
        picked = torch.zeros(2, 3, len(rows), len(rows))
        for a, b in itertools.product(range(len(rows)), repeat=2):
            if rows[a] + start < size and rows[b] + start < size:
                picked[:, :, a, b] = relu[:, :, rows[a] + start, rows[b] + start]
        torch.testing.assert_close(half, slow_norm(torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], picked)))


@pytest.mark.parametrize("name", ["nor_conv_1x1", "skip_connect"])
def test_strided_1x1_convolutions_train_in_channels_last(name):
    op = OPS[name](4, 2, True).to(memory_format=torch.channels_last)                     # a strided convolution dies here
    for _ in range(5):
        x = torch.randn(4, 4, 56, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
        op(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("stride, size", [(1, 8), (1, 7), (2, 8), (2, 7)])
def test_every_operation_keeps_or_halves_the_size_and_its_input(name, stride, size):
    op, x = OPS[name](4, stride, True), torch.randn(2, 4, size, size)
    before = x.clone()
    assert op(x).shape == (2, 4, -(-size // stride), -(-size // stride))
    assert torch.equal(x, before)


def test_noise_is_standard_normal_fresh_and_without_gradient():
    op, x = OPS["noise"](4, 2, False), torch.randn(8, 4, 16, 16, requires_grad=True)
    op.eval()
    first, second = op(x), op(x)
    assert not torch.equal(first, second) and not first.requires_grad and first.shape == (8, 4, 8, 8)
    assert abs(first.mean()) < 0.1 and abs(first.var() - 1) < 0.1 and not list(op.parameters())


# ---------------------------------------------------------------- LARC

def slow_larc(w, g, m, lr, momentum, decay, trust, clip):
    """One tensor at a time, the formulas of larc.py's docstring."""
    w_norm, g_norm = math.sqrt((w * w).sum().item()), math.sqrt((g * g).sum().item())
    factor = 1.0
    if w_norm > 0 and g_norm > 0:
        factor = trust * w_norm / (g_norm + decay * w_norm + 1e-8)
        if clip:
            factor = 1.0 if lr == 0 else min(factor / lr, 1.0)
    m = momentum * m + factor * (g + decay * w)
    return w - lr * m, m


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 5e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("trust", [1.0, 0.02])
def test_larc_equals_a_loop_over_tensors(float64, clip, decay, momentum, trust):
    torch.manual_seed(0)
    params = [torch.randn(5, 3), torch.zeros(4), torch.randn(7), torch.randn(2), 100 * torch.randn(3)]
    params = [p.requires_grad_() for p in params]
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    optimizer = LARC(params, lr=0.1, momentum=momentum, weight_decay=decay, trust_coefficient=trust, clip=clip)
    for lr in (0.1, 0.025, 0.0, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        for k, p in enumerate(params):
            p.grad = torch.zeros_like(p) if k == 2 else torch.randn_like(p) * 10.0 ** (k - 2)
        params[3].grad = None                                                            # left alone
        optimizer.step()
        expected = [(w, m) if p.grad is None else slow_larc(w, p.grad, m, lr, momentum, decay, trust, clip)
                    for p, (w, m) in zip(params, expected)]
        for p, (w, _) in zip(params, expected):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
            assert p.isfinite().all()


def test_larc_step_has_the_papers_length(float64):
    w = torch.randn(6, requires_grad=True)
    w.grad, before = torch.randn(6), w.detach().clone()
    LARC([w], lr=0.025, momentum=0).step()
    assert (w - before).norm().item() == pytest.approx(0.025 * before.norm().item(), rel=1e-6)  # lr |w|, whatever |g|


def test_larc_is_an_optimizer_that_schedulers_and_state_dicts_know():
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        optimizer = LARC(net.parameters(), lr=0.1, weight_decay=1e-2)
        return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def steps(net, optimizer, scheduler, numbers):
        for k in numbers:
            torch.manual_seed(k)
            optimizer.zero_grad()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            scheduler.step()
    net, optimizer, scheduler = make()
    steps(net, optimizer, scheduler, range(6))
    half = make()
    steps(*half, range(3))
    fresh = make()
    for part, saved in zip(fresh, half):
        part.load_state_dict(saved.state_dict())
    steps(*fresh, range(3, 6))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert torch.equal(fresh[0].weight, net.weight)
    assert fresh[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1
    with pytest.raises(ValueError, match="trust_coefficient"):
        LARC(net.parameters(), lr=0.1, trust_coefficient=0)


# ---------------------------------------------------------------- derivation

def brute_derive(space, betas):
    """All operations of a node in one list, strongest first; taken from the top until two edges have one."""
    cells = {}
    for kind in ("normal", "reduce"):
        rows = dict(zip(space[kind], betas[kind].tolist()))
        nodes = []
        for j in (2, 3, 4, 5):
            all_ops = [(-rows[i, j][o], i, o, name) for i in range(j) for o, name in enumerate(space[kind][i, j])
                       if name != "none"]
            node = []
            for _, i, _, name in sorted(all_ops):
                if len(node) < 2 and i not in [source for _, source in node]:
                    node.append((name, i))
            nodes.append(tuple(node))
        cells[kind] = tuple(nodes)
    return Genotype(cells["normal"], (2, 3, 4, 5), cells["reduce"], (2, 3, 4, 5))


@pytest.mark.parametrize("space", SPACES)
def test_derivation_equals_brute_force(space):
    torch.manual_seed(0)
    for trial in range(100):
        betas = {kind: torch.rand(14, len(edges[0, 2])) for kind, edges in SPACES[space].items()}
        if trial % 2:                                                                    # ties, among edges and operations
            betas = {kind: (beta * 3).round() for kind, beta in betas.items()}
        assert search.derive(SPACES[space], betas) == brute_derive(SPACES[space], betas)


def test_derivation_ignores_none_however_large():
    betas = {kind: torch.full((14, 3), 0.1) for kind in ("normal", "reduce")}
    for beta in betas.values():
        beta[:, 0] = 0.9
    genotype = search.derive(SPACES["s3"], betas)
    assert genotype.normal == ((("skip_connect", 0), ("skip_connect", 1)),) * 4


S1_BY_HAND = """
0->2 skip dil3 max avg   1->2 skip dil5 max dil3  0->3 skip dil5 max avg   1->3 skip sep3 max avg   2->3 skip dil3 skip dil5
0->4 max skip max avg    1->4 skip sep3 max sep3  2->4 skip sep3 skip dil3 3->4 skip dil3 skip dil5
0->5 skip sep3 max avg   1->5 max skip max avg    2->5 skip dil3 skip dil5 3->5 dil3 dil5 skip dil5 4->5 dil3 dil5 skip dil5
"""                                                         # edge, two of the normal cell, two of the reduction cell


def test_spaces_have_the_published_lists():
    long = {"max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect", "sep3": "sep_conv_3x3",
            "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5"}
    words = S1_BY_HAND.split()
    for edge, *names in zip(*(words[k::5] for k in range(5))):
        i, j = map(int, edge.split("->"))
        assert SPACES["s1"]["normal"][i, j] == (long[names[0]], long[names[1]])
        assert SPACES["s1"]["reduce"][i, j] == (long[names[2]], long[names[3]])
    assert len(words) == 14 * 5
    assert all(list(edges) == EDGES and len(edges) == 14 for space in SPACES.values() for edges in space.values())
    assert SPACES["s2"]["reduce"][4, 5] == ("skip_connect", "sep_conv_3x3")
    assert SPACES["s3"]["normal"][1, 2] == ("none", "skip_connect", "sep_conv_3x3")
    assert SPACES["s4"]["normal"][0, 2] == ("noise", "sep_conv_3x3")
    assert len(SPACES["darts"]["normal"][0, 2]) == 8


def test_mean_beta_equals_a_loop_over_edges():
    torch.manual_seed(0)
    for space, primitive in (("darts", "none"), ("s1", "skip_connect"), ("s2", "none")):
        betas, values = {kind: torch.rand(14, len(edges[0, 2])) for kind, edges in SPACES[space].items()}, []
        for kind in ("normal", "reduce"):
            for row, edge in enumerate(EDGES):
                for o, name in enumerate(SPACES[space][kind][edge]):
                    values += [betas[kind][row, o].item()] if name == primitive else []
        expected = pytest.approx(np.mean(values)) if values else None
        assert search.mean_beta(SPACES[space], betas, primitive) == expected


# ---------------------------------------------------------------- the two steps

def steps_of(net, images, labels):
    weights = torch.optim.SGD(net.weights, 0.1, momentum=0.9, weight_decay=5e-3)
    alphas = torch.optim.Adam(net.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    return (lambda: search.alpha_step(net, alphas, images, labels, no_autocast),
            lambda clip=5: search.weight_step(net, weights, images, labels, no_autocast, clip))


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def test_each_step_moves_its_own_parameters_only():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    alpha_step, weight_step = steps_of(net, images, labels)
    weights, alphas = copies(net.weights), copies(net.alphas)
    alpha_step()
    assert all(map(torch.equal, weights, net.weights)) and not any(map(torch.equal, alphas, net.alphas))
    assert all(p.grad is None for p in net.weights)                                      # .grad of alpha alone
    alphas = copies(net.alphas)
    weight_step()
    assert all(map(torch.equal, alphas, net.alphas)) and not torch.equal(weights[0], net.weights[0])
    assert net.weights[0].grad.abs().sum() > 0


def test_weight_step_is_the_same_without_the_alpha_backward():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    other = SuperNet(SPACES["darts"], 2, 3)
    alpha_step, weight_step = steps_of(net, images, labels)
    alpha_step()
    other.load_state_dict(net.state_dict())
    weight_step()
    plain = torch.optim.SGD(other.weights, 0.1, momentum=0.9, weight_decay=5e-3)
    F.cross_entropy(other(images), labels).backward()
    total = torch.sqrt(sum((p.grad ** 2).sum() for p in other.weights))
    for p in other.weights:                                                            # clip 5, without the alphas
        p.grad *= min(1, 5 / (total + 1e-6))
    plain.step()
    for a, b in zip(net.weights, other.weights):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("larc", [[], ["--larc"]])
def test_steps_wait_for_nothing(larc):
    """On the meta device reading a value, or meeting a tensor of another device, is an error."""
    with torch.device("meta"):
        net = SuperNet(SPACES["darts"], 2, 3, 10, True, True)
        images, labels = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
        derived = Network(PUBLISHED["VS_DARTS"].genotype, 2, 3, 10)
        totals = torch.zeros(4)
    w_optimizer, alpha_optimizer, _ = search.make_optimizers(net, search.parse(larc))
    args = SimpleNamespace(label_smooth=0.1, auxiliary_weight=0.0, grad_clip=5.0)
    sgd = torch.optim.SGD(derived.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    derived.drop_path_prob = 0.1
    for _ in range(2):
        for loss, logits in (search.alpha_step(net, alpha_optimizer, images, labels, no_autocast),
                             search.weight_step(net, w_optimizer, images, labels, no_autocast, 5.0),
                             retrain.train_step(derived, sgd, images, labels, args, no_autocast)):
            totals += run.metrics(loss, logits, labels)
    with pytest.raises((NotImplementedError, RuntimeError)):
        totals.tolist()                                                                  # so it does notice


# ---------------------------------------------------------------- data

def counted_split(spec, size=8):
    pixels = (torch.arange(size * size) + 1).to(torch.uint8).view(1, size, size, 1).expand(1, size, size, 3)  # 0: padding
    return pixels, spec._replace(mean=(0.0,) * 3, std=(1 / 255,) * 3)                    # normalize() then changes nothing


@pytest.mark.parametrize("size, pad", [(8, 1), (16, 2)])
def test_crop_and_flip_have_torchvisions_distribution(size, pad):
    image, spec = counted_split(data.DATASETS["cifar10"], size)
    places = 2 * (2 * pad + 1) ** 2                                                      # flipped or not
    count = places * 100
    generator = torch.Generator().manual_seed(0)
    ours = data.augment(image.expand(count, -1, -1, -1), torch.rand(count, 5, generator=generator), spec)
    transform = v2.Compose([v2.RandomCrop(size, padding=pad), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.stack([transform(image[0].permute(2, 0, 1)) for _ in range(count)])
    histograms = []
    for batch in (ours, theirs):
        seen = {}
        for key in batch.round().to(torch.uint8).flatten(1).numpy():
            seen[key.tobytes()] = seen.get(key.tobytes(), 0) + 1
        histograms.append(seen)
        assert len(seen) == places
        assert sum((n - 100) ** 2 / 100 for n in seen.values()) < places + 6 * math.sqrt(2 * places)  # chi-square
    assert histograms[0].keys() == histograms[1].keys()


def test_crops_pad_four_pixels_of_32_as_darts():
    image, spec = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8), data.DATASETS["cifar10"]._replace(mean=(0.0,) * 3)
    for size, pad in ((32, 4), (28, 4), (8, 1)):
        corner = data.augment(image[:, :size, :size], torch.tensor([[0.0, 0.999, 0.9, 0, 0]]), spec)[0, 0] == 0
        assert corner[:pad].all() and corner[:, size - pad:].all() and not corner[pad:, :size - pad].any()


def test_cutout_hides_darts_square_and_normalization_is_torchvisions():
    spec = data.DATASETS["cifar10"]
    images = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8)
    uniform = torch.rand(500, 5)
    uniform[:, :2] = 0.5                                                                 # the middle crop
    uniform[:, 2] = 0.9                                                                  # no flip
    got = data.augment(images, uniform, spec, cutout=16)
    plain = v2.Normalize(spec.mean, spec.std)(images.permute(0, 3, 1, 2) / 255)
    for image, expected, (y, x) in zip(got, plain, (uniform[:, 3:] * 32).long().tolist()):
        expected = expected.clone()
        expected[:, max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)


def test_batches_are_a_function_of_seed_and_epoch():
    split = data.load("digits", "unused", train=True)
    def images(seed, epoch):
        return torch.cat([images for images, _ in data.Batches(split, 100, seed).epoch(epoch)])
    assert torch.equal(images(1, 0), images(1, 0))
    assert not torch.equal(images(1, 0), images(1, 1)) and not torch.equal(images(1, 0), images(2, 0))
    assert len(images(1, 0)) == 1437
    order, other = (torch.cat(data.batch_indices(1437, 100, 1, epoch)) for epoch in (0, 1))
    assert not torch.equal(order, other) and sorted(order.tolist()) == list(range(1437))
    batches = data.Batches(split, 100, 1)                                                # one stream over epochs
    across = [images for images, _ in batches.range(14, 16)]
    assert torch.equal(across[1], next(batches.epoch(1))[0])


def test_every_image_and_epoch_has_its_own_augmentation():
    image, spec = counted_split(data.DATASETS["cifar10"], size=16)
    split = data.Split(image.expand(64, -1, -1, -1).contiguous(), torch.zeros(64, dtype=torch.long), 10, spec)
    batches = data.Batches(split, 32, seed=0, cutout=4)
    seen = {image.numpy().tobytes() for epoch in range(4) for images, _ in batches.epoch(epoch) for image in images}
    assert len(seen) > 240                                                               # of 256; 162 x 256 are possible


def test_processes_share_every_batch_as_one_process_would_see_it():
    split = data.load("digits", "unused", train=True)
    split = split.part(0, 101)                                                           # the last batch has 21: one is left out
    one = list(data.Batches(split, 40, 3).epoch(2))
    two = [list(data.Batches(split, 40, 3, rank=rank, world=2).epoch(2)) for rank in (0, 1)]
    for k, (images, labels) in enumerate(one[:2]):
        assert torch.equal(torch.cat([two[0][k][0], two[1][k][0]]), images)
        assert torch.equal(torch.cat([two[0][k][1], two[1][k][1]]), labels)
    shares = [torch.cat(data.batch_indices(101, 40, 3, 2, rank, 2)).tolist() for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 50 and not set(shares[0]) & set(shares[1])
    tested = [torch.cat([labels for _, labels in data.test_batches(split, 7, rank, 3)]) for rank in range(3)]
    assert sorted(torch.cat(tested).tolist()) == sorted(split.labels.tolist())           # every one once
    assert [len(batch) for batch in data.batch_indices(41, 40, 0, 0)] == [40]            # never a single image


def test_images_are_resized_by_area_and_the_first_ones_taken(tmp_path):
    whole = data.load("digits", "unused", train=True)
    small = data.load("digits", "unused", train=True, image_size=4 + 4, limit=10)
    assert torch.equal(small.images, whole.images[:10]) and torch.equal(small.labels, whole.labels[:10])
    make_fashion_mnist(tmp_path)
    full, half = (data.load("fashion_mnist", tmp_path, True, image_size=size) for size in (None, 14))
    means = full.images.float().unflatten(1, (14, 2)).unflatten(3, (14, 2)).mean((2, 4))  # of 2x2 pixels each
    assert torch.equal(half.images, means.round().to(torch.uint8)) and half.images.shape == (40, 14, 14, 3)
    assert len(data.load("fashion_mnist", tmp_path, False, image_size=14, limit=3).labels) == 20  # the test split stays whole
    make_folder(tmp_path / "images")
    assert data.load("folder", tmp_path / "images", True, 16, 5).images.shape == (5, 16, 16, 3)
    w_half, alpha_half = search.read_halves(search.parse(["--dataset", "digits", "--limit", "10"]), "cpu", torch.channels_last)
    assert torch.equal(torch.cat([w_half.images, alpha_half.images]), whole.images[:10]) and len(w_half.labels) == 5


def imagenet_args(root, **changes):
    return SimpleNamespace(**{"data": str(root), "image_size": 16, "limit": None, "batch_size": 8, "workers": 0, **changes})


def test_imagenet_is_limited_and_tested_in_shares(tmp_path):
    make_folder(tmp_path / "images")
    place = (0, torch.device("cpu"), torch.channels_last)
    limited = data.ImageNet(imagenet_args(tmp_path / "images", limit=6), True, *place)
    labels = torch.cat([labels for _, labels in limited.epoch(0)])
    assert len(labels) == 6 and 0 < labels.sum() < 6                                     # not one class only
    tests = [data.ImageNet(imagenet_args(tmp_path / "images"), False, *place, rank=rank, world=2) for rank in (0, 1)]
    assert [len(batch) for test in tests for batch in test.indices(0)] == [4, 2, 4, 2]   # a half of 8 at a time
    assert sorted(i for test in tests for batch in test.indices(0) for i in batch.tolist()) == list(range(12))


def test_only_a_val_folder_is_needed_to_test(tmp_path):
    make_folder(tmp_path / "images")
    shutil.rmtree(tmp_path / "images/train")
    assert len(data.load("folder", tmp_path / "images", train=False).labels) == 12
    test = data.ImageNet(imagenet_args(tmp_path / "images"), False, 0, torch.device("cpu"), torch.channels_last)
    assert sum(len(labels) for _, labels in test.epoch(0)) == 12


def test_an_image_that_cannot_be_read_is_a_reason_to_stop(tmp_path):
    make_folder(tmp_path / "images")
    for part in ("train", "val"):
        (tmp_path / f"images/{part}/dark/0.png").write_bytes(b"no picture")
    place = (0, torch.device("cpu"), torch.channels_last)
    train = data.ImageNet(imagenet_args(tmp_path / "images", batch_size=4), True, *place)
    assert len(list(train.epoch(0))) == train.steps == 3                                 # in step with other processes to the end
    assert "cannot identify image file" in str(run.stop)
    with pytest.raises(run.Exit, match="an image cannot be read .*cannot identify image file"):
        list(data.ImageNet(imagenet_args(tmp_path / "images"), False, *place).epoch(0))


def test_digits_are_whole_and_split_once():
    train, test = (data.load("digits", "unused", train=train) for train in (True, False))
    assert train.images.shape == (1437, 8, 8, 3) and test.images.shape == (360, 8, 8, 3)
    assert train.images.max() == 255 and train.images.dtype == torch.uint8 and train.labels.bincount().min() > 100
    with np.load(HERE / "digits.npz") as file:                                           # the two splits are the whole
        whole = np.concatenate([train.images[..., 0], test.images[..., 0]])
        assert np.array_equal(whole, np.round(file["images"] * (255 / 16))) and whole.shape == (1797, 8, 8)
        assert np.array_equal(np.concatenate([train.labels, test.labels]), file["labels"])
    pixels = train.images / 255
    assert abs(pixels.mean() - train.spec.mean[0]) < 1e-3 and abs(pixels.std() - train.spec.std[0]) < 1e-3


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def make_fashion_mnist(root):
    pixels = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(root / f"FashionMNIST/raw/{part}-images-idx3-ubyte.gz", pixels.integers(0, 256, (count, 28, 28)))
        write_idx(root / f"FashionMNIST/raw/{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)


def test_fashion_mnist_is_read_from_its_archives(tmp_path):
    make_fashion_mnist(tmp_path)
    split = data.load("fashion_mnist", tmp_path, train=True)
    assert split.images.shape == (40, 28, 28, 3) and split.labels[:11].tolist() == [*range(10), 0]
    assert torch.equal(split.images[..., 0], split.images[..., 2])
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    assert np.array_equal(split.images[..., 0].numpy(), expected)


def make_folder(root, size=40, count=6):
    generator = torch.Generator().manual_seed(0)
    for part, (name, shade) in itertools.product(("train", "val"), (("dark", 0.2), ("light", 0.8))):
        (root / part / name).mkdir(parents=True)
        for k in range(count):
            image = shade + 0.1 * torch.rand(3, size, size, generator=generator)
            save_image(image, root / part / name / f"{k}.png")


def test_folder_is_resized_and_not_sorted_by_class(tmp_path):
    make_folder(tmp_path)
    split = data.load("folder", tmp_path, train=True, image_size=16)
    assert split.images.shape == (12, 16, 16, 3) and split.classes == 2
    assert 0 < split.labels[:6].sum() < 6                                                # both halves have both classes
    bright = split.images.float().mean((1, 2, 3)) > 128
    assert torch.equal(bright.long(), split.labels)


# ---------------------------------------------------------------- genotypes

COUNTED = {  # CIFAR-10: parameters, multiply-adds; ImageNet: parameters, multiply-adds
    "NASNet_A": (3830950, 603452448, 5564320, 604031616), "AmoebaNet_B": (2714590, 409609440, 3972352, 438471360),
    "AmoebaNet_A": (3145078, 488931552, 4627360, 526746624), "ENAS": (3859894, 605719584, 5625952, 608152320),
    "DARTS_V1": (3169414, 500987520, 4510432, 505864704), "DARTS_V2": (3349342, 528359040, 4718752, 529911552),
    "SNAS_moderate": (2847358, 440687232, 4312576, 465607872), "SNAS_mild": (2661382, 422218368, 3939328, 438042432),
    "GDAS": (3368782, 519428736, 5345075, 581009000), "P_DARTS": (3433798, 532174464, 4944352, 542819328),
    "PC_DARTS": (3634678, 556670592, 5270560, 571137408), "PC_DARTS_imagenet": (3721510, 570466944, 5342464, 581627328),
    "FairDARTS_B": (3407878, 536487552, 4865248, 541201152), "PR_DARTS": (3444814, 529769088, 4981312, 543374400),
    "DARTS_PT_0": (2851246, 449119872, 4228576, 465805440), "DARTS_PT_1": (3053206, 471680640, 4510816, 490962432),
    "DARTS_PT_2": (2658142, 413149824, 4035712, 438098880), "DARTS_PT_3": (3328174, 517714560, 4779712, 527456064),
    "VS_DARTS": (3716326, 575360640, 5245600, 579416448), "VS_DARTS_2nd": (3382822, 537814656, 4798048, 538642176),
    "VS_DARTS_3rd": (2964862, 462529152, 4358464, 478910784),
    "VS_DARTS_without_LARC": (3193390, 493660800, 4710784, 511895232),
    "ENAS_repository": (4394710, 693197856, 6267424, 683943168),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_have_the_reference_counts(name):
    cell = PUBLISHED[name]
    cifar, imagenet = genotypes.network(cell.genotype), genotypes.network(cell.genotype, True, cell.C_imagenet)
    assert (count_parameters(cifar), count_macs(cifar, 32), count_parameters(imagenet),
            count_macs(imagenet, 224)) == COUNTED[name]


def test_genotypes_survive_json_and_bad_ones_are_refused(tmp_path):
    assert PUBLISHED.keys() == COUNTED.keys()
    text = json.dumps([[name, cell.genotype] for name, cell in PUBLISHED.items()])
    digest = "94b58a61b2f203b864f7320b6970a91c16779831058b7796f370679e7a4936bb"           # compared pair by pair with the sources
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    for cell in PUBLISHED.values():
        assert genotypes.from_json(genotypes.to_json(cell.genotype)) == cell.genotype
    good = json.loads(genotypes.to_json(PUBLISHED["VS_DARTS"].genotype))
    for change in ({"normal": []}, {"reduce_concat": [0, 2]}, {"reduce_concat": [2, 2]}, {"normal": [[["sep_conv_3x3", 2]]]}, {"normal": [[["exit", 0]]]}, {"normal_concat": [9]},
                   {"reduce": [[["sep_conv_3x3", True]]]}, {"reduce": "__import__('os')"}, {"extra": 1},
                   {"normal": [[[["sep_conv_3x3"], 0]]]}):
        with pytest.raises(ValueError):
            genotypes.from_json(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match="not JSON"):
        genotypes.from_json("[" * 200000)
    (tmp_path / "code.json").write_text("Genotype(normal=[('sep_conv_3x3', 1)])")
    with pytest.raises(ValueError, match="is no genotype: it is not JSON"):
        genotypes.load(str(tmp_path / "code.json"))
    assert not any(re.search(r"(?<!\.)\beval\(", path.read_text()) for path in HERE.glob("*.py") if path != Path(__file__))


def test_genotypes_command(capsys, tmp_path):
    assert genotypes.main(["VS_DARTS"]) == 0
    shown = capsys.readouterr().out
    assert "node 2 = sep_conv_3x3(1) + skip_connect(0)" in shown and "3,716,326 parameters" in shown
    assert "python retrain.py --genotype VS_DARTS" in shown
    (tmp_path / "genotype.json").write_text(genotypes.to_json(PUBLISHED["GDAS"].genotype))
    assert genotypes.main([str(tmp_path / "genotype.json")]) == 0
    assert "519,428,736 multiply-adds" in capsys.readouterr().out
    for arguments in (["nothing"], ["VS_DARTS", "GDAS"]):
        assert genotypes.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_random_cells_are_valid_uniform_and_repeatable(capsys, tmp_path):
    assert genotypes.main(["--random", "3"]) == 0
    (tmp_path / "random3.json").write_text(capsys.readouterr().out)
    assert genotypes.load(str(tmp_path / "random3.json")) == genotypes.random_genotype(3) != genotypes.random_genotype(4)
    names, inputs = [], []
    for seed in range(500):
        cell = genotypes.random_genotype(seed)
        for j, node in enumerate(cell.reduce, start=2):
            (first, i), (second, k) = node
            assert i != k and max(i, k) < j
            names += [first, second]
        inputs.append(frozenset(i for _, i in cell.normal[2]))                           # two of 0, 1, 2 and 3: 6 pairs
    assert {name: names.count(name) for name in names}.keys() == set(genotypes.DARTS_PRIMITIVES[1:])
    assert all(abs(names.count(name) - 4000 / 7) < 100 for name in set(names))
    assert len(set(inputs)) == 6 and all(abs(inputs.count(pair) - 500 / 6) < 40 for pair in set(inputs))
    for bad in (["--random"], ["--random", "x"], ["--random", "-1"], ["--random", "1", "2"]):
        assert genotypes.main(bad) == 2
        assert "--random takes one seed" in capsys.readouterr().err


def test_genotypes_are_written_as_darts_does(capsys):
    darts_v2 = ("Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
                "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
                "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
                "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], "
                "reduce_concat=[2, 3, 4, 5])")
    genotypes.main(["DARTS_V2"])
    assert darts_v2 in capsys.readouterr().out.splitlines()
    assert "cannot be written" in genotypes.darts_notation(PUBLISHED["FairDARTS_B"].genotype)  # nodes with one input


def test_genotypes_into_head_ends_quietly():
    process = subprocess.run(f"{sys.executable} genotypes.py | head -1", shell=True, cwd=HERE, env=ENVIRONMENT, text=True,
                             capture_output=True)
    assert process.stderr == "" and process.stdout.count("\n") == 1


def test_genotypes_table(capsys, monkeypatch):
    monkeypatch.setattr(genotypes, "PUBLISHED", {name: PUBLISHED[name] for name in ("VS_DARTS", "VS_DARTS_2nd")})
    assert genotypes.main([]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"VS_DARTS +3,716,326 +3\.38 +2\.43 .* 5,245,600 +5\.3 +579\.4 +589 +thop", shown)
    assert "three\nconventions" in shown and "which is VS_DARTS_2nd" in shown


# ---------------------------------------------------------------- the derived network

def tiny_network(**options):
    torch.manual_seed(0)
    return Network(PUBLISHED["VS_DARTS"].genotype, 4, 3, 10, **options)


def test_auxiliary_heads_have_the_reference_counts():
    with torch.device("meta"):
        for channels, classes, imagenet, expected in ((576, 10, False, 476426), (768, 1000, True, 1260776)):
            assert sum(p.numel() for p in AuxiliaryHead(channels, classes, imagenet).parameters()) == expected
        cifar = Network(PUBLISHED["VS_DARTS"].genotype, auxiliary=True)
        assert count_parameters(cifar) == 3716326 and cifar.auxiliary_layer == 13
        logits, logits_aux = cifar(torch.zeros(2, 3, 32, 32))
        assert logits.shape == logits_aux.shape == (2, 10)
        imagenet = Network(PUBLISHED["VS_DARTS"].genotype, 48, 14, 1000, auxiliary=True, imagenet=True)
        assert imagenet.auxiliary_layer == 9 and imagenet(torch.zeros(2, 3, 224, 224))[1].shape == (2, 1000)
        assert imagenet.eval()(torch.zeros(2, 3, 224, 224))[1] is None                   # training only


def test_auxiliary_head_leaves_the_trunk_alone_and_gets_gradients():
    head, trunk = AuxiliaryHead(8, 10, False), torch.randn(2, 8, 8, 8)
    before = trunk.clone()
    head(trunk)
    assert torch.equal(trunk, before)
    net, images, labels = tiny_network(auxiliary=True), torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = {}
    for weight in (0.0, 0.4):
        args = SimpleNamespace(label_smooth=0.0, auxiliary_weight=weight, grad_clip=5.0)
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        losses[weight] = retrain.train_step(net, optimizer, images, labels, args, no_autocast)[0].item()
    logits, logits_aux = net(images)
    expected = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(logits_aux, labels)
    assert losses[0.4] == pytest.approx(expected.item()) != losses[0.0]
    assert net.auxiliary_head.classifier.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="fits 8x8 feature maps .32x32 images., not 7x7"):
        net(torch.randn(2, 3, 28, 28))


def test_drop_path_is_per_sample_not_in_place_and_unbiased():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    dropped = drop_path(x, 0.2)
    assert torch.equal(x, torch.ones_like(x))
    assert set(dropped.flatten(1).unbind(1)[0].tolist()) == {0.0, 1.25}
    assert torch.equal(dropped, dropped[:, :1, :1, :1].expand_as(dropped))               # a sample whole or not at all
    assert abs(dropped.mean() - 1) < 0.03


def test_drop_path_takes_all_inputs_but_identities():
    torch.manual_seed(0)
    nodes, probability = (((("skip_connect", 0), ("avg_pool_3x3", 1)),) + ((("skip_connect", 2), ("skip_connect", 2)),)), 0.5
    cell = Cell(nodes, (2, 3), 2, 2, 2, False, False)
    cell.preprocess0 = cell.preprocess1 = torch.nn.Identity()
    s0, s1 = torch.rand(64, 2, 4, 4) + 1, torch.rand(64, 2, 4, 4) + 1
    before, plain = s0.clone(), cell.eval()(s0, s1, probability)
    out = cell.train()(s0, s1, probability)
    pooled = plain[:, :2] - s0
    assert torch.equal(s0, before)
    torch.testing.assert_close(plain[:, :2], cell(s0, s1, 0.0)[:, :2])                   # neither in eval mode nor at 0
    rest = out[:, :2] - s0                                                               # the identity is always whole
    kept = rest.flatten(1).abs().sum(1) > 1e-3
    assert 15 < kept.sum() < 49
    torch.testing.assert_close(rest[kept], pooled[kept] / 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, 2:], 2 * out[:, :2])
    strided = Cell(((("skip_connect", 0),),), (2,), 2, 2, 2, True, False)                # a strided skip is no identity
    values = strided(s0, s1, probability).flatten(1).abs().sum(1)
    assert 15 < (values == 0).sum() < 49


def test_any_genotype_trains(float64):
    cells = [PUBLISHED[name].genotype for name in ("NASNet_A", "AmoebaNet_A", "AmoebaNet_B", "FairDARTS_B")]
    cells.append(Genotype(((("noise", 0), ("sep_conv_3x3", 1)),), (2,), ((("noise", 0), ("sep_conv_5x5", 1)),), (2,)))
    for genotype in cells:
        for size, imagenet in ((9, False), (64, True)):
            net = Network(genotype, 4, 3, 5, imagenet=imagenet)
            F.cross_entropy(net(torch.randn(2, 3, size, size))[0], torch.tensor([0, 4])).backward()
            assert net.stem0[0].weight.grad.abs().sum() > 0


def test_derived_cell_equals_its_formula(float64):
    torch.manual_seed(0)
    cell = Cell(PUBLISHED["DARTS_V2"].genotype.normal, (2, 3, 4, 5), 3, 4, 4, False, False)
    s0, s1 = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    x0, x1 = cell.preprocess0(s0), cell.preprocess1(s1)
    o = cell.ops
    x2 = o[0][0](x0) + o[0][1](x1)
    x3 = o[1][0](x0) + o[1][1](x1)
    x4 = o[2][0](x1) + x0
    x5 = x0 + o[3][1](x2)
    torch.testing.assert_close(cell(s0, s1, 0.0), torch.cat([x2, x3, x4, x5], 1))
    assert all(isinstance(o[j][k], ReLUFirst) for j, k in ((0, 0), (0, 1), (3, 1))) and o[2][0].body[2].affine


def affine_norm(p, prefix, x):
    return slow_norm(x) * p[f"{prefix}.weight"][:, None, None] + p[f"{prefix}.bias"][:, None, None]


def slow_affine_reduce(p, prefix, x):
    x = F.relu(x)
    halves = [F.conv2d(x, p[f"{prefix}.body.0.conv1.weight"], stride=2),
              F.conv2d(x[:, :, 1:, 1:], p[f"{prefix}.body.0.conv2.weight"], stride=2)]
    return affine_norm(p, f"{prefix}.body.1", torch.cat(halves, 1))


def slow_affine_op(name, p, prefix, x, stride):
    C, kernel = x.shape[1], int(name[-1]) if name[-1].isdigit() else None
    if name == "skip_connect":
        return x if stride == 1 else slow_affine_reduce(p, prefix, x)
    if "pool" in name:                                                                   # no batch norm here
        return slow_pool(name, x, stride)
    if "dil" in name:
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.0.weight"], stride=stride, padding=kernel - 1, dilation=2, groups=C)
        return affine_norm(p, f"{prefix}.body.2", F.conv2d(x, p[f"{prefix}.body.1.weight"]))
    for first, step in ((0, stride), (4, 1)):
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.{first}.weight"], stride=step, padding=kernel // 2, groups=C)
        x = affine_norm(p, f"{prefix}.body.{first + 2}", F.conv2d(x, p[f"{prefix}.body.{first + 1}.weight"]))
    return x


def slow_network(p, genotype, layers, imagenet, x):
    """NetworkCIFAR or NetworkImageNet from its parameters, with the auxiliary logits."""
    if imagenet:
        x = F.relu(affine_norm(p, "stem0.1", F.conv2d(x, p["stem0.0.weight"], stride=2, padding=1)))
        s0 = affine_norm(p, "stem0.4", F.conv2d(x, p["stem0.3.weight"], stride=2, padding=1))
        s1 = affine_norm(p, "stem1.2", F.conv2d(F.relu(s0), p["stem1.1.weight"], stride=2, padding=1))
    else:
        s0 = s1 = affine_norm(p, "stem0.1", F.conv2d(x, p["stem0.0.weight"], padding=1))
    reduced_before = imagenet
    for layer in range(layers):
        reduction, cell = layer in (layers // 3, 2 * layers // 3), f"cells.{layer}"

        def preprocess(name, s):
            return affine_norm(p, f"{name}.body.1", F.conv2d(F.relu(s), p[f"{name}.body.0.weight"]))
        first = slow_affine_reduce if reduced_before else lambda p, name, s: preprocess(name, s)
        states = [first(p, f"{cell}.preprocess0", s0), preprocess(f"{cell}.preprocess1", s1)]
        for j, node in enumerate(genotype.reduce if reduction else genotype.normal):
            total = 0
            for k, (name, i) in enumerate(node):
                total = total + slow_affine_op(name, p, f"{cell}.ops.{j}.{k}", states[i], 2 if reduction and i < 2 else 1)
            states.append(total)
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        s0, s1, reduced_before = s1, torch.cat([states[i] for i in concat], 1), reduction
        if layer == 2 * layers // 3:
            a, head = F.relu(s1), "auxiliary_head.features"
            a = F.avg_pool2d(a, 5, 2 if imagenet else 3)
            a = F.relu(affine_norm(p, f"{head}.3", F.conv2d(a, p[f"{head}.2.weight"])))
            a = F.conv2d(a, p[f"{head}.5.weight"])
            a = F.relu(a if imagenet else affine_norm(p, f"{head}.6", a)).flatten(1)
            logits_aux = a @ p["auxiliary_head.classifier.weight"].T + p["auxiliary_head.classifier.bias"]
    return s1.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"], logits_aux


@pytest.mark.parametrize("imagenet, size", [(False, 32), (True, 224)])
def test_derived_network_equals_slow_darts(float64, imagenet, size):
    torch.manual_seed(0)
    genotype = PUBLISHED["VS_DARTS_2nd"].genotype                                        # skips, pools, both convolutions, strided
    net = Network(genotype, 4, 4, 5, auxiliary=True, imagenet=imagenet)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):                                     # fresh ones are 1 and 0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 3])
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    got, expected = net(images), slow_network(leaves, genotype, 4, imagenet, images)
    for logits in (got, expected):
        (F.cross_entropy(logits[0], labels) + 0.4 * F.cross_entropy(logits[1], labels)).backward()
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-7, atol=1e-8, msg=name)


# ---------------------------------------------------------------- schedules and metrics

def rates(*flags):
    args = retrain.parse(["--genotype", "VS_DARTS", *flags])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.learning_rate)
    scheduler, seen = retrain.make_scheduler(args, optimizer), []
    for _ in range(args.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules_equal_their_formulas():
    np.testing.assert_allclose(rates(), [0.025 * (1 + math.cos(math.pi * e / 600)) / 2 for e in range(600)], atol=1e-9)
    np.testing.assert_allclose(rates("--dataset", "imagenet"), [0.1 * 0.97 ** e for e in range(250)], rtol=1e-9)


def test_pc_darts_schedule_has_its_literal_rates():
    pc_darts = rates("--dataset", "imagenet", "--lr_scheduler", "linear")
    for epoch, rate in {0: 0.1, 1: 0.2, 4: 0.5, 5: 0.4897959184, 122: 0.2510204082, 244: 0.0020408163, 245: 0.0020408163,
                        246: 0.0016326531, 249: 0.0004081633}.items():
        assert pc_darts[epoch] == pytest.approx(rate, abs=1e-9), epoch
    small = rates("--dataset", "imagenet", "--lr_scheduler", "linear", "--batch_size", "256")  # no warmup up to 256
    assert small[:2] == pytest.approx([0.5, 0.4979591837]) and small[249] == pytest.approx(0.0004081633)


def test_protocols():
    def some(*flags):
        args = retrain.parse(["--genotype", "VS_DARTS", *flags])
        return (args.epochs, args.batch_size, args.layers, args.init_channels, args.learning_rate, args.weight_decay,
                args.label_smooth, args.drop_path_prob, args.cutout_length, args.auxiliary_weight)
    assert some() == (600, 96, 20, 36, 0.025, 3e-4, 0.0, 0.2, 16, 0.4)
    assert some("--dataset", "svhn") == some("--dataset", "cifar100") == (600, 96, 8, 16, 0.025, 3e-4, 0.0, 0.2, 16, 0.4)
    assert some("--dataset", "imagenet") == (250, 128, 14, 48, 0.1, 3e-5, 0.1, 0.0, 0, 0.4)
    linear = ["--dataset", "imagenet", "--lr_scheduler", "linear"]
    assert some(*linear) == (250, 1024, 14, 48, 0.5, 3e-5, 0.1, 0.0, 0, 0.4)
    assert some(*linear, "--batch_size", "32")[1] == 32                                  # explicit flags win
    assert some("--image_size", "16")[-2:] == (8, 0.0) and some("--image_size", "16", "--cutout_length", "3")[-2] == 3
    assert some("--dataset", "folder", "--image_size", "40")[-2:] == (20, 0.0)
    args = search.parse([])
    assert (args.epochs, args.batch_size, args.layers, args.init_channels, args.stem_multiplier, args.learning_rate,
            args.learning_rate_min, args.momentum, args.weight_decay, args.grad_clip, args.arch_learning_rate,
            args.arch_weight_decay, args.train_portion, args.seed) == (
        50, 64, 8, 16, 3, 0.025, 0.001, 0.9, 5e-3, 5.0, 3e-4, 1e-3, 0.5, 2)


def test_optimizers_have_darts_constants():
    net = SuperNet(SPACES["s2"], 1, 3)
    w_optimizer, alpha_optimizer, _ = search.make_optimizers(net, search.parse([]))
    alphas, weights = alpha_optimizer.param_groups[0], w_optimizer.param_groups[0]
    assert isinstance(alpha_optimizer, torch.optim.Adam) and isinstance(w_optimizer, torch.optim.SGD)
    assert (alphas["lr"], alphas["betas"], alphas["weight_decay"], alphas["eps"]) == (3e-4, (0.5, 0.999), 1e-3, 1e-8)
    assert (weights["lr"], weights["momentum"], weights["weight_decay"], weights["nesterov"]) == (0.025, 0.9, 5e-3, False)
    assert {id(p) for p in alphas["params"]} == {id(p) for p in net.alphas}
    assert {id(p) for p in weights["params"]} == {id(p) for p in net.weights}
    larc = search.make_optimizers(net, search.parse(["--larc"]))[0].param_groups[0]
    assert (larc["lr"], larc["momentum"], larc["weight_decay"], larc["trust_coefficient"], larc["clip"]) == (
        0.025, 0.9, 5e-3, 1.0, False)


def test_metrics_count_top_1_and_top_5_up_to_the_number_of_classes():
    logits, loss = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor(0.5)
    assert run.metrics(loss, logits, torch.tensor([0, 0, 1])).tolist() == [1.5, 1, 3, 3]
    logits, labels = torch.randn(50, 20), torch.randint(20, (50,))
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels)]
    totals = run.metrics(loss, logits, labels) + run.metrics(2 * loss, logits, labels)
    assert totals.tolist() == [75, 2 * sum(r < 1 for r in ranks), 2 * sum(r < 5 for r in ranks), 100]
    assert run.means(totals)[0] == 0.75 and totals.dtype == torch.float32                # float64 is not to be had everywhere
    assert (totals + run.metrics(loss / 0, logits, labels))[0] == math.inf               # stays so in the sum


def test_seeds_differ_for_different_purposes():
    numbers = [(0,), (0, 0), (0, 5), (0, 5, 0), (5,), (5, 0), ("0", 5), (0, "order", 5), (0, "noise", 5)]
    assert len({run.make_seed(*parts) for parts in numbers}) == len(numbers)
    assert run.make_seed(2, "order", 3) == run.make_seed(2, "order", 3) < 2**64


def test_all_seeds_of_a_run_differ(tmp_path, monkeypatch):
    seeds, make_seed = {}, run.make_seed

    def remember(*parts):
        seeds.setdefault(make_seed(*parts), set()).add(parts)
        return make_seed(*parts)
    for module in (data, search, retrain):
        monkeypatch.setattr(module, "make_seed", remember)
    search.main([*SMALL, "--space", "s2", "--epochs", "3", "--batch_size", "64", "--out", str(tmp_path / "search")])
    searched = len(seeds)
    assert searched == 3 + 3 + 3 * (3 + 12 * 3)                                          # streams; noise; order and 12 steps of 3
    retrain.main([*RETRAINED, "--out", str(tmp_path / "retrain")])
    assert len(seeds) == searched + 1 + 4 + 4 * (1 + 15)                                 # data; drop-path; order and 15 steps
    assert all(len(parts) == 1 for parts in seeds.values()), seeds


# ---------------------------------------------------------------- files

def test_files_are_never_half_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run.save(path, lambda file: torch.save({"epoch": 1, "w": torch.ones(2)}, file))
    with pytest.raises((AttributeError, pickle.PicklingError)):                          # a poisoned value
        run.save(path, lambda file: torch.save({"epoch": 2, "w": torch.ones(2), "poison": lambda: 0}, file))
    with pytest.raises(ZeroDivisionError):
        run.save(path, lambda file: (file.write(b"half"), 1 / 0))
    assert run.load_checkpoint(path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]

    def disk_full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(run.Exit, match="cannot write .*No space left on device.: make room"):
        run.save(path, disk_full)
    assert run.load_checkpoint(path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_pickle_that_is_no_checkpoint_ends_in_one_line(tmp_path, recwarn):
    for content in (pickle.dumps({"a": 1}), pickle.dumps(Path("x")), b"", b"PK"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(run.Exit, match="is no checkpoint that can be read") as error:
            run.load_checkpoint(tmp_path / "checkpoint.pt")
        assert "\n" not in str(error.value)
    assert not recwarn.list


# ---------------------------------------------------------------- search.py as a command

def lines_of(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "images/s")} for record in records]


def tensors_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return a == b


def program(*arguments, wait=True, launcher=(sys.executable,), **options):
    process = subprocess.Popen([*launcher, *map(str, arguments)], cwd=HERE, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True, **options)
    return (*process.communicate(timeout=300), process.returncode) if wait else process


def kill_after_an_epoch(process, folder, number):
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    return (*process.communicate(timeout=120), process.returncode)


def assert_same_runs(a, b):
    assert lines_of(a) == lines_of(b)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert tensors_equal(first, second)


def test_search_on_digits_writes_a_whole_run(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(search, "load", lambda *args, **options: opened.append(args[2]) or data.load(*args, **options))
    out = tmp_path / "run"
    assert search.main([*SMALL, "--node_norm", "--larc", "--sqrt_beta", "--epochs", "3", "--out", str(out)]) is None
    assert opened == [True]                                                              # never the test split
    shown = capsys.readouterr().out
    assert shown.count("epoch ") == 3 and "\r" not in shown                              # not a terminal: epoch lines only
    assert shown.splitlines()[-1] == f"python retrain.py --genotype {out}/genotype.json --dataset digits"
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "genotype.json", "log.jsonl"]
    assert torch.serialization.get_unsafe_globals_in_checkpoint(out / "checkpoint.pt") == []
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    net = SuperNet(SPACES["darts"], 2, 3)
    net.load_state_dict(saved["net"], strict=False)
    written = genotypes.load(str(out / "genotype.json"))
    assert written == brute_derive(SPACES["darts"], net.betas())                         # of the alphas saved last
    for e, record in enumerate(lines_of(out)):
        assert record["lr"] == pytest.approx(0.001 + 0.024 * (1 + math.cos(math.pi * e / 3)) / 2, abs=1e-12)
        assert np.shape(record["alpha_normal"]) == np.shape(record["alpha_reduce"]) == (14, 8)
        assert 0 < record["beta_none"] < 1
    assert all(json.loads(line)["images/s"] > 0 for line in (out / "log.jsonl").read_text().splitlines())
    assert record["alpha_normal"] == net.alpha_normal.tolist()
    with pytest.raises(run.Exit, match="holds a finished run"):
        search.main([*SMALL, "--out", str(out)])
    assert genotypes.load(str(out / "genotype.json")) == written


def test_alpha_sees_one_stream_of_validation_batches(tmp_path, monkeypatch):
    seen, step = [], search.alpha_step
    monkeypatch.setattr(search, "alpha_step", lambda *args: seen.append(args[3]) or step(*args))
    search.main([*SMALL, "--space", "s2", "--epochs", "2", "--train_portion", "0.4", "--out", str(tmp_path / "run")])
    split = data.load("digits", "unused", train=True)
    rest = data.Batches(split.part(int(0.4 * 1437), None), 256, run.make_seed(2, "alpha"))  # 4 batches an epoch; 3 steps
    assert rest.steps == 4 and len(seen) == 6
    assert all(torch.equal(labels, expected) for labels, (_, expected) in zip(seen, rest.range(0, 6)))


def test_default_rates_end_where_darts_ends():
    optimizer, _, scheduler = search.make_optimizers(SuperNet(SPACES["s2"], 1, 3), search.parse(["--larc"]))
    assert optimizer.param_groups[0]["lr"] == 0.025 and isinstance(optimizer, LARC)
    for _ in range(49):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.023679e-3, abs=1e-9)


@pytest.mark.parametrize("space, switches", [("s1", ["--node_norm"]), ("s2", []), ("s3", ["--larc", "--larc_clip", "--larc_trust",
                                             "0.02"]), ("s4", ["--node_norm", "--sqrt_beta"])])
def test_search_runs_in_every_space(tmp_path, space, switches):
    search.main([*SMALL, "--space", space, *switches, "--epochs", "1", "--out", str(tmp_path / "run")])
    genotype = genotypes.load(str(tmp_path / "run" / "genotype.json"))
    for kind in ("normal", "reduce"):
        for j, node in enumerate(getattr(genotype, kind), start=2):
            assert all(name in SPACES[space][kind][i, j] for name, i in node)


def test_search_warns_of_sqrt_beta_alone(tmp_path, capsys):
    search.main([*SMALL, "--space", "s2", "--sqrt_beta", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "about 2, 6, 15 and 32" in capsys.readouterr().err


SEARCHED = [*SMALL, "--space", "s4", "--node_norm", "--larc", "--sqrt_beta", "--epochs", "4", "--batch_size", "64",
            "--train_portion", "0.4", "--keep_nets"]        # S4's noise needs its generator; unequal halves a cycled stream


@pytest.fixture(scope="module")
def whole_search(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert program("search.py", *SEARCHED, "--out", out)[2] == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_search_goes_on_to_the_same_end(tmp_path, whole_search, number):
    out = tmp_path / "run"
    _, errors, status = kill_after_an_epoch(program("search.py", *SEARCHED, "--out", out, wait=False), out, number)
    assert not (out / "genotype.json").exists()
    if number != signal.SIGKILL:
        assert status == 128 + number and "Traceback" not in errors
        done = len(lines_of(out))                                                        # what was saved, a signal in a write or not
        assert done == torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
        assert errors.splitlines()[1:] == ["stopping after this step; a second signal stops at once",
                                           f"search.py: interrupted ({signal.Signals(number).name}) after {done} finished "
                                           f"epoch(s); resume with `python search.py --resume {out}`"]
    (out / "log.jsonl").open("a").write('{"epoch": 99, "half a li')                      # a line of an unfinished epoch
    with pytest.raises(run.Exit, match="holds an unfinished run: resume with `python search.py --resume"):
        search.main([*SEARCHED, "--out", str(out)])
    assert program("search.py", "--resume", out)[2] == 0
    assert_same_runs(out, whole_search)
    assert (out / "genotype.json").read_bytes() == (whole_search / "genotype.json").read_bytes()
    assert all(tensors_equal(*(torch.load(folder / f"net-{epoch}.pt", weights_only=True) for folder in (out, whole_search)))
               for epoch in range(5))


def test_kept_nets_are_those_of_every_epoch_and_change_nothing(tmp_path, capsys):
    flags = [*SMALL, "--space", "s3", "--node_norm", "--epochs", "2"]
    search.main([*flags, "--out", str(tmp_path / "without")])
    search.main([*flags, "--out", str(tmp_path / "with"), "--keep_nets"])
    assert_same_runs(tmp_path / "with", tmp_path / "without")
    assert not list((tmp_path / "without").glob("net-*"))
    nets = [torch.load(tmp_path / "with" / f"net-{epoch}.pt", weights_only=True) for epoch in range(3)]
    torch.manual_seed(2)
    assert tensors_equal(nets[0], dict(SuperNet(SPACES["s3"], 2, 3, node_norm=True).state_dict()))
    assert nets[1]["alpha_normal"].tolist() == lines_of(tmp_path / "with")[0]["alpha_normal"]
    assert tensors_equal(nets[2], torch.load(tmp_path / "with" / "checkpoint.pt", weights_only=True)["net"])
    size = sum(path.stat().st_size for path in (tmp_path / "with").glob("net-*.pt"))
    said = re.search(r"--keep_nets: 3 super-networks will take ([\d.]+) MB", capsys.readouterr().out)[1]
    assert float(said) == pytest.approx(size / 1e6, rel=0.1)


def test_a_diverged_search_ends_early_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    out, calls = tmp_path / "run", itertools.count()
    step = search.weight_step

    def poisoned(*args):
        loss, logits = step(*args)
        return (loss * float("nan") if next(calls) == 4 else loss), logits               # 3 steps an epoch
    monkeypatch.setattr(search, "weight_step", poisoned)
    with pytest.raises(run.Exit, match="not finite by step 2 of epoch 1.*in a new run with another --out") as error:
        search.main([*SMALL, "--space", "s2", "--epochs", "3", "--out", str(out)])
    assert error.value.status == 1 and run.load_checkpoint(out / "checkpoint.pt")["epoch"] == 1


def test_a_search_that_diverges_in_its_last_step_saves_nothing(tmp_path, monkeypatch):
    out, step = tmp_path / "run", search.weight_step

    def poisoned(net, *args):
        result = step(net, *args)                                                        # whose loss is still finite
        net.classifier.weight.data[0, 0] = float("inf")
        return result
    monkeypatch.setattr(search, "weight_step", poisoned)
    with pytest.raises(run.Exit, match="not finite") as error:
        search.main([*SMALL[:-1], "1000", "--space", "s2", "--epochs", "1", "--out", str(out)])  # one step
    assert error.value.status == 1 and os.listdir(out) == ["config.json"]


def test_a_signal_in_a_write_is_noted_and_counts_the_epoch(tmp_path, monkeypatch):
    out, save, before = tmp_path / "run", torch.save, signal.getsignal(signal.SIGTERM)

    def interrupted(state, file):
        if state["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(run.Exit, match="interrupted .SIGTERM. after 2 finished epoch.s.; resume with") as error:
        search.main([*SMALL, "--space", "s2", "--epochs", "4", "--out", str(out)])
    assert error.value.status == 143 and run.load_checkpoint(out / "checkpoint.pt")["epoch"] == 2 == len(lines_of(out))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL                            # a second one kills at once


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name, content in (("config.json", '{"mine": 1}'), ("log.jsonl", "mine"), ("notes", "mine"),
                          ("config.json", '{"program": "retrain.py"}')):
        out = tmp_path / str(len(os.listdir(tmp_path)))
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(run.Exit, match="holds something else"):
            search.main([*SMALL, "--out", str(out)])
        assert (out / name).read_text() == content and os.listdir(out) == [name]


def test_a_start_that_failed_may_be_corrected(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    for flags in (["--dataset", "cifar10"], [*SMALL, "--device", "warp"]):
        with pytest.raises(run.Exit, match="--data|--device"):
            search.main([*flags, "--out", "run"])
        assert not Path("run").exists()                                                  # nothing is written before the data are read
    step = search.weight_step
    monkeypatch.setattr(search, "weight_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):                                               # no epoch finished: not a run
        search.main([*SMALL, "--space", "s2", "--epochs", "1", "--out", "run"])
    assert os.listdir("run") == ["config.json"]
    with pytest.raises(run.Exit, match="has no finished epoch to resume from: start the run again, without --resume"):
        search.main(["--resume", "run"])
    monkeypatch.setattr(search, "weight_step", step)
    search.main([*SMALL, "--space", "s3", "--epochs", "1", "--out", "run"])
    assert json.loads(Path("run/config.json").read_text())["space"] == "s3" and Path("run/genotype.json").exists()


BAD = [  # arguments of search.py, and what its one line says
    (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    (["--epochs", "0"], "--epochs: it must be a whole number from 1, not '0'"),
    (["--train_portion", "1.5"], "above 0 to 1"),
    (["--learning_rate", "nan"], "must be a number"),
    (["--layers", "2"], "from 3"),
    (["--init_channels", "-4"], "from 1"),
    (["--batch_size", "1"], "from 2"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--larc_trust", "0"], "above 0"),
    (["--dataset", "digits", "--train_portion", "0.0001"], "leaves one part with fewer"),
    (["--dataset", "digits", "--learning_rate", "0.0001"], "--learning_rate_min 0.001 is above"),
    (["--dataset", "digits", "--device", "cuda"], "--device cuda cannot be used here"),
    (["--dataset", "digits", "--device", "warp"], "--device warp cannot be used here"),
    (["--dataset", "digits", "--out", "/proc/nowhere/run"], "cannot write /proc/nowhere/run/config.json"),
    (["--dataset", "folder", "--data", "nowhere"], "it needs train/CLASS/IMAGE"),
    (["--resume", ""], "config.json cannot be read"),
    (["--dataset", "digits", "--device", "meta"], "--device meta cannot be used here"),
    (["--seed", "99999999999999999999999"], "from 0"),
    (["--init_channels", "999999999"], "from 1 to 4096"),
    (["--resume", "nowhere"], "nowhere/config.json cannot be read"),
]


@pytest.mark.parametrize("arguments, said", BAD)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(run.Exit, match=said) as error:
        search.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize("script", ["search.py", "retrain.py", "genotypes.py"])
def test_a_mistake_ends_in_one_line_and_status_2(script):
    out, errors, status = program(script, "--nonsense", "x")
    assert status == 2 and "Traceback" not in errors
    assert errors.startswith(f"{script}: ") and errors.count("\n") == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_missing_data_is_named(tmp_path, offline, name):
    with pytest.raises(run.Exit, match="put .* there.*--dataset digits needs no files|pip install scipy") as error:
        data.load(name, tmp_path, train=True)
    assert "\n" not in str(error.value)


def test_damaged_data_is_named(tmp_path, offline):
    make_fashion_mnist(tmp_path)
    archive = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(run.Exit, match="fashion_mnist cannot be read"):
        data.load("fashion_mnist", tmp_path, train=True)
    assert not archive.with_suffix("").exists()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    with pytest.raises(run.Exit, match="cifar10 cannot be read"):
        data.load("cifar10", tmp_path, train=True)
    make_folder(tmp_path / "tree")
    (tmp_path / "tree/train/dark/0.png").write_bytes(b"no picture")
    with pytest.raises(run.Exit, match="an image cannot be read"):
        data.load("folder", tmp_path / "tree", train=True)
    (tmp_path / "tree/val/other").mkdir()
    (tmp_path / "tree/val/dark/0.png").rename(tmp_path / "tree/val/other/0.png")
    with pytest.raises(run.Exit, match="different classes"):
        data.load("folder", tmp_path / "tree", train=False)


def test_resuming_refuses_other_settings_and_other_files(tmp_path):
    out = tmp_path / "run"
    search.main([*SMALL, "--space", "s2", "--epochs", "1", "--out", str(out)])
    with pytest.raises(run.Exit, match="holds a finished run"):
        search.main(["--resume", str(out)])
    (out / "genotype.json").unlink()
    with pytest.raises(run.Exit, match="--layers 5 differs from 3"):
        search.main(["--resume", str(out), "--layers", "5"])
    with pytest.raises(run.Exit, match="is not a run of retrain.py"):
        retrain.main(["--resume", str(out)])
    search.main(["--resume", str(out), "--device", "cpu"])                               # as after a kill at the very end
    assert (out / "genotype.json").exists()
    (out / "genotype.json").unlink()
    for content in (b"no checkpoint", b""):
        (out / "checkpoint.pt").write_bytes(content)
        with pytest.raises(run.Exit, match="is no checkpoint that can be read"):
            search.main(["--resume", str(out)])
    torch.save({"epoch": 1}, out / "checkpoint.pt")
    with pytest.raises(run.Exit, match="does not fit this run .KeyError: 'net'"):
        search.main(["--resume", str(out)])
    torch.save({key: {"x": torch.ones(1)} if key != "epoch" else 1 for key in
                ("epoch", "net", "w_optimizer", "alpha_optimizer", "scheduler")}, out / "checkpoint.pt")
    with pytest.raises(run.Exit, match="does not fit this run .RuntimeError"):
        search.main(["--resume", str(out)])
    config = (out / "config.json").read_text()
    for good, bad, said in (('"epochs": 1', '"epochs": "x"', "--epochs: it must be a whole number"),
                            ('"batch_size": 256', '"batch_size": -5', "--batch_size: it must be"),
                            ('"space": "s2"', '"space": "nope"', "invalid choice: 'nope'")):
        (out / "config.json").write_text(config.replace(good, bad))
        with pytest.raises(run.Exit, match=f"config.json: .*{said}"):
            search.main(["--resume", str(out)])


# ---------------------------------------------------------------- retrain.py as a command

RETRAINED = ["--genotype", "VS_DARTS", "--dataset", "digits", "--device", "cpu", "--layers", "3", "--init_channels", "2",
             "--epochs", "4", "--batch_size", "96"]


@pytest.fixture(scope="module")
def whole_retraining(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert program("retrain.py", *RETRAINED, "--out", out)[2] == 0
    return out


def test_retraining_reports_the_last_epoch(whole_retraining):
    result, records = json.loads((whole_retraining / "result.json").read_text()), lines_of(whole_retraining)
    errors = [record["test_error"] for record in records]
    assert len(records) == 4 and result["test_error"] == errors[-1] and result["epoch"] == 3
    assert result["best on test (optimistic)"] == min(errors) and errors[result["best_epoch"]] == min(errors)
    assert records[1]["lr"] == pytest.approx(0.025 * (1 + math.cos(math.pi / 4)) / 2)
    assert result["seed"] == 0 and result["torch"] == torch.__version__ and result["device"].endswith("cpu")
    assert json.loads((whole_retraining / "config.json").read_text())["cutout_length"] == 2  # every flag, spelt out
    weights = torch.load(whole_retraining / "weights.pt", weights_only=True)
    net = Network(genotypes.load(str(whole_retraining / "genotype.json")), 2, 3, 10)
    net.load_state_dict(weights)
    assert result["parameters"] == count_parameters(net) and result["macs"] == count_macs(net, 8)
    split, wrong = data.load("digits", "unused", train=False), 0
    for image, label in zip(split.images, split.labels):                                 # one at a time
        pixels = (image.permute(2, 0, 1) / 255 - split.spec.mean[0]) / split.spec.std[0]
        wrong += int(net.eval()(pixels[None])[0].argmax() != label)
    assert result["test_error"] == pytest.approx(100 * wrong / 360)


def test_the_best_epoch_is_not_the_result_and_drop_path_grows(tmp_path, monkeypatch):
    probabilities, scores, step = [], iter([(50, 90), (80, 95), (70, 96), (75, 94)]), retrain.train_step
    monkeypatch.setattr(retrain, "evaluate", lambda *args: torch.tensor([0, *next(scores), 100]))
    monkeypatch.setattr(retrain, "train_step", lambda net, *args: probabilities.append(net.drop_path_prob) or step(net, *args))
    retrain.main([*RETRAINED[:-1], "2000", "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["test_error"], result["test_error_top5"], result["epoch"]) == (25.0, 6.0, 3)
    assert (result["best on test (optimistic)"], result["best_epoch"]) == (20.0, 1)
    assert [record["best on test (optimistic)"] for record in lines_of(tmp_path / "run")] == [50, 20, 20, 20]
    assert probabilities == [0.2 * epoch / 4 for epoch in range(4)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_retraining_goes_on_to_the_same_end(tmp_path, whole_retraining, number):
    out = tmp_path / "run"
    _, errors, _ = kill_after_an_epoch(program("retrain.py", *RETRAINED, "--out", out, wait=False), out, number)
    assert number == signal.SIGKILL or errors.strip().endswith(f"resume with `python retrain.py --resume {out}`")
    assert not (out / "result.json").exists()
    assert program("retrain.py", "--resume", out)[2] == 0
    assert_same_runs(out, whole_retraining)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, whole_retraining)]
    assert results[0] == results[1]
    assert tensors_equal(*(torch.load(folder / "weights.pt", weights_only=True) for folder in (out, whole_retraining)))


def test_evaluate_a_checkpoint(whole_retraining, capsys):
    error = json.loads((whole_retraining / "result.json").read_text())["test_error"]
    for name in ("weights.pt", "checkpoint.pt"):
        retrain.main(["--evaluate", str(whole_retraining / name)])
        assert f"test error {error:.2f}% (top-5 " in capsys.readouterr().out
    with pytest.raises(run.Exit, match="is no checkpoint that can be read"):
        retrain.main(["--evaluate", str(whole_retraining / "config.json")])
    for value in ([1], torch.ones(2), {1: 2}, {"net": 3}, {"classifier.bias": 3}, {"classifier.bias": torch.tensor(1.0)}):
        torch.save(value, whole_retraining / "other.pt")
        with pytest.raises(run.Exit, match="is no checkpoint of this program|holds no network of this run"):
            retrain.main(["--evaluate", str(whole_retraining / "other.pt")])
    (whole_retraining / "other.pt").unlink()


def test_testing_looks_between_steps():
    split, looked = data.load("digits", "unused", train=False), []
    retrain.evaluate(tiny_network(), lambda: data.test_batches(split, 100), torch.device("cpu"), no_autocast, lambda: looked.append(1))
    assert len(looked) == 4


def test_evaluation_builds_no_graph():
    net, seen = tiny_network(), []
    net.classifier.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    split = data.load("digits", "unused", train=False)
    retrain.evaluate(net, lambda: data.test_batches(split, 100), torch.device("cpu"), no_autocast)
    supernet = SuperNet(SPACES["s2"], 2, 3)
    supernet.classifier.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    search.evaluate(supernet, data.Batches(split, 100, 0), 0, no_autocast, SimpleNamespace(look=lambda: None))
    assert len(seen) == 8 and not any(seen) and not net.training


def test_the_search_prints_a_command_that_fits_its_images(tmp_path):
    make_folder(tmp_path / "images")
    printed = program("search.py", "--dataset", "folder", "--data", tmp_path / "images", "--image_size", "40", *SMALL[4:],
                      "--space", "s2", "--epochs", "1", "--out", tmp_path / "run")[0].splitlines()[-1]
    out, errors, status = program(*printed.split()[1:], "--epochs", "1", "--layers", "3", "--init_channels", "2", "--out",
                                  tmp_path / "again")
    assert status == 0, errors


@pytest.mark.parametrize("arguments, said", [
    ([], "--genotype is needed"),
    (["--genotype", "VS_DART"], "VS_DART is no published cell"),
    (["--genotype", "VS_DARTS", "--dataset", "digits", "--auxiliary_weight", "0.4"], "fits 8x8 feature maps"),
    (["--genotype", "VS_DARTS", "--dataset", "imagenet", "--data", "nowhere"], "nowhere is no image folder"),
    (["--genotype", "VS_DARTS", "--drop_path_prob", "1"], "from 0 to 0.99"),
    (["--genotype", "VS_DARTS", "--dataset", "imagenet", "--lr_scheduler", "linear", "--epochs", "5"], "needs --epochs 6"),
    (["--genotype", "VS_DARTS", "--seeds", "1"], "unrecognized arguments: --seeds"),
    (["--genotype", "VS_DARTS", "--dataset", "digits", "--limit", "1"], "from 2"),
    (["--genotype", "VS_DARTS", "--image_size", "7"], "from 8 to 512"),
    (["--evaluate", "x", "--resume", "x"], "cannot be combined"),
    (["--evaluate", ""], "config.json cannot be read"),
    (["--evaluate", "nowhere/weights.pt"], "nowhere/config.json cannot be read"),
])
def test_bad_input_of_retraining_is_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run.Exit, match=said) as error:
        retrain.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value)


# ---------------------------------------------------------------- figures.py

def slow_walk(net, images):
    """The super-network edge by edge, nothing shared: of each cell its nodes, and of each edge (input, {name: output}, mixed)."""
    s0 = s1 = net.stem(images)
    cells = []
    for kind, cell in zip(net.cell_types, net.cells):
        beta = torch.softmax(net.alpha_normal if kind == "normal" else net.alpha_reduce, -1)
        weights = beta.sqrt() if net.sqrt_beta else beta
        nodes, edges = [cell.preprocess0(s0), cell.preprocess1(s1)], {}
        for j in range(2, 6):
            for i in range(j):
                row, primitives = list(net.space[kind]).index((i, j)), net.space[kind][i, j]
                outputs = {name: cell.edges[f"{i}->{j}"].ops[name](nodes[i]) for name in primitives if name != "none"}
                edges[i, j] = (nodes[i], outputs,
                               sum(weights[row, primitives.index(name)] * y for name, y in outputs.items()))
            x_j = sum(edges[i, j][2] for i in range(j))
            nodes.append(slow_norm(x_j) if isinstance(cell.normalize[j - 2], torch.nn.BatchNorm2d) else x_j)
        cells.append((nodes, edges))
        s0, s1 = s1, torch.cat(nodes[2:], 1)
    return net.classifier(s1.mean((2, 3))), cells


def slow_covariance(x, y):
    """One channel after the other, in numpy."""
    return np.mean([np.cov(a.flatten(), b.flatten(), bias=True)[0, 1]
                    for a, b in zip(x.detach().transpose(0, 1).numpy(), y.detach().transpose(0, 1).numpy())])


def tiny_net(space="darts", node_norm=True, sqrt_beta=True, layers=3):
    """A super-network with alphas far from uniform, and a batch."""
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 4, layers, 10, node_norm, sqrt_beta, stem_multiplier=1)
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.copy_(torch.randn_like(alpha))
    return net.train(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,))


def test_looking_changes_nothing():
    net, images, labels = tiny_net()
    def gradients(forward):
        loss = F.cross_entropy(forward(), labels)
        return [loss.detach(), *torch.autograd.grad(loss, [*net.weights, *net.alphas])]
    plain, logits = gradients(lambda: net(images)), []
    modules = dict(net.named_modules())
    del modules[""]
    def watched():
        seen = figures.capture(modules, lambda: logits.append(net(images)))
        assert len(seen) > 100
        return logits[0]
    assert tensors_equal(gradients(watched), plain)
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("node_norm", [False, True])
def test_figure_3_equals_brute_force(float64, node_norm):
    net, images, _ = tiny_net(node_norm=node_norm, layers=4)
    logits, cells = slow_walk(net, images)
    torch.testing.assert_close(logits, net(images))
    for layer in range(4):
        expected = [slow_covariance(node, node) for node in cells[layer][0][2:]]
        assert figures.node_variances(net, layer, images) == pytest.approx(expected)
        assert not node_norm or expected == pytest.approx([1] * 4, abs=1e-3)


@pytest.mark.parametrize("kind, i, j", [("normal", 2, 4), ("normal", 0, 2), ("reduce", 1, 3), ("reduce", 2, 5)])
@pytest.mark.parametrize("sqrt_beta", [False, True])
def test_figure_6_equals_brute_force(float64, kind, i, j, sqrt_beta):
    net, images, _ = tiny_net(sqrt_beta=sqrt_beta, layers=5)                              # cells N R N R N
    x, outputs, mixed = slow_walk(net, images)[1][{"normal": 2, "reduce": 3}[kind]][1][i, j]
    row = EDGES.index((i, j))
    values = figures.mixed_variance(net, kind, row, images)
    assert values["ratio"] == pytest.approx(slow_covariance(mixed, mixed) / slow_covariance(x, x))
    assert values["variance"] == pytest.approx(slow_covariance(mixed, mixed))
    np.testing.assert_allclose(values["covariances"], [[slow_covariance(a, b) for b in outputs.values()]
                                                       for a in outputs.values()], atol=1e-12)
    assert values["squares"] + values["C"] == pytest.approx(values["variance"])              # Eq. 4
    beta = torch.softmax(figures.alpha_of(net, kind)[row], 0).tolist()
    for suffix, total in (("", 1), ("_without_none", 1 - beta[0])):
        w = {name: (b / total) ** (0.5 if sqrt_beta else 1) for name, b in zip(genotypes.DARTS_PRIMITIVES, beta)}
        own = sum(w[a] ** 2 * slow_covariance(y, y) for a, y in outputs.items())
        C = sum(w[a] * w[b] * slow_covariance(y, z) for a, y in outputs.items() for b, z in outputs.items() if a != b)
        assert (values[f"squares{suffix}"], values[f"C{suffix}"]) == pytest.approx((own, C))
    if sqrt_beta and (i, j) == (2, 4):                                                   # Eq. 6: 1, over all operations but none
        assert values["squares_without_none"] == pytest.approx(1, abs=1e-2) and values["squares"] < 0.99


@pytest.mark.parametrize("switches", [["--grad_clip", "0.01"], ["--larc"], ["--larc", "--larc_clip", "--larc_trust", "0.02"]])
def test_figure_5_equals_a_step_of_the_optimizer(float64, switches):
    net, images, labels = tiny_net()
    args = search.parse(["--learning_rate", "0.1", *switches])
    loss = F.cross_entropy(net(images), labels)
    weights = {f"{i}->5": [*net.cells[0].edges[f"{i}->5"].ops["sep_conv_3x3"].parameters()] for i in range(5)}
    sizes = {edge: [math.sqrt(sum((t ** 2).sum().item() for t in tensors))
                    for tensors in (torch.autograd.grad(loss, w, retain_graph=True), w)] for edge, w in weights.items()}
    measured = figures.sep_conv_gradients(net, 0, images, labels, args, lr=0.1)
    before = {edge: [w.detach().clone() for w in tensors] for edge, tensors in weights.items()}
    optimizer, _, _ = search.make_optimizers(net, args)
    search.weight_step(net, optimizer, images, labels, no_autocast, args.grad_clip)      # its first: no momentum yet
    assert measured.keys() == weights.keys()
    for edge, (g, w) in sizes.items():
        step = math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in zip(weights[edge], before[edge])))
        assert measured[edge] == pytest.approx([g, g / w, step / w])


def test_figure_4_equals_a_loop_over_edges():
    for space in ("darts", "s3"):
        alphas = {kind: torch.randn(14, len(SPACES[space]["normal"][0, 2])).tolist() for kind in ("normal", "reduce")}
        means = figures.none_per_node(SPACES[space], alphas)
        for kind in ("normal", "reduce"):
            for j in range(2, 6):
                rows = [alphas[kind][EDGES.index((i, j))] for i in range(j)]
                assert means[kind][str(j)] == pytest.approx(sum(math.exp(r[0]) / sum(map(math.exp, r)) for r in rows) / j)


def test_kendall_tau_equals_a_loop_over_pairs():
    for x, y in ((np.random.rand(7), np.random.rand(7)), ([1, 2, 2, 3], [5, 1, 4, 4])):
        pairs = [(x[a] - x[b]) * (y[a] - y[b]) for a, b in itertools.combinations(range(len(x)), 2)]
        expected = (sum(pair > 0 for pair in pairs) - sum(pair < 0 for pair in pairs)) / len(pairs)
        assert figures.kendall_tau(x, y) == pytest.approx(expected)
    assert figures.kendall_tau([1, 2, 3], [4, 5, 9]) == 1 and figures.kendall_tau([1, 2, 3], [9, 5, 4]) == -1


class RiggedNet(torch.nn.Module):
    """Class 1 for an image below the strength of the mixture: the accuracy of an operation alone grows with its strength."""

    def __init__(self, space, strengths):
        super().__init__()
        self.space, self.sqrt_beta, self.strengths = space, False, strengths
        self.alpha_normal, self.alpha_reduce = (torch.nn.Parameter(s.clone()) for s in strengths.values())
        self.betas = lambda: {kind: torch.softmax(s, -1) for kind, s in
                              (("normal", self.alpha_normal), ("reduce", self.alpha_reduce))}

    def forward(self, images):
        strength = sum((beta * self.strengths[kind]).sum() for kind, beta in self.betas().items()) / 28
        right = images[:, 0, 0, 0] < strength
        return torch.stack([~right, right], 1).float()


@pytest.mark.parametrize("shuffled", [False, True])
def test_figure_2_on_a_rigged_super_network(monkeypatch, shuffled):
    torch.manual_seed(0)
    strengths = {kind: torch.stack([torch.randperm(8) - 3.5 for _ in range(14)]) for kind in ("normal", "reduce")}
    net = RiggedNet(SPACES["darts"], strengths)
    if shuffled:
        for alpha in (net.alpha_normal, net.alpha_reduce):
            alpha.data = torch.stack([row[torch.randperm(8)] for row in alpha.data])
    images = torch.linspace(-10, 10, 20_000)[:, None, None, None].expand(-1, 3, 1, 1)
    monkeypatch.setattr(figures, "load_net", lambda run, epoch: net)
    monkeypatch.setattr(figures, "read_halves", lambda run: (None, None))
    monkeypatch.setattr(figures, "accuracy", lambda net, half, limit: 100 * net(images).argmax(1).double().mean().item())
    before = [net.alpha_normal.detach().clone(), net.alpha_reduce.detach().clone()]
    numbers = figures.beta_and_accuracy(None, 10, [], SimpleNamespace(images=None, tune=None))
    assert all(edge["operations"] == [*genotypes.DARTS_PRIMITIVES[1:]] for edge in numbers["edges"].values())
    assert len(numbers["edges"]) == 28 and tensors_equal(before, [net.alpha_normal.data, net.alpha_reduce.data])
    if not shuffled:
        assert numbers["mean_tau"] == 1 and numbers["interval"] == [1, 1]
    else:
        taus = [edge["tau"] for edge in numbers["edges"].values()]
        half_width = 1.96 * np.std(taus, ddof=1) / math.sqrt(28)
        assert abs(numbers["mean_tau"]) < 0.25 and half_width > 0.05
        assert numbers["interval"] == pytest.approx([np.mean(taus) - half_width, np.mean(taus) + half_width])


@pytest.mark.parametrize("space, edge, sqrt_beta", [("darts", "normal:1-3", False), ("s1", "reduce:2-5", True)])
def test_one_operation_alone_equals_brute_force(space, edge, sqrt_beta):
    """Logits with one operation alone on an edge, against a network in which that operation stands there by itself."""
    net, images, _ = tiny_net(space, sqrt_beta=sqrt_beta)
    kind, row, primitives = figures.edge_row(SPACES[space], edge)
    before = figures.alpha_of(net, kind).detach().clone()
    with torch.no_grad():
        measured = figures.discretization_accuracies(net, kind, row, range(len(primitives)), lambda net: net(images))
        assert torch.equal(figures.alpha_of(net, kind), before)
        i, j = edge.split(":")[1].split("-")
        mixed = [cell.edges[f"{i}->{j}"] for cell, cell_type in zip(net.cells, net.cell_types) if cell_type == kind]
        for name, logits in zip(primitives, measured):
            for m in mixed:
                m.forward = lambda x, beta, m=m: m.ops[name](x) if name != "none" else 0 * x[:, :, ::m.stride, ::m.stride]
            torch.testing.assert_close(logits, net(images))
    assert (measured[0] - measured[1]).abs().max() > 1e-3


def test_accuracy_counts_images_with_the_batches_own_statistics():
    net, _, _ = tiny_net("s2")
    half = data.load("digits", "unused", True).to(torch.device("cpu"), torch.channels_last)
    pixels = ((half.images[:700].float() / 255 - 0.3054) / 0.3753).permute(0, 3, 1, 2)
    with torch.no_grad():
        right = sum((slow_walk(net, pixels[a:b])[0].argmax(1) == half.labels[a:b]).sum().item() for a, b in ((0, 512), (512, 700)))
    assert figures.accuracy(net.eval(), half, 700) == pytest.approx(100 * right / 700, abs=0.3) and right > 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two finished searches with kept super-networks, DARTS-L2 and VS-DARTS, and one of another space, without."""
    folder = tmp_path_factory.mktemp("kept")
    small = [*SMALL, "--epochs", "2", "--limit", "400"]
    search.main([*small, "--keep_nets", "--out", str(folder / "darts")])
    search.main([*small, "--keep_nets", "--node_norm", "--larc", "--sqrt_beta", "--out", str(folder / "vs")])
    search.main([*small, "--space", "s2", "--out", str(folder / "s2")])
    return folder


def test_tuning_equals_a_plain_loop(kept):
    """Of weights only, on their half, by the search's SGD over a whole cosine, step by step."""
    options = figures.make_parser().parse_args(["2", str(kept / "darts"), "--tune", "2"])
    searched = figures.read_search(str(kept / "darts"), options)
    searched.args.batch_size = 64                           # 4 steps an epoch
    net, plain = figures.load_net(searched, 2), figures.load_net(searched, 2)
    figures.leave_one(net, "normal", 4, 5)
    figures.tune(net, searched, figures.read_halves(searched)[0], 2)
    plain.alpha_normal.data[4] = -1e9
    plain.alpha_normal.data[4, 5] = 1e9
    batches = data.Batches(data.load("digits", "unused", True).part(0, 200), 64, run.make_seed(2, "tune"))
    optimizer = torch.optim.SGD(plain.weights, 0.025, 0.9, weight_decay=5e-3)
    plain.train()
    for epoch in range(2):
        for step, (images, labels) in enumerate(batches.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = 0.001 + 0.024 * (1 + math.cos(math.pi * (4 * epoch + step) / 8)) / 2
            optimizer.zero_grad()
            F.cross_entropy(plain(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            torch.nn.utils.clip_grad_norm_(plain.weights, 5)
            optimizer.step()
    start = figures.load_net(searched, 2)
    for a, b, before in zip(net.weights, plain.weights, start.weights):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, before)
    assert torch.equal(net.alpha_reduce, start.alpha_reduce)


def test_figures_follow_a_run_over_its_epochs(kept):
    """The numbers of an epoch are those of its kept network on the first images of the half for alpha, not augmented."""
    options = figures.make_parser().parse_args(["3", str(kept / "vs"), str(kept / "darts"), "--cell", "1"])
    numbers = figures.figure3(options)["runs"]
    split = data.load("digits", "unused", True).part(200, 400)
    images = torch.stack([(image.double() / 255 - torch.tensor(split.spec.mean)) / torch.tensor(split.spec.std)
                          for image in split.images]).permute(0, 3, 1, 2).float()
    for name in ("vs", "darts"):
        values = numbers[str(kept / name)]["variances"]
        net = SuperNet(SPACES["darts"], 2, 3, node_norm=name == "vs", sqrt_beta=name == "vs")
        for epoch in range(3):
            net.load_state_dict(torch.load(kept / name / f"net-{epoch}.pt", weights_only=True))
            nodes = slow_walk(net.train(), images)[1][1][0]
            assert values[epoch] == pytest.approx([slow_covariance(node, node) for node in nodes[2:]], rel=1e-3)
        assert len(values) == 3
    rates = figures.figure5(figures.make_parser().parse_args(["5", str(kept / "vs")]))["runs"][str(kept / "vs")]
    for lr, *steps in zip((0.025, 0.013, 0.001), *rates["relative_step"].values()):       # LARC: trust 1
        assert all(0.6 * lr < step < 1.001 * lr for step in steps)                       # lr |g + b w| / (|g| + b |w|)


def test_figure_1_has_the_edges_of_the_cell():
    cells = figures.figure1(figures.make_parser().parse_args(["1", "VS_DARTS"]))["cells"]
    assert cells["normal"]["edges"][:3] == [(1, 2, "sep_conv_3x3", 1.0), (0, 2, "skip_connect", 1.0), (1, 3, "sep_conv_3x3", 1.0)]
    alphas = {kind: [[0.0] * 8 for _ in range(14)] for kind in ("normal", "reduce")}
    alphas["reduce"][EDGES.index((1, 3))][5] = math.log(9)                               # beta = 9 / (9 + 7)
    edges = figures.strongest_operations(SPACES["darts"], alphas)["reduce"]["edges"]
    assert [edge[:2] for edge in edges] == EDGES
    assert edges[EDGES.index((1, 3))][2:] == ("sep_conv_5x5", pytest.approx(9 / 16))


@pytest.mark.parametrize("arguments", [["1", "VS_DARTS"], ["1", "NASNet_A"], ["1", "vs"], ["1", "vs/genotype.json"], ["3", "darts", "vs"],
                                       ["2", "vs", "--images", "20", "--tune", "1", "--edge", "normal:0-2"], ["4", "darts", "vs"],
                                       ["5", "darts", "vs"], ["6", "darts", "vs"], ["overview", "darts", "vs"], ["overview", "s2"]])
def test_every_figure_is_drawn_with_its_numbers(kept, tmp_path, capsys, monkeypatch, arguments):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(kept)
    figures.main([*arguments, "--out", str(tmp_path / "out")])
    picture = Path(capsys.readouterr().out.splitlines()[-1])
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
    numbers = json.loads(picture.with_suffix(".json").read_text())
    assert sorted(os.listdir(tmp_path / "out")) == sorted([picture.name, picture.with_suffix(".json").name])
    assert arguments[0] == "1" or numbers["runs"].keys() == set(arguments[1:]) & {"darts", "vs", "s2"}


@pytest.mark.parametrize("arguments, said", [
    (["3", "s2"], "s2 kept no super-networks: search again with --keep_nets"),
    (["4", "darts", "s2"], "s2 has space s2 and darts darts: one space a figure"),
    (["4", "s2"], "space s2 has no operation `none`"),
    (["7", "darts"], "invalid choice: '7'"),
    (["6", "darts", "--edge", "normal:3-2"], "--edge normal:3-2: there is no such edge"),
    (["2", "darts", "--edge", "x"], "--edge x: there is no such edge"),
    (["3", "darts", "--cell", "3"], "--cell 3: these super-networks have cells 0 to 2"),
    (["4", "darts", "--epoch", "3"], "--epoch 3: darts has epochs 1 to 2"),
    (["2", "darts", "--epoch", "3"], "--epoch 3: darts has epochs 0 to 2"),
    (["1", "darts", "vs"], "figure 1 draws one cell"), (["1", "nothing"], "nothing is no published cell"),
    (["1", "VS_DARTS", "--epoch", "1"], "--epoch is for a search"),
    (["3", "nothing"], "nothing/config.json cannot be read"), (["3", "unfinished"], "unfinished is an unfinished search: finish it"),
    (["overview", "darts", "--out", "darts/config.json"], "cannot write to darts/config.json"),
    (["overview", "darts", "--out", "darts/config.json/deeper"], "cannot write to darts/config.json/deeper"),
    (["5", "darts", "--edge", "zzz"], "--edge does not belong to 5, only to figures 2, 6"),
    (["table4", "darts", "--tune", "1"], "--tune does not belong to table4"),
    (["table4", "darts"], "no finished run of retrain.py"), (["table1", "nothing"], "nothing is no run of retrain.py"),
])
def test_bad_input_of_figures_is_named(kept, tmp_path, monkeypatch, arguments, said):
    for name in ("darts", "vs", "s2"):
        shutil.copytree(kept / name, tmp_path / name)
    shutil.copytree(kept / "vs", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "genotype.json").unlink()
    monkeypatch.setattr(figures, "new_figure", lambda *sizes: None)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(run.Exit, match=re.escape(said)) as error:
        figures.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_nothing_is_computed(kept, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(figures.FIGURES, "3", (None, None, None))
    with pytest.raises(run.Exit, match="drawing needs matplotlib: pip install matplotlib"):
        figures.main(["3", str(kept / "vs")])


def retrained(folder, genotype, error, *flags, finished=True):
    """A folder as retrain.py leaves it."""
    folder.mkdir(parents=True)
    args = retrain.parse(["--genotype", str(genotype), "--dataset", "digits", "--out", str(folder), *flags])
    (folder / "config.json").write_text(json.dumps({"program": "retrain.py", **vars(args), "processes": 1}))
    if finished:
        (folder / "result.json").write_text(json.dumps({"test_error": error, "parameters": 1_000_000 + round(100_000 * error)}))


def searched(folder, seconds, *flags):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"program": "search.py", **vars(search.parse(["--out", str(folder), *flags]))}))
    (folder / "log.jsonl").write_text("".join(json.dumps({"seconds": s, "device": "Tesla"}) + "\n" for s in seconds))
    (folder / "genotype.json").write_text(genotypes.to_json(PUBLISHED["VS_DARTS"].genotype))


def test_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vs = ["--node_norm", "--larc", "--sqrt_beta"]
    for seed, error in ((0, 3.0), (1, 4.0), (2, 5.0)):
        searched(Path(f"vs{seed}"), [1800, 1800 * (seed + 1)], *vs, "--seed", str(seed))
        retrained(Path(f"r-vs{seed}"), f"vs{seed}/genotype.json", error, "--seed", str(seed))
    for name, flags in (("darts", ["--weight_decay", "3e-4"]), ("norm", ["--node_norm"]), ("trust", [*vs, "--larc_trust", "0.5"]),
                        ("s2", [*vs, "--space", "s2"])):
        searched(Path(name), [36], *flags)
        retrained(Path(f"r-{name}"), f"{name}/genotype.json", 9.0)
    retrained(Path("r-published"), "DARTS_V2", 2.0)
    for seed in (1, 2):
        retrained(Path(f"r-random{seed}"), f"cells/random{seed}.json", 6.0 + seed)
    retrained(Path("r-unfinished"), "norm/genotype.json", 0.0, finished=False)
    one_space = [name for name in sorted(os.listdir()) if name not in ("r-s2", "s2")]

    figures.main(["table4", *one_space])
    shown, errors = capsys.readouterr()
    assert errors == "figures.py: r-unfinished is left out: it is not finished\n"
    rows = {line.split(" | ")[0][2:]: line for line in shown.splitlines()[2:]}
    assert list(rows)[:4] == ["DARTS-L2", "DARTS-L2 + node norm", "DARTS-L2 + node norm + LARC", "VS-DARTS"]
    assert rows["DARTS-L2"] == "| DARTS-L2 | 2.91 | - | - | - |"
    assert rows["DARTS-L2 + node norm"] == "| DARTS-L2 + node norm | 2.71 | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |"
    assert rows["VS-DARTS"] == "| VS-DARTS | 2.43 | 4.00 ± 1.00 (3.00 4.00 5.00) | 1.400 | 1.50 h, Tesla |"
    assert rows["VS-DARTS, trust 0.5"].split(" | ")[2] == rows["DARTS"].split(" | ")[2] == "9.00 (9.00)"
    assert rows["random"] == "| random | - | 7.50 ± 0.71 (7.00 8.00) | 1.750 | - |"

    figures.main(["table1", *one_space])
    rows = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["VS-DARTS (avg)"].endswith("| 4.00 ± 1.00 (3.00 4.00 5.00) | 1.400 | 1.50 h, Tesla |")
    assert rows["VS-DARTS (best)"] == "| VS-DARTS (best) | 3.38 | 2.43 | 0.4 | 3.00 (3.00) | 1.300 | 1.00 h, Tesla |"
    assert rows["DARTS_V2"] == "| DARTS_V2 | - | - | - | 2.00 (2.00) | 1.200 | - |"    # a published cell is no search of ours
    assert rows["P-DARTS"] == "| P-DARTS | 3.4 | 2.50 | 0.2 | - | - | - |" and "random" in rows

    figures.main(["table3", "r-s2", "r-darts"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0] == "| cifar10 | s1 | DARTS | 3.84 | - | - | - |" and len(rows) == 12 * 7 + 2
    assert "| svhn | s4 | DARTS-ADA | 2.46 | - | - | - |" in rows
    assert "| digits | s2 | VS-DARTS | - | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |" in rows

    with pytest.raises(run.Exit, match="darts has --space darts and s2 s2: one protocol a table"):
        figures.main(["table4", "r-s2", "r-darts"])
    retrained(Path("r-other"), "norm/genotype.json", 1.0, "--epochs", "7")
    with pytest.raises(run.Exit, match="r-other has --epochs 7 and r-darts 30: one protocol a table"):
        figures.main(["table4", "r-darts", "r-other"])
    with pytest.raises(run.Exit, match="no finished run of retrain.py"):
        figures.main(["table4", "r-unfinished"])
    with pytest.raises(run.Exit, match="no retrained cell of a search"):
        figures.main(["table3", "r-published"])
    retrained(Path("r-s2-longer"), "s2/genotype.json", 1.0, "--epochs", "7")
    with pytest.raises(run.Exit, match="r-s2-longer has --epochs 7"):
        figures.main(["table3", "r-s2", "r-s2-longer"])
    searched(Path("vs-longer"), [1], *vs, "--epochs", "3")
    retrained(Path("r-vs-longer"), "vs-longer/genotype.json", 1.0)
    with pytest.raises(run.Exit, match="vs-longer has --epochs 3 and vs0 50: one protocol a table"):
        figures.main(["table4", "r-vs0", "r-vs-longer"])
    shutil.rmtree("vs0")                                    # the search is gone: its cell is one of a file
    figures.main(["table4", "r-vs0", "r-vs1"])
    assert "| vs | - | 3.00 (3.00) | 1.300 | - |" in capsys.readouterr().out
    assert figures.method(SimpleNamespace(node_norm=True, larc=True, sqrt_beta=True, method=None, weight_decay=3e-4, larc_trust=1.0,
                                          larc_clip=False)) == "VS-DARTS, weight decay 0.0003"


# ---------------------------------------------------------------- baselines.py

def small_flags(*flags):
    return ["--dataset", "digits", "--device", "cpu", "--layers", "3", "--init_channels", "2", "--batch_size", "32", "--limit", "128",
            "--space", "s2", *flags]


@pytest.mark.parametrize("flags", [[], ["--larc"], ["--larc", "--larc_clip", "--larc_trust", "0.02"]])
def test_second_order_equals_double_backward(float64, monkeypatch, flags):
    """The finite difference against the exact derivative through the virtual step; LARC's factors are constants.

    The network is made smooth: a ReLU's kinks, which it may cross, would hide that the error falls as epsilon squared.
    """
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    net, images, labels = tiny_net("s2")
    args = search.parse(["--learning_rate", "0.1", *flags])
    optimizer, _, _ = search.make_optimizers(net, args)
    search.weight_step(net, optimizer, images, labels, no_autocast, 5.0)                 # so that there is momentum
    train, valid = (images, labels), (torch.randn_like(images), torch.randint(10, labels.shape))
    names = [name for name, _ in net.named_parameters() if "alpha" not in name]
    assert all(dict(net.named_parameters())[name] is w for name, w in zip(names, net.weights))
    g = torch.autograd.grad(F.cross_entropy(net(train[0]), train[1]), net.weights, create_graph=True)
    moved = {}
    for name, w, gradient in zip(names, net.weights, g):
        d = gradient + 5e-3 * w
        ratio = (args.larc_trust * w.norm() / (gradient.norm() + 5e-3 * w.norm() + 1e-8)).detach()
        factor = 1 if not args.larc else min(ratio / 0.1, 1) if args.larc_clip else ratio
        moved[name] = w - 0.1 * (0.9 * optimizer.state[w]["momentum_buffer"] + factor * d)
    exact = torch.autograd.grad(F.cross_entropy(torch.func.functional_call(net, moved, (valid[0],)), valid[1]), net.alphas)
    first_order = torch.autograd.grad(F.cross_entropy(net(valid[0]), valid[1]), net.alphas)
    errors = []
    for epsilon in (1e-2, 1e-3):
        found = baselines.second_order_gradient(net, optimizer, valid, train, no_autocast, epsilon)
        errors.append(max((a - b).abs().max() for a, b in zip(found, exact)))
    size = max(a.abs().max() for a in exact)
    assert errors[1] < 1e-3 * size and 90 < errors[0] / errors[1] < 110
    assert max((a - b).abs().max() for a, b in zip(first_order, exact)) > 100 * errors[1]


def test_the_second_order_step_moves_alphas_only():
    net, images, labels = tiny_net("s2")
    w_optimizer, alpha_optimizer, _ = search.make_optimizers(net, search.parse([]))
    search.weight_step(net, w_optimizer, images, labels, no_autocast, 5.0)
    def everything():
        return {**{name: value.clone() for name, value in net.state_dict().items() if "alpha" not in name},
                **{f"momentum {k}": w_optimizer.state[w]["momentum_buffer"].clone() for k, w in enumerate(net.weights)}}
    before, alphas = everything(), [alpha.detach().clone() for alpha in net.alphas]
    baselines.second_order_step(net, alpha_optimizer, (images, labels), (images, labels), w_optimizer, no_autocast)
    assert tensors_equal(before, everything())
    assert not any(torch.equal(a, b) for a, b in zip(net.alphas, alphas))


def test_eigenvalue_equals_that_of_the_full_hessian(float64):
    net, images, labels = tiny_net("s2")
    images, labels = images[:6], labels[:6]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    def loss(alphas):
        values = {"alpha_normal": alphas[:28].view(14, 2), "alpha_reduce": alphas[28:].view(14, 2)}
        return F.cross_entropy(torch.func.functional_call(net, values, (images,)), labels)
    H = torch.autograd.functional.hessian(loss, torch.cat([alpha.detach().flatten() for alpha in net.alphas]))
    net.load_state_dict(state)
    found = baselines.largest_eigenvalue(net, images, labels, no_autocast)
    assert found == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-2)
    found = baselines.largest_eigenvalue(net, images, labels, no_autocast, steps=100)
    assert found == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-6)
    assert tensors_equal(state, dict(net.state_dict()))


@pytest.mark.parametrize("values", [(3.0, 1.0, -2.0), (-5.0, 2.0, 1.0), (-3.0, -1.0, -2.0), (1.0, -0.95) + (0.0,) * 30,
                                    (1.0, -0.9, 0.5, -0.5) + (0.01,) * 60])
def test_the_largest_eigenvalue_may_not_be_the_largest_in_size(monkeypatch, float64, values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0))).Q
    H = Q @ torch.diag(torch.tensor(values)) @ Q.T
    net = SimpleNamespace(alphas=[torch.randn(2, requires_grad=True), torch.randn(len(values) - 2, requires_grad=True)])
    monkeypatch.setattr(baselines, "loss_at", lambda net, *rest: torch.cat(net.alphas) @ H @ torch.cat(net.alphas) / 2)
    assert baselines.largest_eigenvalue(net, None, None, no_autocast) == pytest.approx(max(values), rel=1e-6)


def test_alarm_on_made_up_eigenvalues():
    """Averages of two: 1, 1, 1, 1, 1.5, 3, 6: below 3/4 of today's two epochs before from the fifth on."""
    values = [1, 1, 1, 1, 2, 4, 8]
    alarms = [baselines.alarm(values[:n], window=2, ratio=0.75, first=3) for n in range(len(values) + 1)]
    assert alarms == [None, None, None, None, None, 3, 4, 5]
    assert [baselines.alarm(values[:n], 2, 0.75, first=7) for n in (6, 7)] == [None, 5]
    assert baselines.alarm([1] * 20, 5, 0.75, 10) is None and baselines.alarm([-1.0] * 3 + [2.0] * 9, 2, 0.75, 3) is None
    assert baselines.alarm([1, 100, 100], 2, 0.75, 1) == 1
    assert baselines.alarm([1, 100], 2, 0.75, 1) is None                                 # nothing two epochs before to compare with


def interrupt_after(epochs, monkeypatch):
    """As a signal would, between two steps after so many epochs in this process."""
    end_epoch, done = run.Run.end_epoch, []
    def counted(self, record, **state):
        end_epoch(self, record, **state)
        done.append(record)
        if len(done) == epochs:
            run.stop = signal.SIGTERM
    monkeypatch.setattr(run.Run, "end_epoch", counted)


def all_logs(folder):
    return {path.relative_to(folder): [{key: value for key, value in json.loads(line).items() if key not in ("seconds", "images/s")}
                                       for line in path.read_text().splitlines()] for path in sorted(folder.glob("**/log*.jsonl"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    search.main(small_flags("--epochs", "1", "--node_norm", "--out", str(out)))
    return out


def made_up_eigenvalues(args):
    """They grow as the learning rate falls, so that they depend on the epoch alone."""
    return lambda net, w_optimizer, batch: {"eigenvalue": w_optimizer.param_groups[0]["lr"] ** -2,
                                            "weight_decay": w_optimizer.param_groups[0]["weight_decay"]}


@pytest.mark.parametrize("method", ["second_order", "es", "ada", "perturbation", "r_darts"])
def test_a_stopped_baseline_goes_on_to_the_same_end(tmp_path, monkeypatch, finished, method):
    monkeypatch.setattr(baselines, "look_at_hessian", made_up_eigenvalues)
    monkeypatch.setattr(baselines, "orders", lambda space, seed: {kind: ([3, 7, 0], [4]) for kind in space})  # not all, for time
    flags = {"second_order": small_flags("--epochs", "3"), "es": small_flags("--epochs", "6", "--window", "1", "--first", "2"),
             "ada": small_flags("--epochs", "6", "--window", "1", "--first", "2"),
             "r_darts": small_flags("--epochs", "2", "--train_epochs", "2", "--train_channels", "2", "--train_layers", "3"),
             "perturbation": ["--tune_epochs", "1", str(finished)]}[method]
    baselines.main([method, *flags, "--out", str(tmp_path / "whole")])
    command = [method, *flags, "--out", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        interrupt_after({"r_darts": 4, "perturbation": 3, "es": 1}.get(method, 2), patch)
        with pytest.raises(run.Exit, match=re.escape(f"resume with `python baselines.py {method} --resume")) as error:
            baselines.main(command)
        assert error.value.status == 128 + signal.SIGTERM
        assert ("finished decision(s)" if method == "perturbation" else "finished epoch(s)") in str(error.value)
    run.stop = None
    with pytest.raises(run.Exit, match=re.escape(f"resume with `python baselines.py {method} --resume")):
        baselines.main(command)
    if method == "perturbation":
        with pytest.raises(run.Exit, match=f"is a perturbation of {finished}, not of elsewhere: leave RUN out"):
            baselines.main([method, "elsewhere", "--resume", str(tmp_path / "parts")])
    baselines.main([method, "--resume", str(tmp_path / "parts")])
    assert all_logs(tmp_path / "whole") == all_logs(tmp_path / "parts")
    assert (tmp_path / "whole" / "genotype.json").read_text() == (tmp_path / "parts" / "genotype.json").read_text()
    checkpoints = list((tmp_path / "whole").glob("**/*.pt"))
    assert checkpoints
    for path in checkpoints:
        other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
        assert tensors_equal(torch.load(path, weights_only=True), torch.load(other, weights_only=True)), path
    with pytest.raises(run.Exit, match="holds a finished run"):
        baselines.main([method, *flags, "--out", str(tmp_path / "whole")])


def test_a_look_at_the_hessian_changes_nothing_of_the_search(tmp_path):
    """In S4, where every forward pass draws noise."""
    flags = small_flags("--epochs", "2", "--weight_decay", "3e-4", "--space", "s4")
    search.main([*flags, "--out", str(tmp_path / "plain")])
    baselines.main(["es", *flags, "--out", str(tmp_path / "es")])
    plain, es = (all_logs(tmp_path / name)[Path("log.jsonl")] for name in ("plain", "es"))
    assert [{key: record[key] for key in plain[0]} for record in es] == plain
    assert all(math.isfinite(record["eigenvalue"]) and record["weight_decay"] == 3e-4 for record in es)
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["net"] for name in ("plain", "es")]
    assert tensors_equal(*weights)


def test_es_of_a_search_that_diverges_says_so(tmp_path):
    flags = small_flags("--epochs", "1", "--learning_rate", "2e9", "--grad_clip", "2e9", "--weight_decay", "1e3")
    with pytest.raises(run.Exit, match="not finite") as error:
        baselines.main(["es", *flags, "--out", str(tmp_path / "run")])
    assert error.value.status == 1 and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_perturbation_tunes_between_pairs_of_decisions(tmp_path, monkeypatch, finished):
    """In the order of darts-pt, at its constant rate, alpha before the weights; no tuning after the last pair."""
    monkeypatch.setattr(baselines, "orders", lambda space, seed: {kind: ([3, 7], [4]) for kind in space})
    seen, rates = [], set()
    for module, name in ((baselines, "decide_operation"), (baselines, "decide_inputs"), (baselines, "tune"), (search, "alpha_step"),
                         (search, "weight_step")):
        def spied(*args, name=name, real=getattr(module, name)):
            seen.append((name, *(args[1:3] if name.startswith("decide") else args[7:8] if name == "tune" else ())))
            if name == "weight_step":
                rates.add(args[1].param_groups[0]["lr"])
            return real(*args)
        monkeypatch.setattr(module, name, spied)
    baselines.main(["perturbation", str(finished), "--tune_epochs", "2", "--out", str(tmp_path / "run")])
    def tuning(*epochs):                                                                 # of two steps each
        return [step for epoch in epochs for step in [("tune", epoch), *2 * [("alpha_step",), ("weight_step",)]]]
    assert seen == [("decide_operation", "normal", 3), ("decide_operation", "reduce", 3), *tuning(0, 1),
                    ("decide_operation", "normal", 7), ("decide_operation", "reduce", 7), *tuning(2, 3),
                    ("decide_inputs", "normal", 4), ("decide_inputs", "reduce", 4)]
    assert rates == {0.0025}


def test_baselines_mistakes_end_in_one_line_and_status_2(tmp_path):
    process = subprocess.run([sys.executable, "baselines.py", "es", "--max_decay", "1"], cwd=HERE, env=ENVIRONMENT, text=True,
                             capture_output=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "baselines.py: unrecognized arguments: --max_decay 1 (see --help)\n"


def test_es_stops_and_returns_to_the_epoch_before(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "look_at_hessian", made_up_eigenvalues)
    out = tmp_path / "run"
    baselines.main(["es", *small_flags("--epochs", "8", "--window", "2", "--first", "3", "--ratio", "0.6", "--out", str(out))])
    records = lines_of(out)
    rates = [0.001 + 0.012 * (1 + math.cos(math.pi * e / 8)) for e in range(9)]
    averages = [rates[1] ** -2] + [(rates[e] ** -2 + rates[e + 1] ** -2) / 2 for e in range(1, 8)]   # after epochs 1, 2, ...
    stopped = next(e for e in range(3, 9) if averages[e - 3] / averages[e - 1] < 0.6)
    assert len(records) == stopped < 8 and [r["eigenvalue"] for r in records] == pytest.approx([r ** -2 for r in rates[1:stopped + 1]])
    written = genotypes.load(str(out / "genotype.json"))
    assert json.loads(json.dumps(written._asdict())) == records[stopped - 3]["genotype"]


def test_ada_goes_back_and_raises_the_weight_decay(tmp_path, monkeypatch, capsys):
    """Both alarms go back to one epoch: the end is that of a search which there turns to 0.03, all else the same."""
    monkeypatch.setattr(baselines, "look_at_hessian", made_up_eigenvalues)
    flags = small_flags("--epochs", "6", "--weight_decay", "3e-4")
    baselines.main(["ada", *flags, "--window", "1", "--first", "2", "--out", str(tmp_path / "ada")])
    said = re.findall(r"alarm after (\d+) epochs: back to (\d+), with weight decay ([\d.]+)", capsys.readouterr().out)
    assert [decay for _, _, decay in said] == ["0.003", "0.03"] and len({(a, b) for a, b, _ in said}) == 1
    stopped, back = int(said[0][0]), int(said[0][1])
    decays = [record["weight_decay"] for record in lines_of(tmp_path / "ada")]
    assert decays == [3e-4] * back + [0.03] * (6 - back) and stopped == back + 1
    logs = all_logs(tmp_path / "ada")
    assert [record["weight_decay"] for record in logs[Path("log-before-0.03.jsonl")]] == [0.003] * (stopped - back)
    assert [record["epoch"] for record in logs[Path("log-before-0.003.jsonl")]] == list(range(back, stopped))

    def turn(net, w_optimizer, batch):
        if len(plain.log) + 1 == back:
            w_optimizer.param_groups[0]["weight_decay"] = 0.03
        return {}
    args = search.parse([*flags, "--out", str(tmp_path / "plain")])
    plain = run.Run("search.py", args, "genotype.json", "")
    search.search(args, plain, look=turn)
    first, second = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("ada", "plain"))
    assert tensors_equal(first, second)


def test_ada_goes_back_to_ever_earlier_epochs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "look_at_hessian", lambda args: lambda net, w_optimizer, batch: {
        "eigenvalue": w_optimizer.param_groups[0]["lr"] ** (-1 if w_optimizer.param_groups[0]["weight_decay"] == 3e-4 else -4),
        "weight_decay": w_optimizer.param_groups[0]["weight_decay"]})
    baselines.main(["ada", *small_flags("--epochs", "9", "--window", "3", "--first", "4", "--out", str(tmp_path / "run"))])
    said = re.findall(r"alarm after (\d+) epochs: back to (\d+), with weight decay ([\d.]+)", capsys.readouterr().out)
    assert [decay for _, _, decay in said] == ["0.003", "0.03"] and int(said[1][1]) < int(said[0][1])
    assert len(lines_of(tmp_path / "run")) == 9 and not list((tmp_path / "run").glob("checkpoint-*.pt"))


def test_second_order_sees_one_noise_in_its_training_passes(monkeypatch):
    net, images, labels = tiny_net("s4")
    drawn, forward = [], model.Noise.forward
    monkeypatch.setattr(model.Noise, "forward", lambda self, x: drawn.append(forward(self, x)) or drawn[-1])
    w_optimizer, _, _ = search.make_optimizers(net, search.parse([]))
    baselines.second_order_gradient(net, w_optimizer, (images, labels), (images, labels), no_autocast)
    calls = len(drawn) // 4                                 # w, w', w+ and w-
    assert calls == 42 and tensors_equal(drawn[:calls], drawn[3 * calls:]) and tensors_equal(drawn[2 * calls:3 * calls], drawn[3 * calls:])
    net(images)                                             # as the weight step that follows
    of_each_pass = [drawn[k * calls] for k in (0, 1, 4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(of_each_pass, 2))


def test_r_darts_keeps_the_cell_of_the_lowest_validation_error(tmp_path, monkeypatch, capsys):
    errors = {"weight_decay-0.0003": 30.0, "weight_decay-0.0009": 20.0, "weight_decay-0.0027": 20.0, "weight_decay-0.0081": 25.0}
    monkeypatch.setattr(baselines, "train_briefly", lambda genotype, args, folder: errors[folder.parent.name])
    baselines.main(["r_darts", *small_flags("--epochs", "1", "--out", str(tmp_path / "run"))])
    assert "the cell is that of weight decay 0.0009\n" in capsys.readouterr().out           # so short searches may agree on a cell
    assert json.loads((tmp_path / "run" / "validation.json").read_text()) == {name[13:]: e for name, e in errors.items()}
    assert genotypes.load(str(tmp_path / "run" / "genotype.json")) == genotypes.load(str(tmp_path / "run" / "weight_decay-0.0009" / "genotype.json"))
    for name in errors:
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["weight_decay"] == float(name[13:])


def test_brief_training_sees_the_training_split_only(tmp_path, monkeypatch):
    """It trains on the half for w and is tested, not augmented, on the half for alpha."""
    seen, opened = [], []
    monkeypatch.setattr(retrain, "train", lambda genotype, options, run, rank, world, read: seen.append((options, read)))
    monkeypatch.setattr(search, "load", lambda *args: opened.append(args[2]) or data.load(*args))
    args = search.parse(small_flags("--weight_decay", "0.1"), baselines.searching("r_darts"), "r_darts")
    (tmp_path / "trained").mkdir()
    with pytest.raises(FileNotFoundError):                  # no result.json: nothing was trained here
        baselines.train_briefly(PUBLISHED["VS_DARTS"].genotype, args, tmp_path / "trained")
    options, read = seen[0]
    assert options.weight_decay == 3e-4 and options.epochs == 100                        # retraining's protocol, not the search's
    assert options.cutout_length == 2                       # and fitted to the size of the images:
    args = search.parse(["--dataset", "fashion_mnist", "--image_size", "8", "--amp"], baselines.searching("r_darts"), "r_darts")
    with pytest.raises(FileNotFoundError):
        baselines.train_briefly(PUBLISHED["VS_DARTS"].genotype, args, tmp_path / "trained")
    small = seen.pop()[0]
    assert (small.cutout_length, small.amp, options.amp, seen) == (4, True, False, [(options, read)])
    batches, classes, side = read(options, True, torch.device("cpu"), torch.contiguous_format, 0, 1)
    tested, _, _ = read(options, False, torch.device("cpu"), torch.contiguous_format, 0, 1)
    split = data.load("digits", "unused", True)
    assert torch.equal(batches.split.images, split.images[:64]) and (classes, side) == (10, 8) and opened == [True, True]
    assert torch.equal(torch.cat([images for images, _ in tested()]), data.normalize(split.images[64:128], split.spec))


TWO_EDGES = {kind: {(0, 2): ("noise", "sep_conv_3x3"), (1, 2): ("noise", "sep_conv_3x3")} for kind in ("normal", "reduce")}


def test_perturbation_keeps_what_the_network_needs():
    """Two edges, noise or a convolution on each: a trained network cannot do without the convolution."""
    torch.manual_seed(0)
    net = SuperNet(TWO_EDGES, 4, 3, node_norm=True, sqrt_beta=True)
    optimizer = torch.optim.SGD(net.weights, 0.05, 0.9)
    split = data.load("digits", "unused", True)
    for epoch in range(5):
        for images, labels in data.Batches(split, 64, 0).epoch(epoch):
            search.weight_step(net, optimizer, images, labels, no_autocast, 5.0)
    decisions, batch = baselines.Decisions(net), [next(data.test_batches(split, 512))]
    def accuracy(zeroed):
        return baselines.accuracy_without(net, decisions, zeroed, batch, no_autocast, lambda: None)
    for kind in ("normal", "reduce"):
        for row in (0, 1):
            record = baselines.decide_operation(TWO_EDGES, kind, row, decisions, accuracy)
            assert record["kept"] == "sep_conv_3x3" and record["edge"] == (row, 2)
            assert record["accuracies"]["sep_conv_3x3"] < record["accuracies"]["noise"]
    assert decisions.normal.tolist() == decisions.reduce.tolist() == [[0, 1], [0, 1]]
    assert baselines.decided_genotype(TWO_EDGES, decisions).normal == ((("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),)


def test_decisions_take_the_place_of_beta():
    net, images, labels = tiny_net(sqrt_beta=True)
    plain = SuperNet(SPACES["darts"], 4, 3, 10, True, True, stem_multiplier=1)
    plain.load_state_dict(net.state_dict())
    decisions = baselines.Decisions(net)
    decisions.normal[3], decisions.reduce[7] = torch.eye(8)[4], torch.zeros(8)
    for zeroed in (None, ("normal", 5, 2), ("reduce", 5, None)):
        s0 = s1 = plain.stem(images)
        for kind, cell in zip(plain.cell_types, plain.cells):
            beta = mixing_weights(figures.alpha_of(plain, kind), True).detach().clone()
            if kind == "normal":
                beta[3] = torch.tensor([0, 0, 0, 0, 1.0, 0, 0, 0])
                if zeroed == ("normal", 5, 2):
                    beta[5, 2] = 0
            else:
                beta[7] = 0
                if zeroed == ("reduce", 5, None):
                    beta[5] = 0
            s0, s1 = s1, cell(s0, s1, beta)
        logits = plain.classifier(s1.mean((2, 3)))
        decisions.zeroed = zeroed
        assert torch.equal(net(images), logits)
        expected = 100 * (logits.argmax(1) == labels).double().mean().item()
        assert baselines.accuracy_without(net, decisions, zeroed, [(images, labels)], no_autocast, lambda: None) == pytest.approx(expected)
        assert decisions.zeroed is None
    F.cross_entropy(net(images), labels).backward()
    assert net.alpha_normal.grad[3].abs().sum() == 0 < net.alpha_normal.grad[4].abs().sum()


def test_inputs_and_operations_are_decided_by_accuracy():
    decisions = baselines.Decisions(tiny_net("s3")[0])
    without = {("normal", EDGES.index((i, 5)), None): accuracy for i, accuracy in enumerate((50, 70, 70, 60, 40))}
    record = baselines.decide_inputs(SPACES["s3"], "normal", 5, decisions, without.get)
    assert record["kept"] == [0, 4] and record["accuracies"][0] == {0: 50, 1: 70, 2: 70, 3: 60, 4: 40}
    assert list(record["accuracies"][1]) == [0, 1, 3, 4] and list(record["accuracies"][2]) == [0, 3, 4]  # 2 goes, then 1, then 3
    accuracies = {("reduce", 6, 0): 30, ("reduce", 6, 1): 20, ("reduce", 6, 2): 20}
    assert baselines.decide_operation(SPACES["s3"], "reduce", 6, decisions, accuracies.get)["kept"] == "skip_connect"
    assert baselines.decide_operation(SPACES["s3"], "reduce", 6, decisions, lambda zeroed: zeroed[2])["kept"] == "none"
    full = baselines.decide_operation(SPACES["darts"], "reduce", 6, baselines.Decisions(tiny_net()[0]), lambda zeroed: zeroed[2])
    assert full["kept"] == "max_pool_3x3" and len(full["accuracies"]) == 7                # DARTS+PT has no `none` there
    decisions.normal[:9], decisions.reduce[:] = torch.eye(3)[2], torch.eye(3)[0]                          # `none` everywhere
    decisions.normal[EDGES.index((0, 5))] = decisions.normal[EDGES.index((4, 5))] = torch.eye(3)[1]
    cell = baselines.decided_genotype(SPACES["s3"], decisions)
    assert cell.normal[3] == (("skip_connect", 0), ("skip_connect", 4)) and cell.normal[0] == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    assert {name for node in cell.reduce for name, _ in node} == {"skip_connect"}
    assert baselines.same_choices(cell, cell) == len({(j, *pair) for j, node in enumerate(cell.normal) for pair in node}) + \
        len({(j, *pair) for j, node in enumerate(cell.reduce) for pair in node})
    rows, nodes = baselines.orders(SPACES["s3"], 2)["normal"]
    assert sorted(rows) == list(range(14)) and sorted(nodes) == [3, 4, 5] and baselines.orders(SPACES["s3"], 3)["normal"][0] != rows


@pytest.mark.parametrize("arguments, said", [
    (["nothing"], "there is no method nothing: choose one of second_order, es, ada, perturbation, r_darts"),
    (["es", "--max_decay", "1"], "unrecognized arguments: --max_decay 1"), (["second_order", "--window", "3"], "unrecognized"),
    (["perturbation"], "needs the folder of a finished search"), (["perturbation", "nothing"], "nothing/config.json cannot be read"),
    (["perturbation", "retrained"], "retrained is not a run of search.py"), (["perturbation", "es"], "es is a run of baselines.py"),
    (["perturbation", "unfinished"], "unfinished is an unfinished search"), (["es", "--resume", "run"], "run is not a run of baselines.py"),
    (["ada", "--resume", "es"], "invalid choice: 'es'"), (["ada", "--out", "es"], "es holds a finished run"),
    (["r_darts", "--out", "retrained"], "retrained holds something else"),
    (["r_darts", "--out", "unfinished"], "unfinished holds an unfinished run"), (["r_darts", "--out", "run/config.json"], "cannot write run/config.json/config.json"),
    (["r_darts", "--out", "foreign"], "foreign holds something else"), (["es", "--out", "r_darts"], "r_darts holds something else"),
    (["r_darts", "--out", "r_darts"], "r_darts holds an unfinished run: resume with"), (["r_darts", "--resume", "foreign"], "not a run of baselines.py"),
    (["r_darts", "--weight_decay", "1e-3"], "--weight_decay does not belong to r_darts"),
    (["ada", "--weight_decay", "0"], "cannot grow"), (["ada", "--weight_decay", "0.1"], "cannot grow: give one between 0 and --max_decay 0.03"), (["second_order", "--out", "retrained"], "holds something else"),
])
def test_bad_input_of_baselines_is_named(tmp_path, monkeypatch, finished, arguments, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    shutil.copytree(finished, "unfinished")
    (tmp_path / "unfinished" / "genotype.json").unlink()
    retrained(Path("retrained"), "VS_DARTS", 1.0)
    shutil.copytree(finished, "es")
    args = search.parse(["--out", "es"], baselines.searching("es"), "es")
    (tmp_path / "es" / "config.json").write_text(json.dumps({"program": "baselines.py", **vars(args)}))
    Path("foreign").mkdir()
    Path("foreign", "config.json").write_text('{"mine": 1}')
    shutil.copytree(finished, Path("r_darts", "weight_decay-0.0003"))
    (tmp_path / "r_darts" / "config.json").write_text((tmp_path / "es" / "config.json").read_text())
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(run.Exit, match=re.escape(said)) as error:
        baselines.main([*arguments, *(small_flags("--epochs", "1") if "--out" in arguments else [])])
    assert error.value.status == 2 and "\n" not in str(error.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_help_of_baselines_has_the_papers_rows(capsys):
    rows = {"second_order": ["test error (%) 2.76, GPU days 4.0"],
            "es": ["cifar10: test error (%) in S1 to S4 3.01, 3.26, 2.74, 3.71", "S4 28.37, 23.25, 23.73, 21.26", "S4 2.72, 2.60, 2.50, 2.51"],
            "ada": ["S4 3.10, 3.35, 2.59, 4.84", "S4 24.03, 23.52, 23.37, 23.20", "svhn: test error (%) in S1 to S4 2.53, 2.54, 2.50, 2.46"],
            "perturbation": ["parameters (M) 3.0, test error (%) 2.61 ± 0.08, GPU days 0.8", "S4 3.50, 2.79, 2.49, 2.64"],
            "r_darts": ["test error (%) 2.95 ± 0.21, GPU days 1.6", "S4 2.78, 3.31, 2.51, 3.56"]}
    for method in baselines.METHODS:
        with pytest.raises(SystemExit):
            baselines.main([method, "--help"])
        shown = capsys.readouterr().out
        assert all(row in shown for row in rows[method]), shown


def test_tables_read_baselines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    searched(Path("darts"), [3600], "--weight_decay", "3e-4")
    for method in ("es", "second_order"):
        searched(Path(method), [7200])
        args = search.parse(["--out", method], baselines.searching(method), method)
        Path(method, "config.json").write_text(json.dumps({"program": "baselines.py", **vars(args)}))
    searched(Path("pt"), [1800])
    Path("pt", "config.json").write_text(json.dumps({"program": "baselines.py", "method": "perturbation", "search": "darts"}))
    shutil.copytree("es", "r/weight_decay-0.0003")
    shutil.copytree("es", "r/weight_decay-0.0009")
    args = search.parse(["--out", "r"], baselines.searching("r_darts"), "r_darts")
    Path("r", "config.json").write_text(json.dumps({"program": "baselines.py", **vars(args)}))
    shutil.copy("es/genotype.json", "r/genotype.json")
    for name in ("es", "second_order", "pt", "r"):
        retrained(Path(f"t-{name}"), f"{name}/genotype.json", 3.0)
    figures.main(["table1", "t-es", "t-second_order", "t-pt", "t-r"])
    rows = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines()[2:]}
    for name, hours in (("DARTS-ES", "2.00 h"), ("DARTS, second order", "2.00 h"), ("DARTS+PT", "1.50 h"), ("R-DARTS", "4.00 h")):
        assert rows[name].endswith(f"| 3.00 (3.00) | 1.300 | {hours}, Tesla |"), rows[name]
    for name, flag, value in (("es", "window", 7), ("pt", "tune_epochs", 1)):             # no row mixes a method's own settings
        shutil.copytree(name, f"{name}2")
        config = json.loads(Path(name, "config.json").read_text())
        Path(f"{name}2", "config.json").write_text(json.dumps({**config, flag: value}))
        retrained(Path(f"t-{name}2"), f"{name}2/genotype.json", 3.0)
        with pytest.raises(run.Exit, match=f"{name}2 has --{flag} {value} and {name} "):
            figures.main(["table1", f"t-{name}", f"t-{name}2"])
    with pytest.raises(run.Exit, match=re.escape("pt is no single search (perturbation)")):
        figures.read_searches(SimpleNamespace(runs=["pt"], data=None, device=None), nets=False)


# ---------------------------------------------------------------- several processes

def joined(rank, world, port, path, work):
    """One process of several: saves what work(rank, world) returns."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert retrain.join() == (rank, world)
    torch.save(work(rank, world), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def in_processes(path, work, world=2):
    mp.spawn(joined, (world, str(20000 + os.getpid() % 20000), str(path), work), nprocs=world)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(world)]


def one_step(rank, world):
    torch.manual_seed(0)
    net = Network(PUBLISHED["VS_DARTS"].genotype, 4, 3, 10).eval()                       # eval: batch norm sees no batch
    split = data.load("digits", "unused", train=True).part(0, 60)
    images, labels = next(data.Batches(split, 24, 0, rank=rank, world=world).epoch(0))
    args = SimpleNamespace(label_smooth=0.1, auxiliary_weight=0.0, grad_clip=1e9)
    model = torch.nn.parallel.DistributedDataParallel(net, static_graph=True) if world > 1 else net
    retrain.train_step(model, torch.optim.SGD(net.parameters(), 0.0), images, labels, args, no_autocast)
    test = data.load("digits", "unused", train=False).part(0, 35)
    totals = retrain.evaluate(net, lambda: data.test_batches(test, 8, rank, world), torch.device("cpu"), no_autocast)
    if world > 1:
        dist.all_reduce(totals)
    return {"gradients": [p.grad for p in net.parameters()], "score": run.means(totals)}


def test_two_processes_have_the_gradients_and_metrics_of_one(tmp_path):
    alone = one_step(0, 1)
    for both in in_processes(tmp_path, one_step):
        assert both["score"] == pytest.approx(alone["score"], abs=1e-4)
        for a, b in zip(both["gradients"], alone["gradients"]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def train_amoebanet(rank, world):
    return train_together(PUBLISHED["AmoebaNet_A"].genotype, rank, world)                # not all nodes are in its output


def train_with_unused_node(rank, world):
    convs = ((("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),) * 2
    return train_together(Genotype(convs, (2,), convs, (2,)), rank, world)               # nothing uses node 3


def train_together(genotype, rank, world):
    """Three steps in training mode with drop-path."""
    torch.manual_seed(0)
    net = Network(genotype, 2, 3, 10)
    model = torch.nn.parallel.DistributedDataParallel(net, static_graph=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    args = SimpleNamespace(label_smooth=0.0, auxiliary_weight=0.0, grad_clip=5.0)
    batches = data.Batches(data.load("digits", "unused", train=True).part(0, 64), 16, 0, rank=rank, world=world)
    torch.manual_seed(rank)
    for step, (images, labels) in enumerate(batches.epoch(0)):
        net.drop_path_prob = 0.1 * step                                                  # none in the first step, as in a run
        retrain.train_step(model, optimizer, images, labels, args, no_autocast)
    return {"weights": list(net.parameters()), "used": [p.grad is not None and bool(p.grad.any()) for p in net.parameters()],
            "drawn": torch.rand(3)}


@pytest.mark.parametrize("work, all_used", [(train_amoebanet, True), (train_with_unused_node, False)])
def test_processes_stay_equal_in_training_with_drop_path_and_unused_nodes(tmp_path, work, all_used):
    first, second = in_processes(tmp_path, work)
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert first["used"] == second["used"] and all(first["used"]) == all_used and any(first["used"])
    assert not torch.equal(first["drawn"], second["drawn"])                              # their drop-path differed


def fail_in_one(rank, world):
    def work():
        if rank == 1:
            raise run.Exit("only process 1 knows", 2)
        return rank
    said = []
    for attempt in (work, lambda: (_ for _ in ()).throw(run.Exit("all know", 1)), lambda: "fine"):
        try:
            said.append(retrain.together(attempt))
        except run.Exit as error:
            said.append((str(error), error.status))
    return said


def test_all_processes_leave_if_one_fails_and_the_one_that_knows_says_it(tmp_path):
    assert in_processes(tmp_path, fail_in_one) == [[("", 2), ("all know", 1), "fine"],
                                                   [("only process 1 knows", 2), ("", 1), "fine"]]


def test_each_process_opens_its_own_gpu_first(monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(("set_device", device)))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: touched.append(("zeros", device)) or zeros(*size))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run.find_device(None) == torch.device("cuda", 3)
    assert touched == [("set_device", torch.device("cuda", 3)), ("zeros", torch.device("cuda", 3))]


def test_memory_format_is_chosen_in_one_place():
    for device, amp, expected in (("cpu", False, torch.channels_last), ("cpu", True, torch.channels_last),
                                  ("cuda", True, torch.channels_last), ("cuda", False, torch.contiguous_format),
                                  ("mps", False, torch.contiguous_format)):
        assert run.precision(amp, torch.device(device))[1] == expected
    split = data.load("digits", "unused", train=True)
    for layout in (torch.channels_last, torch.contiguous_format):
        moved = split.to("cpu", layout)
        for images, _ in (next(data.Batches(moved, 8, 0).epoch(0)), next(data.test_batches(moved, 8))):
            assert images.is_contiguous(memory_format=layout)


def test_resume_advice_fits_how_the_run_was_started(monkeypatch):
    args = SimpleNamespace(out="runs/a b")
    assert retrain.how_to_resume(args, 1) == "`python retrain.py --resume 'runs/a b'`"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert retrain.how_to_resume(args, 2) == "`torchrun --nproc_per_node=2 retrain.py --resume 'runs/a b'`"
    assert "on every machine" in retrain.how_to_resume(args, 4)                          # rendezvous and node rank stay as they were


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_a_stopped_two_process_run_goes_on_to_the_same_end(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert program("retrain.py", *RETRAINED, "--out", whole, launcher=TORCHRUN)[2] == 0
    stopped = program("retrain.py", *RETRAINED, "--out", out, wait=False, launcher=TORCHRUN)
    _, errors, _ = kill_after_an_epoch(stopped, out, signal.SIGTERM)
    assert not (out / "result.json").exists()
    assert errors.count(f"resume with `torchrun --nproc_per_node=2 retrain.py --resume {out}`") == 1
    assert program("retrain.py", "--resume", out, launcher=TORCHRUN)[2] == 0
    assert_same_runs(out, whole)
    assert json.loads((out / "result.json").read_text())["processes"] == 2


def test_imagenet_by_torchrun_to_a_tested_network(tmp_path):
    make_folder(tmp_path / "images", size=64)
    shown, errors, status = program(
        "retrain.py", "--genotype", "VS_DARTS", "--dataset", "imagenet", "--data", tmp_path / "images", "--layers", "3",
        "--init_channels", "4", "--batch_size", "8", "--epochs", "2", "--workers", "1", "--out", tmp_path / "run",
        launcher=TORCHRUN)
    assert status == 0, errors
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["processes"] == 2 and result["test_error_top5"] == 0             # of 2 classes
    assert [record["lr"] for record in lines_of(tmp_path / "run")] == pytest.approx([0.1, 0.097])
    shown, errors, status = program("retrain.py", "--evaluate", tmp_path / "run/weights.pt")
    assert status == 0 and f"test error {result['test_error']:.2f}%" in shown


def test_a_process_whose_data_fail_says_so_and_all_leave(tmp_path):
    arguments = ["--genotype", "VS_DARTS", "--dataset", "imagenet", "--image_size", "64", "--layers", "3", "--init_channels", "4",
                 "--batch_size", "4", "--epochs", "1", "--workers", "1", "--out", tmp_path / "run"]
    shown, errors, status = program("retrain.py", *arguments, "--data", tmp_path / "nowhere", launcher=TORCHRUN)
    assert status != 0 and errors.count("nowhere is no image folder") == 1, errors       # both know, one says it
    assert "retrain.py\", line" not in errors and not (tmp_path / "run").exists()
    make_folder(tmp_path / "images", size=64, count=4)
    (tmp_path / "images/train/dark/0.png").write_bytes(b"no picture")                    # in the batch of one of them
    shown, errors, status = program("retrain.py", *arguments, "--data", tmp_path / "images", launcher=TORCHRUN)
    assert status != 0 and errors.count("retrain.py: an image cannot be read") == 1, errors
    assert "retrain.py\", line" not in errors and not (tmp_path / "run/checkpoint.pt").exists()


def test_workers_stay_silent_when_a_terminal_interrupts_the_group(tmp_path):
    make_folder(tmp_path / "images", size=64, count=40)
    process = program("retrain.py", "--genotype", "VS_DARTS", "--dataset", "imagenet", "--data", tmp_path / "images",
                      "--image_size", "64", "--layers", "3", "--init_channels", "4", "--batch_size", "4", "--epochs", "90",
                      "--workers", "2", "--out", tmp_path / "run", wait=False)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")                  # on Linux: wait for workers at work
    while not (tmp_path / "run/checkpoint.pt").exists() or (children.exists() and len(children.read_text().split()) < 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors and len(errors.splitlines()) == 3, errors
    assert "interrupted (SIGINT) after" in errors


def test_amp_is_executed(tmp_path):
    search.main([*SMALL, "--space", "s2", "--node_norm", "--sqrt_beta", "--epochs", "1", "--amp", "--out", str(tmp_path / "s")])
    retrain.main([*RETRAINED[:-4], "--epochs", "1", "--batch_size", "256", "--amp", "--out", str(tmp_path / "r")])
    seen, net = [], SuperNet(SPACES["s2"], 2, 3)
    net.classifier.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    for amp in (False, True):
        search.loss_of(net, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), run.precision(amp, torch.device("cpu"))[0])
    assert seen == [torch.float32, torch.bfloat16]


# ---------------------------------------------------------------- with a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
@pytest.mark.parametrize("amp", [[], ["--amp"]])
def test_cuda_search_and_retraining_run_and_resume(tmp_path, monkeypatch, amp):
    for stage, arguments in ((search, [*SMALL, "--space", "s2", "--node_norm", "--larc", "--sqrt_beta"]),
                             (retrain, RETRAINED[:-4])):
        out = tmp_path / stage.__name__
        save = torch.save

        def interrupted(state, file):                                                    # in the write of the first epoch
            run.note_signal(signal.SIGTERM, None)
            save(state, file)
        with monkeypatch.context() as patch, pytest.raises(run.Exit, match="after 1 finished epoch"):
            patch.setattr(torch, "save", interrupted)
            stage.main([*arguments, *amp, "--epochs", "2", "--device", "cuda", "--out", str(out)])
        monkeypatch.setattr(run, "stop", None)
        stage.main(["--resume", str(out), "--device", "cuda"])
        assert (out / ("genotype.json" if stage is search else "result.json")).exists() and len(lines_of(out)) == 2


@cuda
def test_cuda_gradients_equal_the_cpus():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 4, 3, 10, True, True), torch.randn(8, 3, 16, 16), torch.arange(8)
    copy = SuperNet(SPACES["darts"], 4, 3, 10, True, True)
    copy.load_state_dict(net.state_dict())
    copy.to("cuda")
    for parameters in ("alphas", "weights"):
        for each, device in ((net, "cpu"), (copy, "cuda")):
            autocast, layout = run.precision(False, torch.device(device))
            loss, _ = search.loss_of(each, images.to(device).contiguous(memory_format=layout), labels.to(device), autocast)
            loss.backward(inputs=getattr(each, parameters))
        for a, b in zip(getattr(net, parameters), getattr(copy, parameters)):
            torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- the README

README = (HERE / "README.md").read_text()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    table = re.findall(r"\| `(python [^`]+)` \|", README)
    quoted = re.findall(r"^\$ (.+)$", README, re.M)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + table + quoted


def test_readme_commands_are_ones_the_programs_take():
    parsers = {"search.py": search.make_parser(), "retrain.py": retrain.make_parser(), "figures.py": figures.make_parser()}
    seen = set()
    for command in readme_commands():
        script, *arguments = command.removeprefix("torchrun --nproc_per_node=8 ").removeprefix("python ").split()
        if script == "baselines.py":
            method = arguments.pop(0)
            parsers[script] = baselines.perturbing() if method == "perturbation" else baselines.searching(method)
        if script in parsers:
            parsers[script].parse_args(arguments)
            seen.add(script)
    assert seen == parsers.keys()


def test_readme_python_blocks_run(tmp_path, monkeypatch, whole_retraining):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    folder = re.search(r'folder = "(.*?)"', README)[1]
    retrain.main(["--genotype", "VS_DARTS", "--dataset", "digits", "--epochs", "1", "--batch_size", "512", "--limit", "512",
                  "--out", folder])
    names = {"torch": torch, "weights": [torch.zeros(2, requires_grad=True)], "__name__": "README"}
    for block in blocks:
        exec(block, names)
    assert names["x_j"].shape == (8, 16, 32, 32) and names["logits"].shape == (5, 10) and len(blocks) == 4
    assert abs(names["x_j"].var() - 1) < 0.01


def test_pieces_can_be_taken_out_with_torch_alone(tmp_path):
    """As the README says: larc.py whole, and model.py from ReLUFirst to the end of MixedOp."""
    source = (HERE / "model.py").read_text()
    piece = source[source.index("class ReLUFirst"):source.index("# ------", source.index("class MixedOp"))]
    code = ("import sys\nsys.modules['numpy'] = sys.modules['torchvision'] = None\n"
            "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n" + piece +
            "mixed = MixedOp(4, 2, ('none', 'max_pool_3x3', 'skip_connect', 'dil_conv_5x5'))\n"
            "alpha = torch.zeros(4, requires_grad=True)\n"
            "from larc import LARC\noptimizer = LARC([*mixed.parameters()], lr=0.1)\n"
            "mixed(torch.randn(2, 4, 8, 8), mixing_weights(alpha, True)).square().sum().backward()\n"
            "optimizer.step()\nassert alpha.grad.abs().sum() > 0\n")
    (tmp_path / "larc.py").write_text((HERE / "larc.py").read_text())
    (tmp_path / "taken.py").write_text(code)
    process = subprocess.run([sys.executable, "taken.py"], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr


def test_readme_try_it_runs_as_typed_but_for_fewer_epochs(tmp_path):
    for path in (*HERE.glob("*.py"), HERE / "digits.npz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    commands = re.search(r"<!-- try -->\n```bash\n(.*?)```", README, re.S)[1].splitlines()[1:]
    printed = []
    for command in commands:
        process = subprocess.run([sys.executable, *command.split()[1:], "--epochs", "1"], cwd=tmp_path, env=ENVIRONMENT,
                                 text=True, capture_output=True)
        assert process.returncode == 0, process.stderr
        printed.append(process.stdout.splitlines()[-1])
    assert printed[0] == commands[1] and printed[1].startswith("test error ")


def test_readme_map_is_true():
    source = Path(__file__).read_text()
    rows = re.search(r"\| paper \| code \| test \|\n.*?\n\n", README, re.S)[0].strip().splitlines()[2:]
    assert len(rows) > 8
    for row in rows:
        _, code, tests = (cell.strip() for cell in row[1:-1].split("|"))
        assert all(f"\ndef {name}(" in source for name in re.findall(r"`(test_\w+)`", tests))
        for quoted in re.findall(r"`([^`]+)`", code):
            file, _, name = quoted.rpartition(": ")
            file = current = file or current
            assert re.search(rf"^(def |class )?{name}\b", (HERE / file).read_text(), re.M), quoted
