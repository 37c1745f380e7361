"""The paper's mixed operation, cell and super-network; the derived network; DARTS's operations.

Sections 2.2 (Eq. 1), 4.1 (Eq. 3) and 4.3 (Eq. 6). Whatever the paper leaves to DARTS follows
quark0/darts, cnn/{operations,model_search,model}.py at commit f276dd3. Needs only torch.
"""
import contextlib
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---------------------------------------------------------------- mixed operation (2.2 and 4.3)

def mixing_weights(alpha, sqrt_beta=False):
    """beta = softmax(alpha) over the last dimension, Eq. 1, or with `sqrt_beta` its root, Eq. 6.

    The root is taken in the logarithm: sqrt(softmax(alpha)) itself has a NaN gradient once a beta
    underflows.
    """
    if sqrt_beta:
        return torch.exp(0.5 * F.log_softmax(alpha, dim=-1))  # Eq. 6
    return F.softmax(alpha, dim=-1)                           # Eq. 1


class MixedOp(nn.Module):
    """The mixed operation on an edge, Eq. 1: the sum over o of beta_o * o(x).

    x: (B, C, H, W). beta: (operations,), in the order of `primitives`; any other number raises
    ValueError. Returns (B, C, H/stride, W/stride), in beta's precision: bfloat16 could not tell a
    beta of 0.1253 from 0.125. As in DARTS, batch norms have no affine part; each pool has one.
    """

    def __init__(self, C, stride, primitives):
        super().__init__()
        self.primitives, self.stride, self.ops = primitives, stride, nn.ModuleDict()
        for name in primitives:
            if name != "none":                              # it has its beta, but adds zeros
                op = OPS[name](C, stride, affine=False)
                if "pool" in name:
                    op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
                self.ops[name] = op

    def forward(self, x, beta):
        x_relu = F.relu(x)                                  # most operations begin with it
        mixed = torch.zeros_like(x[:, :, ::self.stride, ::self.stride], dtype=beta.dtype)
        for name, beta_o in zip(self.primitives, beta, strict=True):
            if name != "none":
                op = self.ops[name]
                y = op.body(x_relu) if isinstance(op, ReLUFirst) else op(x)
                mixed.addcmul_(y, beta_o)                   # Eq. 1: mixed += beta_o * o(x)
        return mixed


# ---------------------------------------------------------------- super-network (2.2 and 4.1)

class SearchCell(nn.Module):
    """A cell of the super-network. Nodes 0 and 1 are its inputs; each later node sums its edges.

    edges: {(i, j): primitives} for every i < j, as in `genotypes.SPACES`.
    """

    def __init__(self, edges, C_prev_prev, C_prev, C, reduction, reduction_prev, node_norm):
        super().__init__()
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev, affine=False)
        self.preprocess1 = preprocess(C_prev, C, False, affine=False)
        self.make_edges(edges, C, reduction, node_norm)

    def make_edges(self, edges, C, reduction, node_norm):
        self.edges = nn.ModuleDict({
            f"{i}-{j}": MixedOp(C, 2 if reduction and i < 2 else 1, primitives)
            for (i, j), primitives in edges.items()})
        self.normalize = nn.ModuleList(
            nn.BatchNorm2d(C, affine=False) if node_norm else nn.Identity()
            for node in {j for _, j in edges})

    def forward(self, s0, s1, beta):
        """s0, s1: outputs of the two cells before. beta: (edges, operations), in the edges' order.

        Returns the later nodes, concatenated: (B, 4 C, H, W), in a reduction (B, 4 C, H/2, W/2).
        """
        return torch.cat(self.nodes([self.preprocess0(s0), self.preprocess1(s1)], beta)[2:], dim=1)

    def nodes(self, states, beta):
        """Every node's output, (B, C, H, W) each. states: the outputs of the input nodes."""
        beta = dict(zip(self.edges, beta, strict=True))
        for normalize in self.normalize:
            j = len(states)
            x_j = sum(self.edges[f"{i}-{j}"](states[i], beta[f"{i}-{j}"]) for i in range(j))
            states = [*states, normalize(x_j)]              # Eq. 3: (x_j - mu) / sigma, per channel
        return states


class SuperNet(nn.Module):
    """The super-network, (B, 3, H, W) -> logits (B, num_classes). H, W: 8 or more, odd or even.

    space: {"normal": edges, "reduce": edges}, as for SearchCell, the same number of operations.
    node_norm: Eq. 3. sqrt_beta: Eq. 6. imagenet: the two stems of the derived network's ImageNet
    form, as in model_search_imagenet.py of nabk89/NAS-with-Proxy-data.
    """
    autocast = contextlib.nullcontext()                     # `place` sets it for bfloat16

    def __init__(self, space, C=16, layers=8, num_classes=10, node_norm=False, sqrt_beta=False,
                 stem_multiplier=3, imagenet=False):
        super().__init__()
        self.space, self.sqrt_beta = space, sqrt_beta
        C_prev_prev = C_prev = stem_multiplier * C
        self.stem0, self.stem1 = make_stems(C_prev, imagenet)
        self.cells, self.cell_types, reduction_prev = nn.ModuleList(), [], imagenet
        for layer in range(layers):
            reduction = layer in reductions(layers)
            C = 2 * C if reduction else C
            cell_type = "reduce" if reduction else "normal"
            self.cells.append(SearchCell(space[cell_type], C_prev_prev, C_prev, C, reduction,
                                         reduction_prev, node_norm))
            C_prev_prev, C_prev = C_prev, C * len(self.cells[-1].normalize)
            reduction_prev = reduction
            self.cell_types.append(cell_type)
        self.classifier = nn.Linear(C_prev, num_classes)
        self.alphas = make_alphas(space)

    @property
    def weights(self):
        """w of Eq. 2: every parameter but the alphas."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas.")]

    @torch.no_grad()
    def betas(self):
        """{"normal" or "reduce": softmax(alpha), (edges, operations)}, for the derivation."""
        return {cell_type: mixing_weights(alpha) for cell_type, alpha in self.alphas.items()}

    def mixing_weights(self):
        """{cell type: (edges, operations)}: beta (Eq. 1) or its root (Eq. 6)."""
        return {cell_type: mixing_weights(alpha, self.sqrt_beta)
                for cell_type, alpha in self.alphas.items()}

    def forward(self, x):
        beta = self.mixing_weights()
        with self.autocast:
            x = self.features(x, beta)
        return self.classifier(x.to(self.classifier.weight.dtype))

    def features(self, x, beta):                            # (B, channels of the last cell)
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for cell_type, cell in zip(self.cell_types, self.cells):
            s0, s1 = s1, cell(s0, s1, beta[cell_type])
        return s1.mean((2, 3))


def make_alphas(space):
    """{cell type: (edges, operations)}, (14, 8) in DARTS's space, near 0 as in DARTS."""
    return nn.ParameterDict({
        cell_type: 1e-3 * torch.randn(len(edges), len(next(iter(edges.values()))))
        for cell_type, edges in space.items()})


def reductions(layers):
    """The cells that halve the size and double the channels: at one and two thirds of the depth."""
    return layers // 3, 2 * layers // 3


# ---------------------------------------------------------------- derived network (5.1)

class Cell(nn.Module):
    """A cell of the derived network. nodes: the inputs of each, (operation, source) pairs."""

    def __init__(self, nodes, concat, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev, affine=True)
        self.preprocess1 = preprocess(C_prev, C, False, affine=True)
        if isinstance(nodes[0][0], str):                    # DARTS's flat list: two inputs a node
            nodes = [nodes[k:k + 2] for k in range(0, len(nodes), 2)]
        self.nodes, self.concat, self.ops = nodes, concat, nn.ModuleList()
        for node in nodes:
            ops = [OPS[name](C, 2 if reduction and i < 2 else 1, affine=True) for name, i in node]
            self.ops.append(nn.ModuleList(ops))

    def forward(self, s0, s1, drop_path_prob):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node, ops in zip(self.nodes, self.ops):
            x_j = 0
            for (_, i), op in zip(node, ops):
                x = op(states[i])
                if self.training and drop_path_prob > 0 and not isinstance(op, nn.Identity):
                    x = drop_path(x, drop_path_prob)
                x_j = x_j + x
            states.append(x_j)
        return torch.cat([states[i] for i in self.concat], dim=1)


def drop_path(x, probability):
    """Zeroes samples of x (B, C, H, W) with `probability`; scales the others to the same mean."""
    keep = 1 - probability
    return x * torch.empty_like(x[:, :1, :1, :1]).bernoulli_(keep) / keep


class AuxiliaryHead(nn.Module):
    """A second classifier in mid-network, for training only.

    CIFAR form: for 8x8 feature maps (32x32 images). ImageNet form: for 7x7 (224x224 images), and
    without the last batch norm.
    """

    def __init__(self, C, num_classes, imagenet):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, stride=2 if imagenet else 3),
            nn.Conv2d(C, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False), nn.Identity() if imagenet else nn.BatchNorm2d(768),
            nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Network(nn.Module):
    """The network of a genotype, (B, 3, H, W) -> (logits, auxiliary logits in training or None).

    CIFAR form: one 3x3 convolution as stem. ImageNet form (`imagenet`): two stems that divide the
    size by 8. Set `drop_path_prob` before each epoch. Source: NetworkCIFAR and NetworkImageNet in
    cnn/model.py.
    """
    autocast = contextlib.nullcontext()

    def __init__(self, genotype, C=36, layers=20, num_classes=10, auxiliary=False, imagenet=False):
        super().__init__()
        self.drop_path_prob = 0.0
        C_prev_prev = C_prev = C if imagenet else 3 * C
        self.stem0, self.stem1 = make_stems(C_prev, imagenet)
        self.cells, reduction_prev = nn.ModuleList(), imagenet
        self.auxiliary_layer = 2 * layers // 3 if auxiliary else None
        for layer in range(layers):
            reduction = layer in reductions(layers)
            C = 2 * C if reduction else C
            nodes, concat = genotype[2:4] if reduction else genotype[:2]    # two fields a cell
            self.cells.append(Cell(nodes, concat, C_prev_prev, C_prev, C, reduction,
                                   reduction_prev))
            C_prev_prev, C_prev, reduction_prev = C_prev, C * len(concat), reduction
            if layer == self.auxiliary_layer:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, imagenet)
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x):
        with self.autocast:
            x, logits_aux = self.features(x)
        logits = self.classifier(x.to(self.classifier.weight.dtype))
        return logits, None if logits_aux is None else logits_aux.to(logits.dtype)

    def features(self, x):
        s0 = self.stem0(x)
        s1, logits_aux = self.stem1(s0), None
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if self.training and layer == self.auxiliary_layer:
                logits_aux = self.auxiliary_head(s1)
        return s1.mean((2, 3)), logits_aux


def stem_conv(C_in, C, stride=1):
    return nn.Conv2d(C_in, C, 3, stride, padding=1, bias=False), nn.BatchNorm2d(C)


def make_stems(C, imagenet):
    """Two parts, 3 -> C and C -> C channels; the output of each is an input of the first cell.

    CIFAR form: one convolution. ImageNet form: three that halve the size, 3 -> C/2 -> C -> C.
    """
    if not imagenet:
        return nn.Sequential(*stem_conv(3, C)), nn.Identity()
    first = *stem_conv(3, C // 2, 2), nn.ReLU(inplace=True), *stem_conv(C // 2, C, 2)
    return nn.Sequential(*first), nn.Sequential(nn.ReLU(), *stem_conv(C, C, 2))


def count_parameters(net):
    """Parameters without the auxiliary head, as DARTS counts them."""
    return sum(p.numel() for name, p in net.named_parameters()
               if not name.startswith("auxiliary_head"))


def count_macs(net, size):
    """Multiply-adds of convolutions and classifier, without the auxiliary head, for one image.

    size: its side. Counted on shapes alone if `net` was made under `torch.device("meta")`. The
    network is then in eval mode.
    """
    image = torch.zeros(1, 3, size, size, device=net.classifier.weight.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image)
    return counter.get_total_flops() // 2                   # one multiply-add is two FLOPs


# ---------------------------------------------------------------- networks on a device

def metrics(loss, logits, labels):
    """(loss, top-1 correct, top-5 correct, images), summed over a batch, on the device."""
    correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]   # (B, 5)
    images = torch.full_like(loss, len(labels))
    return torch.stack([loss.detach() * images, correct[:, 0].sum(), correct.sum(), images])


def means(totals):
    """Mean loss, top-1 and top-5 accuracy in percent, images, of all processes' summed metrics."""
    if dist.is_initialized():                               # under torchrun
        dist.all_reduce(totals)
    loss, top1, top5, images = totals.tolist()              # waits for the device
    return loss / images, 100 * top1 / images, 100 * top5 / images, images


@torch.no_grad()
def evaluate(net, batches):
    """The means over the batches of a super-network or a derived one, by running statistics.

    All processes have to call it.
    """
    net.eval()
    totals = torch.zeros(4, device=net.classifier.weight.device)    # a process may have no batch
    for images, labels in batches:
        logits = net(images)
        logits = logits if torch.is_tensor(logits) else logits[0]   # the second: auxiliary ones
        totals += metrics(F.cross_entropy(logits, labels), logits, labels)
    return means(totals)


def share_buffers(net):
    """Gives all processes the first one's running statistics, which are tested and saved."""
    for buffer in net.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def place(net, device, amp=False):
    """Moves a network to its device. amp: bfloat16 and TF32, in place of float32.

    channels_last makes depthwise convolutions 4 to 5 times faster on the CPU. On CUDA it is slow
    in float32 (pytorch/pytorch #22302, #34977; not measured by us). Images are contiguous, so that
    the layout of the weights decides.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp
    if amp:
        net.autocast = torch.autocast(device.type, torch.bfloat16)
    last = device.type == "cpu" or amp
    layout = torch.channels_last if last else torch.contiguous_format
    return net.to(device, memory_format=layout)


# ---------------------------------------------------------------- operations, as in DARTS

class ReLUFirst(nn.Module):
    """ReLU, then `body`. A mixed operation computes the ReLU once, and hands it to every body.

    x: (B, C_in, H, W) -> (B, C, H/stride, W/stride).
    """

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(F.relu(x))


class Subsample(nn.Module):
    """Takes every `stride`-th pixel, for a convolution of stride 1. A strided one would do the same
    but slower; and a 1x1 overruns its memory on the CPU (torch 2.14, channels_last, 56x56)."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, ::self.stride, ::self.stride]


class Noise(Subsample):
    """S4's operation: N(0, 1), fresh at every call, in eval mode too; x only gives the shape."""

    def forward(self, x):
        return torch.randn_like(super().forward(x))


class ShiftedConvs(nn.Module):
    """Two 1x1 convolutions of stride 2, the second on the input shifted by a pixel."""

    def __init__(self, C_in, C):
        super().__init__()
        self.subsample = Subsample(2)
        self.conv1 = nn.Conv2d(C_in, C // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(C_in, C - C // 2, 1, bias=False)

    def forward(self, x):
        shifted = F.pad(x, (-1, 1, -1, 1))                  # same size, so odd sizes fit too
        halves = self.conv1(self.subsample(x)), self.conv2(self.subsample(shifted))
        return torch.cat(halves, dim=1)


def FactorizedReduce(C_in, C, affine):
    return ReLUFirst(ShiftedConvs(C_in, C), nn.BatchNorm2d(C, affine=affine))


def conv_bn(C_in, C, kernel, stride, affine):
    return ReLUFirst(nn.Conv2d(C_in, C, kernel, stride, padding=kernel // 2, bias=False),
                     nn.BatchNorm2d(C, affine=affine))


def preprocess(C_in, C, halve, affine):
    """Brings a cell's input to C channels and, after a reduction cell, to half the size."""
    return FactorizedReduce(C_in, C, affine) if halve else conv_bn(C_in, C, 1, 1, affine)


def separable(C, kernel, stride, affine):
    """Depthwise convolution, pointwise convolution, batch norm: three layers."""
    return (nn.Conv2d(C, C, kernel, stride, padding=kernel // 2, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=affine))


def sep_conv(kernel, C, stride, affine):                    # twice; the second with stride 1
    return ReLUFirst(*separable(C, kernel, stride, affine), nn.ReLU(inplace=True),
                     *separable(C, kernel, 1, affine))


def dil_conv(kernel, C, stride, affine):
    """Dilation 2. With stride 2 it sees every second pixel only, so it needs no dilation there."""
    depthwise = nn.Conv2d(C, C, kernel, padding=(kernel - 1) // stride, dilation=2 // stride,
                          groups=C, bias=False)
    return ReLUFirst(Subsample(stride), depthwise, nn.Conv2d(C, C, 1, bias=False),
                     nn.BatchNorm2d(C, affine=affine))


def max_pool_2x2(C, stride, affine):                        # padded at the end: keeps the size
    return nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), float("-inf")), nn.MaxPool2d(2, stride))


def skip_connect(C, stride, affine):
    return FactorizedReduce(C, C, affine) if stride > 1 else nn.Identity()


# name: make(C, stride, affine), C channels in and out. `none` adds nothing: it is never computed.
OPS = {
    "max_pool_3x3": lambda C, s, affine: nn.MaxPool2d(3, s, padding=1),
    "avg_pool_3x3": lambda C, s, affine: nn.AvgPool2d(3, s, padding=1, count_include_pad=False),
    "skip_connect": skip_connect,
    "sep_conv_3x3": partial(sep_conv, 3),
    "sep_conv_5x5": partial(sep_conv, 5),
    "dil_conv_3x3": partial(dil_conv, 3),
    "dil_conv_5x5": partial(dil_conv, 5),
    "noise": lambda C, s, affine: Noise(s),                 # RobustDARTS, space S4
    # of published cells, and of NAS-Bench-201
    "sep_conv_7x7": partial(sep_conv, 7),
    "nor_conv_1x1": lambda C, s, affine: nn.Sequential(Subsample(s), conv_bn(C, C, 1, 1, affine)),
    "nor_conv_3x3": lambda C, s, affine: conv_bn(C, C, 3, s, affine),
    "max_pool_2x2": max_pool_2x2,
}
