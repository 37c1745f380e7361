"""Data sets and augmentation. Small images live on the device as uint8 and are augmented there, a batch at a time.

The search (sections 2.2 and 5.1) takes one half of the training split for the weights and the other for alpha.
Constants: DARTS (CIFAR-10) and RobustDARTS (CIFAR-100, SVHN). `digits` is in this repository; the others are read, and
downloaded where that is possible, by torchvision. ImageNet streams from disk through worker processes.
"""
import functools
import gzip
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

import run
from run import Exit, make_seed, reason, save


class Spec(NamedTuple):
    """size: side of the images in pixels. mean, std: per channel, of pixels in [0, 1]. flip: part of the augmentation."""
    size: int
    mean: tuple
    std: tuple
    flip: bool = True


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "cifar10": Spec(32, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),  # DARTS
    "cifar100": Spec(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),                         # RobustDARTS
    "svhn": Spec(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),                             # RobustDARTS
    "fashion_mnist": Spec(28, (0.2860,) * 3, (0.3530,) * 3),                                          # its train split
    "digits": Spec(8, (0.3054,) * 3, (0.3753,) * 3, flip=False),                                      # its train split
    "folder": Spec(32, IMAGENET_MEAN, IMAGENET_STD),
    "imagenet": Spec(224, IMAGENET_MEAN, IMAGENET_STD),
}
DIGITS_TRAIN = 1437                                         # of 1,797; the rest is the test split
FILES = {                                                   # what torchvision reads, under --data
    "cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "fashion_mnist": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
}


class Split(NamedTuple):
    """images: uint8 (N, H, W, 3); labels: int64 (N,); classes: their number; spec: the data set's constants.

    layout: the memory format of the batches made from it.
    """
    images: torch.Tensor
    labels: torch.Tensor
    classes: int
    spec: Spec
    layout: torch.memory_format = torch.contiguous_format

    def part(self, start, stop):
        return self._replace(images=self.images[start:stop], labels=self.labels[start:stop])

    def to(self, device, layout):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device), layout=layout)


# ---------------------------------------------------------------- reading

def load(name, root, train, image_size=None, limit=None):
    """The train or test split of a data set that fits in memory. Raises Exit if it is missing or damaged.

    image_size: the side to which images are resized, by area. limit: take the first `limit` training images only.
    """
    spec = DATASETS[name]
    size = image_size or spec.size
    if name == "folder":
        images, labels, classes = load_folder(Path(root), train, size)
    elif name == "digits":
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            images, labels, classes = file["images"] * 255.0 / 16, file["labels"], 10  # 8x8, values 0 to 16
        part = slice(0, DIGITS_TRAIN) if train else slice(DIGITS_TRAIN, None)
        images, labels = images.round().astype(np.uint8)[part], labels[part]
    else:
        images, labels, classes = load_torchvision(name, Path(root), train)
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    if train and limit is not None:
        images, labels = images[:limit], labels[:limit]
    if images.dim() == 3:                                   # grey: three equal channels
        images = images[..., None].expand(-1, -1, -1, 3)
    if images.shape[1] != size:
        images = resize(images.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return Split(images.contiguous(), labels, classes, spec)


def resize(images, size):
    """uint8 images (B, C, H, W) to size x size: each new pixel is the mean of the area it covers."""
    return F.interpolate(images.float(), (size, size), mode="area").round().to(torch.uint8)


def load_torchvision(name, root, train):
    """Images (N, H, W, 3) or (N, H, W), labels, number of classes. Downloads only what is missing or damaged."""
    make = {"cifar10": lambda **options: datasets.CIFAR10(root, train, **options),
            "cifar100": lambda **options: datasets.CIFAR100(root, train, **options),
            "svhn": lambda **options: datasets.SVHN(root, "train" if train else "test", **options),
            "fashion_mnist": lambda **options: datasets.FashionMNIST(root, train, **options)}[name]
    try:
        if name == "fashion_mnist":
            unpack(root / "FashionMNIST" / "raw")
        try:
            data = make(download=False)
        except ModuleNotFoundError:
            raise
        except Exception:                                   # missing, not yet unpacked, or damaged in any way
            data = make(download=True)
    except ModuleNotFoundError as error:
        raise Exit(f"torchvision reads {name} with {error.name}, which is not installed: "
                   f"pip install {error.name}") from None
    except Exception as error:
        raise Exit(f"{name} cannot be read under {root} or downloaded ({type(error).__name__}: {reason(error)}): "
                   f"put {FILES[name]} there, or see --data; --dataset digits needs no files") from None
    if name == "svhn":
        return data.data.transpose(0, 2, 3, 1), data.labels, 10
    return data.data, data.targets, len(data.classes)


def unpack(folder):
    """Unpacks the archives that are there: torchvision wants all four files, and of archives the bytes of one edition."""
    for archive in folder.glob("*-ubyte.gz"):
        if not archive.with_suffix("").exists():
            save(archive.with_suffix(""), lambda file: file.write(gzip.decompress(archive.read_bytes())))


def image_folder(root, train, transform):
    """torchvision's ImageFolder of root/train or root/val; their classes must be the same where both are there."""
    try:
        data = datasets.ImageFolder(root / ("train" if train else "val"), transform)
        other = root / ("val" if train else "train")
        classes = sorted(entry.name for entry in other.iterdir() if entry.is_dir()) if other.exists() else data.classes
    except OSError as error:
        raise Exit(f"{root} is no image folder ({reason(error)}): it needs train/CLASS/IMAGE to train, and "
                   f"val/CLASS/IMAGE to test") from None
    if data.classes != classes:
        raise Exit(f"{root}: train and val have different classes")
    return data


def shuffled(count):
    """A fixed order for images that come sorted by class, so that every part of them has all classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def load_folder(root, train, size):
    to_pixels = v2.Compose([v2.PILToTensor(), lambda image: resize(image[None], size)[0]])
    data = image_folder(root, train, to_pixels)
    try:
        images = torch.stack([image for image, _ in data]).permute(0, 2, 3, 1)
    except OSError as error:
        raise Exit(f"{root}: an image cannot be read ({reason(error)})") from None
    order = shuffled(len(data))
    return images[order], torch.tensor(data.targets)[order], len(data.classes)


# ---------------------------------------------------------------- augmentation

def augment(images, uniform, spec, cutout=0):
    """Augmented, normalized copies of uint8 images (B, H, W, 3): float (B, 3, H, W) in channels_last order.

    uniform: (B, 5) numbers in [0, 1), each image's own. In order: crop from the image padded by an eighth of its side (4
    pixels for 32, as in DARTS), flip, normalize, cut out a square of `cutout` pixels a side around a random pixel.
    """
    B, H, W, _ = images.shape
    pad = (H + 4) // 8
    dy, dx = (uniform[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = dy[:, None] + torch.arange(H, device=images.device)                                       # (B, H)
    across = torch.arange(W, device=images.device).expand(B, W)
    if spec.flip:
        across = torch.where(uniform[:, 2:3] < 0.5, across.flip(1), across)
    columns = dx[:, None] + across                                                                   # (B, W)
    padded = F.pad(images, (0, 0) + (pad,) * 4)
    batch = torch.arange(B, device=images.device)[:, None, None]
    crop = normalize(padded[batch, rows[:, :, None], columns[:, None, :]], spec)
    if cutout:
        crop = crop.masked_fill(cutout_mask(uniform[:, 3:], H, W, cutout), 0)
    return crop


def cutout_mask(uniform, H, W, side):
    """Where to cut: bool (B, 1, H, W), true in a square around a random pixel, as much of it as lies in the image."""
    y, x = (uniform[:, 0] * H).long()[:, None], (uniform[:, 1] * W).long()[:, None]                   # (B, 1)
    rows, columns = torch.arange(H, device=uniform.device), torch.arange(W, device=uniform.device)
    in_rows = (rows >= y - side // 2) & (rows < y - side // 2 + side)                                # (B, H)
    in_columns = (columns >= x - side // 2) & (columns < x - side // 2 + side)                       # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


@functools.cache
def constants(spec, device):                                # made once: copying them to a GPU would wait for it
    return tuple(torch.tensor(value, dtype=torch.float32, device=device) for value in (spec.mean, spec.std))


def normalize(images, spec):
    mean, std = constants(spec, images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- batches

def batch_indices(count, batch_size, seed, epoch, rank=0, world=1):
    """This process's share of every batch of an epoch: a list of index tensors. The order depends on seed and epoch alone.

    Every batch is divided evenly; the last is cut to a multiple of the processes, and left out if a process would get
    a single image of it, which batch norm cannot do.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(make_seed(seed, "order", epoch)))
    batches = [batch[:len(batch) // world * world] for batch in order.split(batch_size)]
    return [batch.chunk(world)[rank] for batch in batches if len(batch) >= 2 * world]


class Batches:
    """Batches of a split on the device: `for images, labels in batches.epoch(e)`, a function of seed, epoch and step.

    Process `rank` of `world` gets its share of every batch, augmented as it would be in one process.
    """

    def __init__(self, split, batch_size, seed, cutout=0, rank=0, world=1):
        self.split, self.batch_size, self.seed, self.cutout = split, batch_size, seed, cutout
        self.rank, self.world = rank, world
        self.steps = len(self.indices(0))
        if self.steps == 0:
            raise Exit(f"{len(split.labels)} images are too few for a batch in each of {world} process(es)")

    def indices(self, epoch):
        return batch_indices(len(self.split.labels), self.batch_size, self.seed, epoch, self.rank, self.world)

    def epoch(self, epoch):
        return self.range(epoch * self.steps, (epoch + 1) * self.steps)

    def range(self, start, stop):
        """Batches number `start` to `stop` of the endless sequence of epochs."""
        device, cached = self.split.labels.device, None
        for number in range(start, stop):
            epoch, step = divmod(number, self.steps)
            if epoch != cached:
                indices, cached = [batch.to(device) for batch in self.indices(epoch)], epoch
            share = len(indices[step])
            generator = torch.Generator(device).manual_seed(make_seed(self.seed, "augmentation", epoch, step))
            uniform = torch.rand(share * self.world, 5, generator=generator, device=device)
            uniform = uniform[self.rank * share:(self.rank + 1) * share]
            images = augment(self.split.images[indices[step]], uniform, self.split.spec, self.cutout)
            yield images.contiguous(memory_format=self.split.layout), self.split.labels[indices[step]]


def test_batches(split, batch_size, rank=0, world=1):
    """Every image of the split once over all processes, normalized, not augmented."""
    for indices in torch.arange(len(split.labels), device=split.labels.device)[rank::world].split(batch_size):
        images = normalize(split.images[indices], split.spec)
        yield images.contiguous(memory_format=split.layout), split.labels[indices]


# ---------------------------------------------------------------- ImageNet

def ignore_signals(worker):
    """For the processes that read images: only the one that trains decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ImageNet:
    """ImageNet, or any folder like it, from disk: the transforms of DARTS's train_imagenet.py, 224x224 by default."""

    def __init__(self, args, train, seed, device, layout, rank=0, world=1):
        spec, size = DATASETS["imagenet"], args.image_size or DATASETS["imagenet"].size
        crop = ([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if train else
                [v2.Resize(size * 8 // 7), v2.CenterCrop(size)])                                     # 256 for 224
        self.data = image_folder(Path(args.data), train, v2.Compose([
            *crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]))
        self.classes, self.size, count = len(self.data.classes), size, len(self.data)
        if train and args.limit is not None:
            self.data = torch.utils.data.Subset(self.data, shuffled(count)[:args.limit].tolist())
        self.train, self.batch_size, self.seed, self.workers = train, args.batch_size, seed, args.workers
        self.device, self.layout, self.rank, self.world = device, layout, rank, world
        self.steps = len(self.indices(0))
        if self.steps == 0:
            raise Exit(f"--batch_size {args.batch_size} or {args.data} are too few for a batch in each of {world} process(es)")

    def indices(self, epoch):
        if self.train:
            return batch_indices(len(self.data), self.batch_size, self.seed, epoch, self.rank, self.world)
        share = torch.arange(len(self.data))[self.rank::self.world]
        return share.split(max(1, self.batch_size // self.world))

    def epoch(self, epoch):
        """The batches of an epoch. If one for training cannot be read, that is a reason to stop, and the one before comes
        again until all processes stop: the others would wait forever for the gradients of one that left alone."""
        generator = torch.Generator().manual_seed(make_seed(self.seed, "workers", epoch, self.rank))
        loader = iter(DataLoader(self.data, batch_sampler=[batch.tolist() for batch in self.indices(epoch)],
                                 num_workers=self.workers, worker_init_fn=ignore_signals, generator=generator,
                                 pin_memory=self.device.type == "cuda"))
        images, labels = torch.zeros(2, 3, self.size, self.size), torch.zeros(2, dtype=torch.long)
        for _ in range(self.steps):
            try:
                images, labels = next(loader)
            except (OSError, RuntimeError) as error:        # the latter if a worker was killed; both may start with a traceback
                run.stop = Exit(f"an image cannot be read ({str(error).strip().splitlines()[-1]})")
                if not self.train:
                    raise run.stop from None
            yield (images.to(self.device, non_blocking=True).contiguous(memory_format=self.layout),
                   labels.to(self.device, non_blocking=True))
