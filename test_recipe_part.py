"""The recipe of the README, applied to a network as the forks of DARTS have it."""
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from larc import LARC, local_factors
from model import mixing_weights

README = (Path(__file__).parent / "README.md").read_text()

FORK = """
class Cell(nn.Module):                                      # DARTS's: a flat list of operations, counted by offset
    def __init__(self, C, steps):
        super().__init__()
        self.ops = nn.ModuleList(nn.Conv2d(C, C, 1, bias=False) for _ in range(2 + 3))
        CONSTRUCTOR

    def forward(self, s0, s1, weights):
        states, offset = [s0, s1], 0
        for i in range(2):
            s = sum(w[0] * h + w[1] * torch.tanh(self.ops[offset + j](h))
                    for j, (h, w) in enumerate(zip(states, weights[offset:])))
            offset += len(states)
            NODE
            states.append(s)
        return torch.cat(states[2:], 1)


class Net(nn.Module):
    def __init__(self, C=3, steps=2):
        super().__init__()
        self.cell, self.linear = Cell(C, steps), nn.Linear(2 * C, 4)
        self.alpha = torch.randn(5, 2, requires_grad=True)  # as in DARTS, no parameter of the network

    def forward(self, x):
        alpha = self.alpha
        SOFTMAX
        self.seen = weights
        return self.linear(self.cell(x, x, weights).mean((2, 3)))


def make_optimizer(weights_only, learning_rate, momentum, weight_decay):
    OPTIMIZER
    return optimizer


def second_order_gradient(net, train, valid, momentum_buffers, lr, momentum, weight_decay, epsilon=1e-3):
    ws = list(net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(train[0]), train[1]), ws)
    VIRTUAL
    before = [w.detach().clone() for w in ws]
    with torch.no_grad():
        for w, m, step in zip(ws, momentum_buffers, steps):
            w -= lr * (momentum * m + step)
    *vector, direct = torch.autograd.grad(F.cross_entropy(net(valid[0]), valid[1]), [*ws, net.alpha])
    HESSIAN
    length = torch.cat([v.flatten() for v in vector]).norm()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, old, v in zip(ws, before, vector):
                w.copy_(old + sign * epsilon / length * v)
        sides.append(torch.autograd.grad(F.cross_entropy(net(train[0]), train[1]), net.alpha)[0])
    with torch.no_grad():
        for w, old in zip(ws, before):
            w.copy_(old)
    return direct - lr * length * (sides[0] - sides[1]) / (2 * epsilon)
"""


@pytest.fixture
def fork(float64):
    block = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.S)[1]
    parts = [part.strip() for part in re.split(r"^#.*\n", block, flags=re.M)[1:]]
    source = FORK
    for name, part in zip(("CONSTRUCTOR", "NODE", "SOFTMAX", "OPTIMIZER", "VIRTUAL", "HESSIAN"), parts, strict=True):
        indent = re.search(rf"^( *){name}$", source, re.M)[1]
        source = source.replace(name, part.replace("\n", f"\n{indent}"))
    names = {"torch": torch, "nn": nn, "F": F, "mixing_weights": mixing_weights, "LARC": LARC,
             "local_factors": local_factors}
    exec(source, names)
    torch.manual_seed(0)
    return names


def test_the_recipe_turns_a_fork_into_vs_darts(fork):
    net, images, labels = fork["Net"](), torch.randn(8, 3, 4, 4), torch.randint(4, (8,))
    nodes = []
    net.cell.register_forward_hook(lambda *args: nodes.append(args[2]))
    loss = F.cross_entropy(net(images), labels)
    torch.testing.assert_close(nodes[0].var((0, 2, 3), unbiased=False), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(net.seen, torch.softmax(net.alpha, 1).sqrt())
    optimizer = fork["make_optimizer"](net.parameters(), learning_rate=0.025, momentum=0.9, weight_decay=0.0)
    before = [w.detach().clone() for w in net.parameters()]
    loss.backward()
    optimizer.step()
    for w, old in zip(net.parameters(), before):            # section 4.2: a step of lr |w|, whatever |g|
        assert (w - old).norm().item() == pytest.approx(0.025 * old.norm().item(), rel=1e-5)


def test_the_recipe_has_larcs_second_order(fork):
    """Its finite difference against the exact derivative through LARC's step, whose factors are constants."""
    net = fork["Net"]()
    train, valid = ((torch.randn(8, 3, 4, 4), torch.randint(4, (8,))) for _ in range(2))
    ws, lr, momentum, decay = list(net.parameters()), 0.1, 0.9, 5e-3
    buffers = [torch.randn_like(w) for w in ws]
    found = fork["second_order_gradient"](net, train, valid, buffers, lr, momentum, decay)
    grads = torch.autograd.grad(F.cross_entropy(net(train[0]), train[1]), ws, create_graph=True)
    moved = {}
    for (name, w), g, m in zip(net.named_parameters(), grads, buffers):
        factor = (w.norm() / (g.norm() + decay * w.norm() + 1e-8)).detach()
        moved[name] = w - lr * (momentum * m + factor * (g + decay * w))
    loss = F.cross_entropy(torch.func.functional_call(net, moved, (valid[0],)), valid[1])
    exact = torch.autograd.grad(loss, net.alpha)[0]
    first_order = torch.autograd.grad(F.cross_entropy(net(valid[0]), valid[1]), net.alpha)[0]
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)
    assert (first_order - exact).abs().max() > 1e-2 * exact.abs().max()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
