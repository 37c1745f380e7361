"""Data sets and augmentation. Small images live on the device as uint8 and are augmented there, a batch at a time.

The search (sections 2.2 and 5.1) takes one half of the training split for the weights and the other for alpha.
Constants: DARTS (CIFAR-10) and RobustDARTS (CIFAR-100, SVHN). `digits` is in this repository; the others are read, and
downloaded where that is possible, by torchvision. ImageNet streams from disk through worker processes.
"""
import functools
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from run import Exit, first_line, mix, write_file


class Spec(NamedTuple):
    """classes: None if the folder tells. mean, std: per channel, of pixels in [0, 1]. pad, flip: the augmentation."""
    classes: int | None
    mean: tuple
    std: tuple
    pad: int = 4                                            # pixels: random crop out of the image padded with zeros
    flip: bool = True


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "cifar10": Spec(10, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),  # DARTS
    "cifar100": Spec(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),                        # RobustDARTS
    "svhn": Spec(10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),                             # RobustDARTS
    "fashion_mnist": Spec(10, (0.2860,) * 3, (0.3530,) * 3),                                          # its train split
    "digits": Spec(10, (0.3054,) * 3, (0.3753,) * 3, pad=1, flip=False),                              # its train split
    "folder": Spec(None, IMAGENET_MEAN, IMAGENET_STD),
    "imagenet": Spec(1000, IMAGENET_MEAN, IMAGENET_STD),
}
DIGITS_TRAIN = 1437                                         # of 1,797; the rest is the test split
FILES = {                                                   # what torchvision reads, under --data
    "cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "fashion_mnist": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
}


class Split(NamedTuple):
    """images: uint8 (N, H, W, 3); labels: int64 (N,); classes: their number; spec: the data set's constants."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: int
    spec: Spec

    def part(self, start, stop):
        return self._replace(images=self.images[start:stop], labels=self.labels[start:stop])

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


# ---------------------------------------------------------------- reading

def load(name, root, train, image_size=32):
    """The train or test split of a data set that fits in memory. Raises Exit if it is missing or damaged."""
    spec = DATASETS[name]
    if name == "folder":
        return load_folder(Path(root), train, image_size, spec)
    if name == "digits":
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            images, labels = file["images"] * 255.0 / 16, file["labels"]           # 8x8, values 0 to 16
        part = slice(0, DIGITS_TRAIN) if train else slice(DIGITS_TRAIN, None)
        images, labels = images.round().astype(np.uint8)[part], labels[part]
    else:
        images, labels = load_torchvision(name, Path(root), train)
    images = torch.as_tensor(images)
    if images.dim() == 3:
        images = images[..., None].expand(-1, -1, -1, 3)    # grey: three equal channels
    return Split(images.contiguous(), torch.as_tensor(labels).long(), spec.classes, spec)


def load_torchvision(name, root, train):
    """Arrays (N, H, W, 3) or (N, H, W), and labels. Downloads only what is missing or damaged."""
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
        raise Exit(f"{name} cannot be read under {root} or downloaded ({type(error).__name__}: {first_line(error)}): "
                   f"put {FILES[name]} there, or see --data; --dataset digits needs no files") from None
    if name == "svhn":
        return data.data.transpose(0, 2, 3, 1), data.labels
    return data.data, data.targets


def unpack(folder):
    """Unpacks the archives that are there: torchvision wants all four files, and of archives the bytes of one edition."""
    for archive in folder.glob("*-ubyte.gz"):
        if not archive.with_suffix("").exists():
            write_file(archive.with_suffix(""), lambda file: file.write(gzip.decompress(archive.read_bytes())))


def last_line(error):                                       # a worker's error starts with its traceback
    return (str(error).splitlines() or [""])[-1]


def image_folder(root, train, transform):
    """torchvision's ImageFolder of root/train or root/val, whose classes must be the same."""
    try:
        data = datasets.ImageFolder(root / ("train" if train else "val"), transform)
    except OSError as error:
        raise Exit(f"{root} is no image folder ({first_line(error)}): it needs train/CLASS/IMAGE and, to test, "
                   f"val/CLASS/IMAGE") from None
    if not train and data.classes != sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir()):
        raise Exit(f"{root}: train and val have different classes")
    return data


def load_folder(root, train, image_size, spec):
    data = image_folder(root, train, v2.Compose([v2.Resize((image_size, image_size)), v2.PILToTensor()]))
    try:
        images = torch.stack([image for image, _ in data]).permute(0, 2, 3, 1)
    except OSError as error:
        raise Exit(f"{root}: an image cannot be read ({first_line(error)})") from None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # files are sorted by class
    return Split(images[order].contiguous(), torch.tensor(data.targets)[order], len(data.classes), spec)


# ---------------------------------------------------------------- augmentation

def augment(images, uniform, spec, cutout=0):
    """Augmented, normalized copies of uint8 images (B, H, W, 3): float (B, 3, H, W) in channels_last order.

    uniform: (B, 5) numbers in [0, 1), each image's own. In order: crop from the image padded by spec.pad, flip,
    normalize, cut out a square of `cutout` pixels a side around a random pixel (cut at the border).
    """
    B, H, W, _ = images.shape
    down, right, flip, y, x = uniform.unbind(1)
    rows = (down * (2 * spec.pad + 1)).long()[:, None] + torch.arange(H, device=images.device)       # (B, H)
    across = torch.arange(W, device=images.device).expand(B, W)
    if spec.flip:
        across = torch.where(flip[:, None] < 0.5, across.flip(1), across)
    columns = (right * (2 * spec.pad + 1)).long()[:, None] + across                                  # (B, W)
    padded = F.pad(images, (0, 0) + (spec.pad,) * 4)
    batch = torch.arange(B, device=images.device)[:, None, None]
    out = normalize(padded[batch, rows[:, :, None], columns[:, None, :]], spec)
    if cutout:
        hidden = [((torch.arange(size, device=images.device) - (at * size).long()[:, None] + cutout // 2) // cutout) == 0
                  for at, size in ((y, H), (x, W))]
        out = out.masked_fill((hidden[0][:, :, None] & hidden[1][:, None, :])[:, None], 0)
    return out


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
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))
    batches = [batch[:len(batch) // world * world] for batch in order.split(batch_size)]
    return [batch.chunk(world)[rank] for batch in batches if len(batch) >= 2 * world]


class Batches:
    """Batches of a split on the device: `for images, labels in batches.epoch(e)`. `seed` is mixed with epoch and step.

    Process `rank` of `world` gets its share of every batch, augmented as it would be in one process.
    """

    def __init__(self, split, batch_size, seed, cutout=0, rank=0, world=1):
        self.split, self.batch_size, self.seed, self.cutout = split, batch_size, seed, cutout
        self.rank, self.world = rank, world
        self.steps = len(self.indices(0))

    def indices(self, epoch):
        return batch_indices(len(self.split.labels), self.batch_size, self.seed, epoch, self.rank, self.world)

    def epoch(self, epoch):
        return self.range(epoch * self.steps, (epoch + 1) * self.steps)

    def range(self, start, stop):
        """Batches number `start` to `stop` of the endless sequence of epochs."""
        device, cached = self.split.labels.device, None
        for step in range(start, stop):
            epoch, k = divmod(step, self.steps)
            if epoch != cached:
                indices, cached = [batch.to(device) for batch in self.indices(epoch)], epoch
            share = len(indices[k])
            generator = torch.Generator(device).manual_seed(mix(self.seed, epoch, k))
            uniform = torch.rand(share * self.world, 5, generator=generator, device=device)
            uniform = uniform[self.rank * share:(self.rank + 1) * share]
            yield (augment(self.split.images[indices[k]], uniform, self.split.spec, self.cutout),
                   self.split.labels[indices[k]])


def test_batches(split, batch_size, rank=0, world=1):
    """Every image of the split once over all processes, normalized, not augmented."""
    for indices in torch.arange(len(split.labels), device=split.labels.device)[rank::world].split(batch_size):
        yield normalize(split.images[indices], split.spec), split.labels[indices]


# ---------------------------------------------------------------- ImageNet

class ImageNet:
    """ImageNet, or any folder like it, from disk: the transforms of DARTS's train_imagenet.py at 224x224."""

    def __init__(self, root, train, batch_size, seed, device, workers, rank=0, world=1):
        spec = DATASETS["imagenet"]
        crop = ([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if train else
                [v2.Resize(256), v2.CenterCrop(224)])
        self.data = image_folder(Path(root), train, v2.Compose([
            *crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]))
        self.classes = len(self.data.classes)
        self.train, self.batch_size, self.seed, self.device, self.workers = train, batch_size, seed, device, workers
        self.rank, self.world = rank, world
        self.steps = len(self.indices(0))

    def indices(self, epoch):
        if self.train:
            return batch_indices(len(self.data), self.batch_size, self.seed, epoch, self.rank, self.world)
        return list(torch.arange(len(self.data))[self.rank::self.world].split(self.batch_size))

    def epoch(self, epoch):
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, self.rank))  # seeds the workers
        loader = DataLoader(self.data, batch_sampler=[batch.tolist() for batch in self.indices(epoch)],
                            num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=generator)
        try:
            for images, labels in loader:
                yield (images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last),
                       labels.to(self.device, non_blocking=True))
        except OSError as error:
            raise Exit(f"{self.data.root}: an image cannot be read ({last_line(error)})", alone=True) from None
