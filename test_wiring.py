"""Tests of the wiring: do the flags reach the network, the optimizer and the data, each at its own place?

    python -m pytest -q test_wiring.py

The programs run by their own flags. What comes out is compared with loops and numbers written out here.
"""
import json
import signal
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import data
import retrain
import search
from genotypes import PUBLISHED, SPACES
from larc import LARC
from model import Network, SuperNet
from run import make_seed

TINY = "--dataset digits --device cpu --layers 3 --init_channels 2 --epochs 1 --seed 5".split()
LR, MOMENTUM, DECAY, CLIP = 0.05, 0.7, 0.02, 0.3            # none is a default
SGD = [f"--learning_rate={LR}", f"--momentum={MOMENTUM}", f"--weight_decay={DECAY}", f"--grad_clip={CLIP}"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean, std
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def leave_signals_alone(monkeypatch):                       # old API: a run takes the signals over
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)


def read_imagenet(args, train):
    place = torch.device("cpu"), torch.contiguous_format    # old API: the device alone
    return list(data.ImageNet(args, train, 0, *place).epoch(0))


def batches(split, size, purpose, **options):
    return list(data.Batches(split, size, make_seed(5, purpose), **options).epoch(0))


def left_by(folder):
    """The network and the only record that a run of one epoch has left."""
    record, = (folder / "log.jsonl").read_text().splitlines()
    return torch.load(folder / "checkpoint.pt")["net"], json.loads(record)


# ---------------------------------------------------------------- switches

@pytest.mark.parametrize("node_norm, larc, sqrt_beta", list(product((False, True), repeat=3)))
def test_each_switch_reaches_its_own_place(tmp_path, monkeypatch, node_norm, larc, sqrt_beta):
    seen, weight_step = [], search.weight_step
    monkeypatch.setattr(search, "weight_step", lambda *given: seen.append(given[:2]) or weight_step(*given))
    switches = ["--node_norm"] * node_norm + ["--larc"] * larc + ["--sqrt_beta"] * sqrt_beta
    search.main([*TINY, *switches, "--space=s2", "--limit=8", f"--out={tmp_path / 'run'}"])

    (net, optimizer), = seen                                # of the only step
    normalize = nn.BatchNorm2d if node_norm else nn.Identity
    assert {type(module) for cell in net.cells for module in cell.normalize} == {normalize}
    assert net.sqrt_beta is sqrt_beta
    assert type(optimizer) is (LARC if larc else torch.optim.SGD)


# ---------------------------------------------------------------- an epoch against a plain loop

@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, images too: float32's rounding grows from step to step."""
    normalize = data.normalize
    monkeypatch.setattr(data, "normalize", lambda *given: normalize(*given).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def slow_sgd(loss, weights, momenta):
    gradients = torch.autograd.grad(loss, weights)
    norm = sum((g ** 2).sum() for g in gradients).sqrt()    # of the whole gradient
    with torch.no_grad():
        for w, m, g in zip(weights, momenta, gradients):
            m.copy_(MOMENTUM * m + g * min(1, CLIP / (norm + 1e-6)) + DECAY * w)
            w.sub_(LR * m)


def assert_same(net, left):
    assert left.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.allclose(left[name], value, rtol=0, atol=1e-5), name


def percent(right):
    return pytest.approx(100 * right.double().mean().item())


def test_an_epoch_of_the_search_equals_a_plain_loop(tmp_path, float64):
    search.main([*TINY, *SGD, "--space=s3", "--node_norm", "--batch_size=128",
                 "--arch_learning_rate=0.1", "--arch_weight_decay=0.2", f"--out={tmp_path / 'run'}"])
    split = data.load("digits", "data", train=True)         # 1,437 images
    w_half = split._replace(images=split.images[:718], labels=split.labels[:718])
    alpha_half = split._replace(images=split.images[718:], labels=split.labels[718:])

    torch.manual_seed(5)
    net = SuperNet(SPACES["s3"], 2, 3, 10, node_norm=True)
    alphas = [p for name, p in net.named_parameters() if name.startswith("alpha")]
    weights = [p for name, p in net.named_parameters() if not name.startswith("alpha")]
    adam = torch.optim.Adam(alphas, 0.1, betas=(0.5, 0.999), weight_decay=0.2)
    momenta = [torch.zeros_like(w) for w in weights]
    for w_batch, alpha_batch in zip(batches(w_half, 128, "w"), batches(alpha_half, 128, "alpha")):
        images, labels = alpha_batch
        F.cross_entropy(net(images), labels).backward()
        adam.step()
        net.zero_grad()
        images, labels = w_batch
        slow_sgd(F.cross_entropy(net(images), labels), weights, momenta)
    left, record = left_by(tmp_path / "run")
    assert_same(net, left)

    images, labels = map(torch.cat, zip(*batches(alpha_half, 128, "validation")))
    logits = net.eval()(images)
    assert record["valid_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert record["valid_acc"] == percent(logits.argmax(1) == labels)


def test_an_epoch_of_retraining_equals_a_plain_loop(tmp_path, float64):
    retrain.main([*TINY, *SGD, "--genotype=VS_DARTS", "--image_size=32", "--limit=40", "--batch_size=8",
                  "--label_smooth=0.2", "--auxiliary_weight=0.3", "--cutout_length=9",
                  f"--out={tmp_path / 'run'}"])
    torch.manual_seed(5)
    net = Network(PUBLISHED["VS_DARTS"].genotype, 2, 3, 10, auxiliary=True)
    weights = list(net.parameters())
    momenta = [torch.zeros_like(w) for w in weights]
    for images, labels in batches(data.load("digits", "data", True, 32, 40), 8, "data", cutout=9):
        target, loss = 0.8 * F.one_hot(labels, 10) + 0.2 / 10, 0
        for weight, logits in zip((1, 0.3), net(images)):   # the classifier's, the auxiliary head's
            loss = loss - weight * (target * logits.log_softmax(1)).sum(1).mean()
        slow_sgd(loss, weights, momenta)
    left, record = left_by(tmp_path / "run")
    assert_same(net, left)

    test = data.load("digits", "data", False, 32)
    logits, _ = net.eval()(((test.images / 255 - 0.3054) / 0.3753).permute(0, 3, 1, 2))
    assert record["test_loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item())
    assert record["test_error"] == percent(logits.argmax(1) != test.labels)


@pytest.mark.parametrize("name, decay, smooth", [
    ("cifar10", 3e-4, 0), ("svhn", 3e-4, 0), ("imagenet", 3e-5, 0.1)])
def test_defaults_of_retraining_are_those_of_darts(name, decay, smooth):
    args = retrain.parse(["--genotype=VS_DARTS", "--dataset", name])
    assert (args.momentum, args.weight_decay, args.grad_clip, args.label_smooth) == (0.9, decay, 5, smooth)


# ---------------------------------------------------------------- data

@pytest.mark.parametrize("name, mean, std", [
    ("cifar10", (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ("svhn", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ("folder", *IMAGENET),
    ("imagenet", *IMAGENET)])
def test_pixels_are_normalized_by_published_constants(name, mean, std):
    pixel = torch.full((1, 1, 1, 3), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    expected = [(0.2 - m) / s for m, s in zip(mean, std)]
    assert data.normalize(pixel, data.DATASETS[name]).flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("train, label", [(True, 3), (False, 7)])
@pytest.mark.parametrize("name, theirs, shape", [
    ("cifar10", "CIFAR10", (1, 32, 32, 3)), ("cifar100", "CIFAR100", (1, 32, 32, 3)),
    ("svhn", "SVHN", (1, 3, 32, 32)), ("fashion_mnist", "FashionMNIST", (1, 28, 28))])
def test_a_bright_corner_stays_at_the_upper_right(tmp_path, monkeypatch, name, theirs, shape, train, label):
    pixels = np.zeros(shape, np.uint8)
    pixels[(0, ..., 0, -1) if name == "svhn" else (0, 0, -1)] = 255

    def read(root, part, **options):                        # in place of torchvision's class
        labels = np.array([3 if part in (True, "train") else 7])
        return SimpleNamespace(data=pixels, targets=labels, labels=labels, classes=list("0123456789"))
    monkeypatch.setattr(torchvision.datasets, theirs, read)
    images, labels = data.load(name, tmp_path, train)[:2]
    assert (images == 255).all(3).nonzero().tolist() == [[0, 0, images.shape[2] - 1]]
    assert images.sum() == 3 * 255
    assert labels.tolist() == [label]


@pytest.mark.parametrize("train", [True, False])
def test_imagenet_goes_through_the_transforms_of_darts(tmp_path, train):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 260, 3), np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    for part, label in product(("train", "val"), (0, 1)):
        folder = tmp_path / part / str(label)
        folder.mkdir(parents=True)
        pictures[label].save(folder / "picture.png")
    args = retrain.parse(["--genotype=VS_DARTS", "--dataset=imagenet", f"--data={tmp_path}",
                          "--batch_size=2", "--workers=0"])
    torch.manual_seed(0)
    (images, labels), = read_imagenet(args, train)

    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), jitter]
    transform = v2.Compose(steps if train else [v2.Resize(256), v2.CenterCrop(224)])
    mean, std = np.array(IMAGENET)
    torch.manual_seed(0)
    for image, label in zip(images, labels):
        expected = (np.array(transform(pictures[label])) / 255 - mean) / std
        assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-5)


# ---------------------------------------------------------------- device

@pytest.mark.parametrize("main, flag", [(search.main, "--space=s2"), (retrain.main, "--genotype=VS_DARTS")])
def test_tf32_comes_with_amp_alone(tmp_path, main, flag):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for amp in (True, False):                               # ends with TF32 off, for the tests after this one
        for backend in backends:
            backend.allow_tf32 = not amp
        main([*TINY, flag, *["--amp"] * amp, "--limit=8", f"--out={tmp_path / str(amp)}"])
        assert [backend.allow_tf32 for backend in backends] == [amp, amp]
