"""Tests: values and gradients against oracles written the slow, obvious way; no download, no GPU, nothing timed.

    python -m pytest -q
"""
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import save_image

import data
import genotypes
import retrain
import run
import search
from genotypes import EDGES, PUBLISHED, SPACES, Genotype
from larc import LARC
from model import (OPS, AfterReLU, AuxiliaryHead, Cell, FactorizedReduce, MixedOp, Network, SearchCell, SuperNet,
                   count_macs, count_parameters, drop_path, mixing_weights)

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--dataset", "digits", "--layers", "3", "--init_channels", "2", "--batch_size", "256"]
torch.set_num_threads(1)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
                  slow_norm(F.conv2d(F.relu(s0), p[f"{cell}.preprocess0.body.1.weight"])),
                  slow_norm(F.conv2d(F.relu(s1), p[f"{cell}.preprocess1.body.1.weight"]))]
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
    for alpha in net.alphas():
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


@pytest.mark.parametrize("stride", [1, 2])
def test_sharing_per_node_equals_every_edge_alone(float64, stride):
    torch.manual_seed(0)
    edges = {(0, 2): genotypes.DARTS_PRIMITIVES, (0, 3): genotypes.DARTS_PRIMITIVES}
    cell = SearchCell(edges, 4, 4, 4, stride == 2, False, node_norm=False)
    x, weights = torch.randn(2, 4, 8, 8), {edge: torch.rand(8, requires_grad=True) for edge in edges}
    got = cell(x, x, weights)
    nodes = []
    for (i, j), primitives in edges.items():
        alone = MixedOp(4, stride, primitives)
        alone.load_state_dict(cell.edges[f"{i}->{j}"].state_dict(), strict=False)       # all but the shared pools' statistics
        nodes.append(alone(cell.preprocess0(x), weights[i, j]))
    expected = torch.cat(nodes, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    inputs = [*weights.values(), cell.preprocess0.body[1].weight]
    for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_supernet_parameter_counts():
    counts = {name: sum(p.numel() for p in SuperNet(space).weights()) for name, space in SPACES.items()}
    assert counts == {"darts": 1930618, "s1": 405146, "s2": 665466, "s3": 665466, "s4": 624506}
    assert sum(p.numel() for p in SuperNet(SPACES["darts"], stem_multiplier=1).weights()) == 1928154
    assert sum(p.numel() for p in SuperNet(SPACES["s3"], num_classes=100).weights()) == 665466 + 23130


def test_alphas_and_weights_share_out_all_parameters():
    net = SuperNet(SPACES["s1"], 2, 3)
    alphas, weights = {id(p) for p in net.alphas()}, {id(p) for p in net.weights()}
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
            cell.normalize[str(j)].register_forward_hook(lambda *args, j=j: x_j.update({j: args[2]}))
        weights = dict(zip(edges, mixing_weights(torch.zeros(14, 8), switches["sqrt_beta"])))
        with torch.no_grad():
            cell(torch.randn(16, 16, 16, 16), torch.randn(16, 16, 16, 16), weights)
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
    cell = SearchCell({(0, 2): ("skip_connect",)}, 2, 2, 2, False, False, node_norm=True)
    weights = {(0, 2): torch.ones(1)}
    cell(torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4), weights)
    cell.eval()
    norm, x = cell.normalize["2"], torch.randn(1, 2, 4, 4)
    x_j = cell.preprocess0(x)
    expected = (x_j - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + 1e-5)
    torch.testing.assert_close(cell(x, x, weights), expected)


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
    weights = torch.optim.SGD(net.weights(), 0.1, momentum=0.9, weight_decay=5e-3)
    alphas = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    return (lambda: search.alpha_step(net, alphas, images, labels, no_autocast),
            lambda clip=5: search.weight_step(net, weights, images, labels, no_autocast, clip))


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def test_each_step_moves_its_own_parameters_only():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    alpha_step, weight_step = steps_of(net, images, labels)
    weights, alphas = copies(net.weights()), copies(net.alphas())
    alpha_step()
    assert all(map(torch.equal, weights, net.weights())) and not any(map(torch.equal, alphas, net.alphas()))
    assert all(p.grad is None for p in net.weights())
    alphas = copies(net.alphas())
    weight_step()
    assert all(map(torch.equal, alphas, net.alphas())) and not torch.equal(weights[0], net.weights()[0])
    alpha_step()
    assert all(p.grad is None for p in net.weights())                                    # the weight step's are gone


def test_weight_step_is_the_same_without_the_alpha_backward():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    other = SuperNet(SPACES["darts"], 2, 3)
    alpha_step, weight_step = steps_of(net, images, labels)
    alpha_step()
    other.load_state_dict(net.state_dict())
    weight_step()
    plain = torch.optim.SGD(other.weights(), 0.1, momentum=0.9, weight_decay=5e-3)
    F.cross_entropy(other(images), labels).backward()
    total = torch.sqrt(sum((p.grad ** 2).sum() for p in other.weights()))
    for p in other.weights():                                                            # clip 5, without the alphas
        p.grad *= min(1, 5 / (total + 1e-6))
    plain.step()
    for a, b in zip(net.weights(), other.weights()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_absent_operations_of_an_edge_stay_frozen():
    torch.manual_seed(0)
    ragged = {kind: {**edges, (0, 2): ("skip_connect",), (1, 2): ("none", "max_pool_3x3")}
              for kind, edges in SPACES["darts"].items()}
    net = SuperNet(ragged, 2, 3)
    alpha_step, _ = steps_of(net, torch.randn(4, 3, 8, 8), torch.arange(4))
    net.alpha_normal.data[2:] = 0.5                                                      # rows that Adam and decay do move
    for _ in range(3):
        alpha_step()
    assert torch.equal(net.alpha_normal[0, 1:], torch.zeros(7)) and torch.equal(net.alpha_normal[1, 2:], torch.zeros(6))
    assert (net.alpha_normal[2:] != 0.5).all()
    assert net.betas()["normal"][0].tolist() == [1] + [0] * 7
    assert search.derive(ragged, net.betas()).normal[0] in [(("skip_connect", 0), ("max_pool_3x3", 1))]


# ---------------------------------------------------------------- data

def counted_split(spec, size=8):
    pixels = torch.arange(size * size, dtype=torch.uint8).view(1, size, size, 1).expand(1, size, size, 3)
    return pixels, spec._replace(mean=(0.0,) * 3, std=(1 / 255,) * 3)                    # normalize() then changes nothing


def test_crop_and_flip_have_torchvisions_distribution():
    image, spec = counted_split(data.DATASETS["cifar10"])
    count = 162 * 100
    generator = torch.Generator().manual_seed(0)
    ours = data.augment(image.expand(count, -1, -1, -1), torch.rand(count, 5, generator=generator), spec)
    transform = v2.Compose([v2.RandomCrop(8, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.stack([transform(image[0].permute(2, 0, 1)) for _ in range(count)])
    histograms = []
    for batch in (ours, theirs):
        seen = {}
        for key in batch.round().to(torch.uint8).flatten(1).numpy():
            seen[key.tobytes()] = seen.get(key.tobytes(), 0) + 1
        histograms.append(seen)
        assert len(seen) == 162                                                          # 9 x 9 places, flipped or not
        assert sum((n - 100) ** 2 / 100 for n in seen.values()) < 240                    # chi-square, 161 degrees: p > 1e-4
    assert histograms[0].keys() == histograms[1].keys()


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
        config = {"label_smooth": 0.0, "auxiliary_weight": weight, "grad_clip": 5.0}
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        losses[weight] = retrain.train_step(net, optimizer, images, labels, config, no_autocast)[0].item()
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
    assert all(isinstance(o[j][k], AfterReLU) for j, k in ((0, 0), (0, 1), (3, 1))) and o[2][0].body[2].affine


# ---------------------------------------------------------------- schedules and metrics

def rates(config):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config["learning_rate"])
    scheduler, seen = retrain.make_scheduler(config, optimizer), []
    for _ in range(config["epochs"]):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules_equal_their_formulas():
    cosine = rates(retrain.all_flags({"genotype": "VS_DARTS"}))
    np.testing.assert_allclose(cosine, [0.025 * (1 + math.cos(math.pi * e / 600)) / 2 for e in range(600)], atol=1e-9)
    darts = rates(retrain.all_flags({"genotype": "VS_DARTS", "dataset": "imagenet"}))
    np.testing.assert_allclose(darts, [0.1 * 0.97 ** e for e in range(250)], rtol=1e-9)
    given = {"genotype": "VS_DARTS", "dataset": "imagenet", "lr_scheduler": "linear"}
    warm = [0.5 * (e + 1) / 5 for e in range(5)]
    linear = [0.5 * (245 - e) / 245 if e < 245 else 0.5 * (250 - e) / 1225 for e in range(250)]
    np.testing.assert_allclose(rates(retrain.all_flags(given)), warm + linear[5:], rtol=1e-9)
    small = rates(retrain.all_flags({**given, "batch_size": 256, "learning_rate": 0.5}))
    np.testing.assert_allclose(small, linear, rtol=1e-9)                                 # no warmup up to 256


def test_protocols():
    def some(given):
        config = retrain.all_flags({"genotype": "VS_DARTS", **given})
        return tuple(config[key] for key in ("epochs", "batch_size", "layers", "init_channels", "learning_rate",
                                             "weight_decay", "label_smooth", "drop_path_prob", "cutout_length"))
    assert some({}) == (600, 96, 20, 36, 0.025, 3e-4, 0.0, 0.2, 16)
    assert some({"dataset": "svhn"}) == some({"dataset": "cifar100"}) == (600, 96, 8, 16, 0.025, 3e-4, 0.0, 0.2, 16)
    assert some({"dataset": "imagenet"}) == (250, 128, 14, 48, 0.1, 3e-5, 0.1, 0.0, 0)
    assert some({"dataset": "imagenet", "lr_scheduler": "linear"}) == (250, 1024, 14, 48, 0.5, 3e-5, 0.1, 0.0, 0)
    assert some({"dataset": "imagenet", "lr_scheduler": "linear", "batch_size": 32})[1] == 32     # explicit flags win
    config = search.all_flags({})
    assert [config[key] for key in ("epochs", "batch_size", "layers", "init_channels", "learning_rate", "learning_rate_min",
                                    "weight_decay", "arch_learning_rate", "arch_weight_decay", "grad_clip", "momentum")] == [
        50, 64, 8, 16, 0.025, 0.001, 5e-3, 3e-4, 1e-3, 5.0, 0.9]


def test_hits_stop_at_the_number_of_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert run.hits(logits, torch.tensor([0, 0, 1])).tolist() == [1, 3]
    logits, labels = torch.randn(50, 20), torch.randint(20, (50,))
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels)]
    assert run.hits(logits, labels).tolist() == [sum(r < 1 for r in ranks), sum(r < 5 for r in ranks)]


def test_meter_names_the_step_whose_loss_is_not_finite():
    meter = run.Meter(5, "cpu")
    for step, loss in enumerate((1.0, 2.0, float("nan"), 1.0)):
        meter.add(step, torch.tensor(loss), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    assert meter.loss_so_far(7, 1) == 1.5
    with pytest.raises(run.Exit, match="epoch 7, step 2") as error:
        meter.loss_so_far(7, 3)
    assert error.value.status == 1


# ---------------------------------------------------------------- files

def test_checkpoints_are_safe_and_never_half_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run.save_checkpoint(path, {"epoch": 1, "w": torch.ones(2)})
    with pytest.raises(ValueError, match="tensors and plain values"):
        run.save_checkpoint(path, {"epoch": 2, "where": tmp_path, "x": np.float64(1)})
    assert run.load_checkpoint(path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]
    with pytest.raises(ZeroDivisionError):
        run.write_file(path, lambda file: (file.write(b"half"), 1 / 0))
    assert run.load_checkpoint(path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


# ---------------------------------------------------------------- search.py as a command

def lines_of(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def tensors_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
    monkeypatch.setattr(search, "load", lambda *args, **options: opened.append(options["train"]) or data.load(*args, **options))
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
    assert record["alpha_normal"] == net.alpha_normal.tolist()
    with pytest.raises(run.Exit, match="holds a finished run"):
        search.main([*SMALL, "--out", str(out)])
    assert genotypes.load(str(out / "genotype.json")) == written


def test_alpha_sees_one_stream_of_validation_batches(tmp_path, monkeypatch):
    seen, step = [], search.alpha_step
    monkeypatch.setattr(search, "alpha_step", lambda *args: seen.append(args[3]) or step(*args))
    search.main([*SMALL, "--space", "s2", "--epochs", "2", "--train_portion", "0.4", "--out", str(tmp_path / "run")])
    split = data.load("digits", "unused", train=True)
    rest = data.Batches(split.part(int(0.4 * 1437), None), 256, run.mix(2, 1))           # 4 batches an epoch; 3 steps
    assert rest.steps == 4 and len(seen) == 6
    assert all(torch.equal(labels, expected) for labels, (_, expected) in zip(seen, rest.range(0, 6)))


def test_default_rates_end_where_darts_ends():
    optimizer, _, scheduler = search.make_optimizers(SuperNet(SPACES["s2"], 1, 3), search.all_flags({"larc": True}))
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
            "--train_portion", "0.4"]                       # S4's noise needs its generator; unequal halves a cycled stream


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
        assert status == 128 + number and errors.count("\n") == 1
        assert errors.strip().endswith(f"go on with: python search.py --resume {out}")
    (out / "log.jsonl").open("a").write('{"epoch": 99, "half a li')                      # a line of an unfinished epoch
    with pytest.raises(run.Exit, match="holds an unfinished run: go on with `python search.py --resume"):
        search.main([*SEARCHED, "--out", str(out)])
    assert program("search.py", "--resume", out)[2] == 0
    assert_same_runs(out, whole_search)
    assert (out / "genotype.json").read_bytes() == (whole_search / "genotype.json").read_bytes()


def test_a_diverged_search_ends_early_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    out, calls = tmp_path / "run", itertools.count()
    step = search.weight_step

    def poisoned(*args):
        loss, logits = step(*args)
        return (loss * float("nan") if next(calls) == 4 else loss), logits               # 3 steps an epoch
    monkeypatch.setattr(search, "weight_step", poisoned)
    with pytest.raises(run.Exit, match="not finite in epoch 1, step 1") as error:
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
    assert error.value.status == 1 and sorted(os.listdir(out)) == ["config.json", "log.jsonl"]
    assert (out / "log.jsonl").read_text() == ""


def test_a_signal_waits_for_the_end_of_a_write(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGTERM, run.Signals.catch)

    def write(file):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        file.write(b"whole")
    try:
        with pytest.raises(run.Interrupted, match="SIGTERM"):
            run.write_file(tmp_path / "file", write)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"whole"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name in ("config.json", "log.jsonl"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text('{"mine": 1}')
        with pytest.raises(run.Exit, match="holds something else"):
            search.main([*SMALL, "--out", str(out)])
        assert (out / name).read_text() == '{"mine": 1}' and os.listdir(out) == [name]
    (tmp_path / "config-json/config.json").write_text('{"program": "search.py", "epochs": "x"}')
    with pytest.raises(run.Exit, match="config.json: argument --epochs: it must be a whole number"):
        search.main(["--resume", str(tmp_path / "config-json")])


BAD = [  # arguments of search.py, and what its one line says
    (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    (["--epochs", "0"], "--epochs: it must be a whole number from 1, not '0'"),
    (["--train_portion", "1.5"], "from 0 to 1|above 0 to 1"),
    (["--learning_rate", "nan"], "must be a number"),
    (["--layers", "2"], "from 3"),
    (["--init_channels", "-4"], "from 1"),
    (["--batch_size", "1"], "from 2"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--larc_trust", "0"], "above 0"),
    (["--dataset", "digits", "--train_portion", "0.0001"], "leaves a part without"),
    (["--dataset", "digits", "--learning_rate", "0.0001"], "--learning_rate_min 0.001 is above"),
    (["--dataset", "digits", "--device", "cuda"], "--device cuda cannot be used here"),
    (["--dataset", "digits", "--device", "warp"], "--device warp cannot be used here"),
    (["--dataset", "digits", "--out", "/proc/nowhere/run"], "cannot write in /proc/nowhere/run"),
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


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


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
    run.save_checkpoint(out / "checkpoint.pt", {"epoch": 1})
    with pytest.raises(run.Exit, match="it lacks net"):
        search.main(["--resume", str(out)])
    run.save_checkpoint(out / "checkpoint.pt", {key: {"x": torch.ones(1)} if key != "epoch" else 1 for key in
                                                ("epoch", "net", "w_optimizer", "alpha_optimizer", "scheduler")})
    with pytest.raises(run.Exit, match="does not fit this network"):
        search.main(["--resume", str(out)])


# ---------------------------------------------------------------- retrain.py as a command

RETRAINED = ["--genotype", "VS_DARTS", "--dataset", "digits", "--layers", "3", "--init_channels", "2", "--epochs", "4",
             "--batch_size", "96"]


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
    assert result["seed"] == 0 and result["torch"] == torch.__version__ and "--cutout_length 2" in result["command"]
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
    probabilities, scores, step = [], iter([(0, 50.0, 90.0), (0, 80.0, 95.0), (0, 70.0, 96.0), (0, 75.0, 94.0)]), retrain.train_step
    monkeypatch.setattr(retrain, "evaluate", lambda *args: next(scores))
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
    assert number == signal.SIGKILL or errors.strip().endswith(f"python retrain.py --resume {out}")
    assert not (out / "result.json").exists()
    assert program("retrain.py", "--resume", out)[2] == 0
    assert_same_runs(out, whole_retraining)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, whole_retraining)]
    assert {**results[0], "command": ""} == {**results[1], "command": ""}
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
        with pytest.raises(run.Exit, match="is no checkpoint of this program|holds no network of this program"):
            retrain.main(["--evaluate", str(whole_retraining / "other.pt")])
    (whole_retraining / "other.pt").unlink()


def test_evaluation_builds_no_graph():
    net, seen = tiny_network(), []
    net.classifier.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    split = data.load("digits", "unused", train=False)
    alone = retrain.Processes("cpu")
    retrain.evaluate(net, lambda: data.test_batches(split, 100), torch.device("cpu"), alone, no_autocast)
    supernet = SuperNet(SPACES["s2"], 2, 3)
    supernet.classifier.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    search.evaluate(supernet, data.Batches(split, 100, 0), 0, no_autocast)
    assert len(seen) == 8 and not any(seen) and not net.training


def test_the_search_prints_a_command_that_fits_its_images(tmp_path):
    config = retrain.all_flags({"genotype": "VS_DARTS", "dataset": "folder", "image_size": 40})
    assert config["auxiliary_weight"] == 0 and retrain.all_flags({"dataset": "folder"})["auxiliary_weight"] == 0.4
    make_folder(tmp_path / "images")
    printed = program("search.py", "--dataset", "folder", "--data", tmp_path / "images", "--image_size", "40", *SMALL[2:],
                      "--space", "s2", "--epochs", "1", "--out", tmp_path / "run")[0].splitlines()[-1]
    out, errors, status = program(*printed.split()[1:], "--epochs", "1", "--layers", "3", "--init_channels", "2", "--out",
                                  tmp_path / "again")
    assert status == 0, errors


def test_several_seeds_are_all_reported_and_resumable(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*RETRAINED[:-4], "--epochs", "1", "--batch_size", "512", "--seeds", "0", "1", "2", "--out", str(out)]
    retrain.main(arguments)
    result = json.loads((out / "result.json").read_text())
    errors = [json.loads((out / f"seed-{seed}/result.json").read_text())["test_error"] for seed in (0, 1, 2)]
    assert [each["test_error"] for each in result["runs"]] == errors and len(set(errors)) > 1
    assert result["mean_test_error"] == pytest.approx(np.mean(errors))
    assert result["std_test_error (sample)"] == pytest.approx(np.std(errors, ddof=1))
    for path in (out / "result.json", out / "seed-1/result.json", out / "seed-1/checkpoint.pt", out / "seed-2/result.json"):
        path.unlink()                                                                    # as if killed in the second run
    with pytest.raises(run.Exit, match="holds something else"):                          # other settings do not join in
        retrain.main(["--genotype", "DARTS_V1", *arguments[2:]])
    with pytest.raises(run.Exit, match="seed-0 holds a finished run"):
        retrain.main(arguments)
    retrain.main(["--resume", str(out)])
    again = json.loads((out / "result.json").read_text())
    assert [each["test_error"] for each in again["runs"]] == errors
    assert f"over seeds [0, 1, 2]: {', '.join(f'{error:.2f}' for error in errors)}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    ([], "--genotype is needed"),
    (["--genotype", "VS_DART"], "VS_DART is no published cell"),
    (["--genotype", "VS_DARTS", "--dataset", "digits", "--auxiliary_weight", "0.4"], "fits 8x8 feature maps"),
    (["--genotype", "VS_DARTS", "--dataset", "imagenet", "--data", "nowhere"], "nowhere is no image folder"),
    (["--genotype", "VS_DARTS", "--drop_path_prob", "1"], "from 0 to 0.99"),
    (["--genotype", "VS_DARTS", "--dataset", "imagenet", "--lr_scheduler", "linear", "--epochs", "5"], "needs --epochs 6"),
    (["--genotype", "VS_DARTS", "--seeds", "1", "1"], "each once"),
    (["--evaluate", "x", "--resume", "x"], "give one"),
    (["--evaluate", ""], "config.json cannot be read"),
    (["--evaluate", "nowhere/weights.pt"], "nowhere/config.json cannot be read"),
])
def test_bad_input_of_retraining_is_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run.Exit, match=said) as error:
        retrain.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value)


# ---------------------------------------------------------------- several processes

def joined(rank, world, port, path):
    """One process of two: its share of a step and of a test, as retrain.py does them; rank 0 saves what came out."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.save(one_step(rank, world), f"{path}/{world}-{rank}.pt")


def one_step(rank, world):
    processes = retrain.Processes("cpu")
    torch.manual_seed(0)
    net = Network(PUBLISHED["VS_DARTS"].genotype, 4, 3, 10).eval()                       # eval: batch norm sees no batch
    split = data.load("digits", "unused", train=True).part(0, 60)
    images, labels = next(data.Batches(split, 24, 0, rank=rank, world=world).epoch(0))
    config = {"label_smooth": 0.1, "auxiliary_weight": 0.0, "grad_clip": 1e9}
    retrain.train_step(processes.wrap(net), torch.optim.SGD(net.parameters(), 0.0), images, labels, config, no_autocast)
    test = data.load("digits", "unused", train=False).part(0, 35)
    score = retrain.evaluate(net, lambda: data.test_batches(test, 8, rank, world), torch.device("cpu"), processes, no_autocast)
    processes.leave()
    return {"gradients": [p.grad for p in net.parameters()], "score": score}


def test_two_processes_have_the_gradients_and_metrics_of_one(tmp_path):
    port = str(20000 + os.getpid() % 20000)
    mp.spawn(joined, (2, port, str(tmp_path)), nprocs=2)
    alone = one_step(0, 1)
    for rank in (0, 1):
        both = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        assert both["score"] == pytest.approx(alone["score"], abs=1e-4)
        for a, b in zip(both["gradients"], alone["gradients"]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def read_together(rank, world, port, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = retrain.Processes("cpu")
    split = processes.in_turn(lambda: data.load("fashion_mnist", path, train=True))
    assert len(split.labels) == 40
    processes.leave()


def test_processes_unpack_in_turn(tmp_path):
    make_fashion_mnist(tmp_path)
    mp.spawn(read_together, (2, str(20001 + os.getpid() % 20000), str(tmp_path)), nprocs=2)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_a_stopped_two_process_run_goes_on_to_the_same_end(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert program("retrain.py", *RETRAINED, "--out", whole, launcher=TORCHRUN)[2] == 0
    stopped = program("retrain.py", *RETRAINED, "--out", out, wait=False, launcher=TORCHRUN)
    _, errors, _ = kill_after_an_epoch(stopped, out, signal.SIGTERM)
    assert not (out / "result.json").exists()
    assert errors.count(f"go on with: torchrun --nproc_per_node=2 retrain.py --resume {out}") == 1
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


# ---------------------------------------------------------------- the README

README = (HERE / "README.md").read_text()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    table = re.findall(r"\| `(python [^`]+)` \|", README)
    quoted = re.findall(r"^\$ (.+)$", README, re.M)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + table + quoted


def test_readme_commands_are_ones_the_programs_take():
    parsers = {"search.py": search.make_parser(), "retrain.py": retrain.make_parser()}
    seen = set()
    for command in readme_commands():
        script, *arguments = command.removeprefix("torchrun --nproc_per_node=8 ").removeprefix("python ").split()
        if script in parsers:
            parsers[script].parse_args(arguments)
            seen.add(script)
    assert seen == parsers.keys()
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(block, "README.md", "exec")


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
