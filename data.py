"""Data sets and augmentation. Small images live on the device as uint8 and are augmented there, in batches.

Constants: DARTS (CIFAR-10) and RobustDARTS (CIFAR-100, SVHN). `digits` is in this repository; torchvision
reads the others, and downloads what is missing. ImageNet streams from disk through worker processes.
"""
import functools
import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from run import differing, make_seed, progress, reason


class Spec(NamedTuple):
    """size: the side in pixels. mean, std: by channel, of pixels in [0, 1]. flip: mirror at random."""
    size: int
    mean: tuple
    std: tuple
    flip: bool = True


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
DATASETS = {
    "cifar10": Spec(32, CIFAR10_MEAN, CIFAR10_STD),                             # DARTS
    "cifar100": Spec(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),   # RobustDARTS
    "svhn": Spec(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),       # RobustDARTS
    "fashion_mnist": Spec(28, (0.2860,) * 3, (0.3530,) * 3),                    # its training split
    "digits": Spec(8, (0.3054,) * 3, (0.3753,) * 3, flip=False),                # its training split
    "folder": Spec(32, IMAGENET_MEAN, IMAGENET_STD),
    "imagenet": Spec(224, IMAGENET_MEAN, IMAGENET_STD),
}
FILES = {                                                   # what torchvision reads, under --data
    "cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "fashion_mnist": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
}


class Split(NamedTuple):
    """images: uint8 (N, H, W, 3). labels: int64 (N,). classes: names. spec: the data set's constants."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple
    spec: Spec

    def part(self, start, stop):
        return self.take(slice(start, stop))

    def take(self, indices):
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


# ---------------------------------------------------------------- reading

def load(name, root, train, image_size=None, limit=None):
    """The train or test split of a data set that fits in memory; SystemExit if it is missing or damaged.

    image_size: the side to which images are resized, by area. limit: of training images, take the first only.
    """
    spec, limit = DATASETS[name], limit if train else None
    size = image_size or spec.size
    if name == "imagenet":
        raise SystemExit("imagenet does not fit in memory: only search.py, proxy.py and retrain.py read it")
    if name == "folder":
        images, labels, classes = load_folder(Path(root), train, size, limit)
    elif name == "digits":
        images, labels, classes = load_digits(train)
    else:
        images, labels, classes = load_torchvision(name, Path(root), train)
    images, labels = torch.as_tensor(images[:limit]), torch.as_tensor(labels[:limit]).long()
    if images.dim() == 3:                                   # grey: three equal channels
        images = images[..., None].expand(-1, -1, -1, 3)
    if images.shape[1] != size:                             # in parts: floats take four times the memory
        resized = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
        for before, after in zip(images.split(1000), resized.split(1000)):
            after.copy_(resize(before, size))
        images = resized
    return Split(images.contiguous(), labels, tuple(map(str, classes)), spec)


def resize(images, size):
    """uint8 images (B, H, W, 3) to size x size: each new pixel is the mean of the area it covers."""
    images = F.interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="area")
    return images.round().to(torch.uint8).permute(0, 2, 3, 1)


def load_digits(train):
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"] * 255.0 / 16, file["labels"]            # 8x8, values 0 to 16
    part = slice(0, 1437) if train else slice(1437, None)                       # of 1,797
    return images.round().astype(np.uint8)[part], labels[part], range(10)


def load_torchvision(name, root, train):
    """Images (N, H, W, 3) or (N, H, W), labels, classes. torchvision downloads what is missing or damaged."""
    try:
        if name == "svhn":
            data = datasets.SVHN(root, "train" if train else "test", download=True)
            return data.data.transpose(0, 2, 3, 1), data.labels, range(10)
        names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
        data = getattr(datasets, names[name])(root, train, download=True)
        return data.data, data.targets, data.classes
    except ModuleNotFoundError as error:
        raise SystemExit(f"torchvision reads {name} with {error.name}, which is not installed: "
                         f"pip install {error.name}") from None
    except Exception as error:                              # missing, no network, damaged in any way
        raise SystemExit(f"{name} cannot be read under {root} or downloaded ({reason(error)}): put "
                         f"{FILES[name]} there, or see --data; --dataset digits needs no files") from None


# ---------------------------------------------------------------- folders of images

class ImageFolder(datasets.ImageFolder):
    """torchvision's, of root/train or root/val. It says what it found, and names what it cannot read."""

    def __init__(self, root, train, transform):
        folder = root / ("train" if train else "val")
        try:
            super().__init__(folder, transform, loader=read_image)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{folder}/CLASS/IMAGE is needed, and is missing ({reason(error)})") from None
        if len(self.classes) < 2:
            raise SystemExit(f"{folder}/CLASS/IMAGE is needed, with more classes than {self.classes[0]}")
        if not train and (root / "train").is_dir():
            classes, _ = self.find_classes(root / "train")
            if classes != self.classes:
                raise SystemExit(f"{root}/train and {root}/val: {differing(classes, self.classes)}")
        others = sum(len(files) for _, _, files in os.walk(folder)) - len(self)
        left_out = f", {others} other files left out" if others else ""
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder}: {len(self.classes)} classes, {len(self)} images{left_out}", flush=True)

    def find_classes(self, folder):
        classes, _ = super().find_classes(folder)
        classes = [name for name in classes if not name.startswith(".")]
        return classes, {name: k for k, name in enumerate(classes)}


def read_image(path):
    """An RGB image. Raises RuntimeError, with its name, if it is not an image of eight bits."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of mode {image.mode}, which do not fit in eight bits")
            return image.convert("RGB")
    except Exception as error:                              # PIL fails in many ways
        raise RuntimeError(f"{path} cannot be read ({reason(error)})") from None


def shuffled(count, limit):
    """The first `limit` of a fixed order: files come sorted by class, and every part needs all."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def load_folder(root, train, size, limit):
    data = ImageFolder(root, train, lambda image: resize(torch.as_tensor(np.array(image))[None], size)[0])
    order = shuffled(len(data), limit)
    images = torch.empty(len(order), size, size, 3, dtype=torch.uint8)
    for k, index in enumerate(progress(order.tolist(), "reading images", len(order))):
        try:
            images[k] = data[index][0]
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
    return images, torch.tensor(data.targets)[order], data.classes


# ---------------------------------------------------------------- augmentation

def augment(images, uniform, spec, cutout=0):
    """Augmented, normalized copies of uint8 images (B, H, W, 3): float (B, 3, H, W) in channels_last order.

    uniform: (B, 5) numbers in [0, 1), each image's own. In order: crop from the image padded by an eighth of
    its side (4 pixels for 32, as in DARTS), flip, normalize, cut out a square of `cutout` pixels.
    """
    B, H, W, _ = images.shape
    pad = (H + 4) // 8
    dy, dx = (uniform[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = dy[:, None] + torch.arange(H, device=images.device)                  # (B, H)
    across = torch.arange(W, device=images.device).expand(B, W)
    if spec.flip:
        across = torch.where(uniform[:, 2:3] < 0.5, across.flip(1), across)
    columns = dx[:, None] + across                                              # (B, W)
    padded = F.pad(images, (0, 0) + (pad,) * 4)
    batch = torch.arange(B, device=images.device)[:, None, None]
    crop = normalize(padded[batch, rows[:, :, None], columns[:, None, :]], spec)
    if cutout:
        crop = crop.masked_fill(cutout_mask(uniform[:, 3:], H, W, cutout), 0)
    return crop


def cutout_mask(uniform, H, W, side):
    """Where to cut: bool (B, 1, H, W), true in a square around a random pixel, where it lies in the image."""
    y, x = (uniform[:, 0] * H).long()[:, None], (uniform[:, 1] * W).long()[:, None]         # (B, 1)
    rows, columns = torch.arange(H, device=uniform.device), torch.arange(W, device=uniform.device)
    in_rows = (rows >= y - side // 2) & (rows < y - side // 2 + side)           # (B, H)
    in_columns = (columns >= x - side // 2) & (columns < x - side // 2 + side)  # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


@functools.cache
def constants(spec, device):                                # made once: a copy to a GPU would wait for it
    return tuple(torch.tensor(value, dtype=torch.float32, device=device) for value in (spec.mean, spec.std))


def normalize(images, spec):
    mean, std = constants(spec, images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- batches

def batch_indices(count, batch_size, train, generator, rank=0, world=1):
    """This process's share of every batch of an epoch, as index tensors; for training in random order.

    A batch for training is divided evenly: the last is cut to a multiple of the processes, and left out if a
    process would get a single image of it, which batch norm cannot do.
    """
    if not train:
        return torch.arange(count)[rank::world].split(max(1, batch_size // world))
    batches = torch.randperm(count, generator=generator).split(batch_size)
    batches = [batch[:len(batch) // world * world] for batch in batches if len(batch) >= 2 * world]
    if not batches:
        raise SystemExit(f"{count} images are too few for a batch: each of {world} process(es) needs two")
    return [batch[rank::world] for batch in batches]


class Batches:
    """Batches of a split on its device: `for images, labels in batches.epoch(e)`, a function of seed and e.

    train: in random order and augmented, which does not depend on the batch size or the number of processes.
    Otherwise every image once, as it is. Process `rank` of `world` gets its share of every batch.
    """

    def __init__(self, split, batch_size, seed=None, cutout=0, train=True, rank=0, world=1):
        self.split, self.seed, self.cutout, self.train, self.rank = split, seed, cutout, train, rank
        self.classes, self.size, self.count = split.classes, split.images.shape[1], len(split.labels)
        self.indices = functools.partial(batch_indices, self.count, batch_size, train, rank=rank, world=world)
        self.steps = len(self.indices(torch.Generator()))

    def epoch(self, epoch, skip=0):
        """The batches of an epoch; without the first `skip`."""
        images, labels, _, spec = self.split
        generator = torch.Generator().manual_seed(make_seed(self.seed, "epoch", epoch))
        indices = self.indices(generator)
        uniform = torch.rand(self.count, 5, generator=generator).to(labels.device)  # five for every image
        for batch in indices[skip:]:
            batch = batch.to(labels.device)
            if self.train:
                yield augment(images[batch], uniform[batch], spec, self.cutout), labels[batch]
            else:
                yield normalize(images[batch], spec), labels[batch]

    def stream(self, start):
        """Batches from number `start` on, epoch after epoch without end."""
        epoch, skip = divmod(start, self.steps)
        while True:
            yield from self.epoch(epoch, skip)
            epoch, skip = epoch + 1, 0


# ---------------------------------------------------------------- ImageNet

def imagenet_folder(args, train, augmented):
    """The images in train/ or val/ of --data, as DARTS's train_imagenet.py has them to train or to test."""
    spec, size = DATASETS["imagenet"], args.image_size or DATASETS["imagenet"].size
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.2)
    crop = ([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), jitter] if augmented else
            [v2.Resize(size * 8 // 7), v2.CenterCrop(size)])                    # 256 and 224
    to_floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, True), v2.Normalize(spec.mean, spec.std)]
    return ImageFolder(Path(args.data), train, v2.Compose([*crop, *to_floats]))


class ImageNet(Batches):
    """Batches of ImageNet, or of a folder like it, from disk.

    folder, kept: images, and the numbers of those to use; by default --limit of the train or val split.
    """

    def __init__(self, args, train, seed, device, rank=0, world=1, folder=None, kept=None):
        self.folder = imagenet_folder(args, train, train) if folder is None else folder
        self.kept = shuffled(len(self.folder), args.limit if train else None) if kept is None else kept
        self.classes, self.count = tuple(self.folder.classes), len(self.kept)
        self.size = args.image_size or DATASETS["imagenet"].size
        self.seed, self.workers, self.device, self.rank = seed, args.workers, device, rank
        share = {"rank": rank, "world": world}
        self.indices = functools.partial(batch_indices, self.count, args.batch_size, train, **share)
        self.steps = len(self.indices(torch.Generator()))

    def __getitem__(self, key):
        """For the loader: an image of an epoch. Its random numbers are its own, whatever process reads it."""
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(make_seed(self.seed, "image", epoch, index))
            return self.folder[self.kept[index].item()]

    def epoch(self, epoch, skip=0):
        order = torch.Generator().manual_seed(make_seed(self.seed, "epoch", epoch))
        keys = ([(epoch, index) for index in batch.tolist()] for batch in self.indices(order)[skip:])
        loader = DataLoader(self, batch_sampler=keys, num_workers=self.workers, generator=order,
                            pin_memory=self.device.type == "cuda")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})   # the workers keep it blocked: Ctrl-C is
        loader = iter(loader)                                       # for this process, which then ends them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            for images, labels in loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except RuntimeError as error:                       # of read_image, or a worker process was killed
            raise SystemExit(str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")) from None
