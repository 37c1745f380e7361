"""Data sets, augmentation and batches.

Small images live on the device as uint8 and are augmented there, a batch at a time. Constants:
DARTS (CIFAR-10) and RobustDARTS (CIFAR-100, SVHN). `digits` is in this repository; torchvision
reads the others, and downloads what is missing. ImageNet streams from disk by worker processes.
What is random in a run comes from make_seed; what takes long is shown by progress.
"""
import functools
import hashlib
import signal
import sys
import time
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from run import LOCAL_RANK, RANK, WORLD, number, read_json, reason, say


class Spec(NamedTuple):
    """size: side in pixels. mean, std: by channel, of pixels in [0, 1]. flip: mirror at random."""
    size: int
    mean: tuple
    std: tuple
    flip: bool = True


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "cifar10": Spec(32, (0.49139968, 0.48215827, 0.44653124),
                    (0.24703233, 0.24348505, 0.26158768)),                      # DARTS
    "cifar100": Spec(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),   # RobustDARTS
    "svhn": Spec(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),       # RobustDARTS
    "fashion_mnist": Spec(28, (0.2860,) * 3, (0.3530,) * 3),                    # its training split
    "digits": Spec(8, (0.3054,) * 3, (0.3753,) * 3, flip=False),                # its training split
    "folder": Spec(32, *IMAGENET),
    "imagenet": Spec(224, *IMAGENET),
}
FILES = {                                                   # what torchvision reads, under --data
    "cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat (which need `pip install scipy`)",
    "fashion_mnist": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
}


def add_data_flags(parser):
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", default="cifar10", choices=DATASETS,
        help="section 5.1: cifar10; Table 2: imagenet")
    add("--data", default="data",
        help="folder of the data sets; for imagenet and folder, of train/ and val/")
    add("--image_size", type=number(int, 8, 512),
        help="side to which images are resized (default: as they are; folder: 32, imagenet: 224)")
    add("--limit", type=number(int, 4),
        help="train on LIMIT images only: the first (of a folder's, in a fixed random order)")


class Split(NamedTuple):
    """A split, or a part of one.

    images: uint8 (N, H, W, 3) in memory, or (N,), the numbers of images in `folder` on disk.
    labels: int64 (N,). classes: names. spec: of these images. name: the whole split's number of
    images and checksum, and that of what a proxy file chose. device: where its batches are.
    workers: processes that read it from disk.
    """
    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    spec: Spec
    name: str
    device: torch.device
    folder: datasets.ImageFolder = None
    workers: int = 0

    def take(self, indices):
        return self._replace(images=self.images[indices], labels=self.labels[indices])


# ---------------------------------------------------------------- reading

def open_split(args, train, device, spec=None, augmented=True):
    """The train or test split of --data, in memory or, of ImageNet, on disk.

    spec: what a trained network was trained with, by default that of the data set at --image_size.
    augmented: whether training images on disk are augmented, as DARTS trains on them.
    SystemExit if images are missing or damaged.
    """
    default = DATASETS[args.dataset]
    spec = spec or default._replace(size=args.image_size or default.size)
    limit = args.limit if train else None
    if args.dataset == "imagenet":
        return open_imagenet(args, train, device, spec, train and augmented)
    if LOCAL_RANK > 0:                                      # one process of each machine reads
        dist.barrier()                                      # first, as it may download
    images, labels, classes = load(args.dataset, args.data, train, spec.size, limit)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    name = f"{len(images)} images of {len(classes)} classes, checksum {checksum:08x}"
    return Split(images.to(device), labels.to(device), classes, spec, name, device)


def load(name, root, train, size, limit=None):
    """(images, labels, names of the classes), images resized by area; the first `limit` only."""
    if name == "folder":
        images, labels, classes = load_folder(Path(root), train, size, limit)
    elif name == "digits":
        images, labels, classes = load_digits(train)
    else:
        images, labels, classes = load_torchvision(name, Path(root), train)
    images = torch.as_tensor(images[:limit])
    labels = torch.as_tensor(labels[:limit]).long()
    if images.dim() == 3:                                   # grey: three equal channels
        images = images[..., None].expand(-1, -1, -1, 3)
    if images.shape[1] != size:                             # in parts: floats take four times
        images = torch.cat([resize(part, size) for part in images.split(1000)])     # the memory
    return images.contiguous(), labels, [*map(str, classes)]


def resize(images, size):
    """uint8 images (B, H, W, 3) to size x size: a new pixel is the mean of the area it covers."""
    images = F.interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="area")
    return images.round().to(torch.uint8).permute(0, 2, 3, 1)


def load_digits(train):
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"] * 255.0 / 16, file["labels"]    # 8x8, values 0 to 16
    part = slice(0, 1437) if train else slice(1437, None)               # of 1,797
    return images.round().astype(np.uint8)[part], labels[part], range(10)


def load_torchvision(name, root, train):
    """Images (N, H, W, 3) or (N, H, W), labels, classes. torchvision downloads what is missing."""
    try:
        if name == "svhn":
            data = datasets.SVHN(root, "train" if train else "test", download=True)
            return data.data.transpose(0, 2, 3, 1), data.labels, range(10)
        names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
        data = getattr(datasets, names[name])(root, train, download=True)
        return data.data, data.targets, data.classes
    except Exception as error:                              # missing, damaged, no network or scipy
        raise SystemExit(
            f"{name} cannot be read under {root} or downloaded ({reason(error)}): put "
            f"{FILES[name]} there, or see --data; --dataset digits needs no files") from None


# ---------------------------------------------------------------- folders of images

class ImageError(OSError):
    """An image that cannot be read, in one line."""


class ImageFolder(datasets.ImageFolder):
    """torchvision's, of root/train or root/val. It says what it found and what it cannot read."""

    def __init__(self, root, train, transform=None):
        folder, self.left_out = root / ("train" if train else "val"), 0
        try:
            super().__init__(folder, transform, loader=read_image, is_valid_file=self.is_image)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{folder}/CLASS/IMAGE is needed ({reason(error)})") from None
        say(f"{folder}: {len(self.classes)} classes, {len(self)} images, {self.left_out} other "
            f"files left out")

    def find_classes(self, folder):
        """Names and numbers of classes, in one form: copies from macOS have accents apart."""
        one_form = functools.partial(unicodedata.normalize, "NFC")
        names = [name for name in super().find_classes(folder)[0] if not name.startswith(".")]
        names.sort(key=one_form)
        return [*map(one_form, names)], {name: k for k, name in enumerate(names)}

    def is_image(self, path):
        known = datasets.folder.has_file_allowed_extension(path, datasets.folder.IMG_EXTENSIONS)
        self.left_out += not known
        return known


def read_image(path):
    """An RGB image. Raises ImageError, with its name, if it is no image of eight bits."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of mode {image.mode}, which do not fit in eight bits")
            return image.convert("RGB")
    except Exception as error:                              # PIL fails in many ways
        raise ImageError(f"{path} cannot be read ({reason(error)})") from None


def shuffled(count, limit):
    """The first `limit` of a fixed order: files come sorted by class, and every part needs all."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def load_folder(root, train, size, limit):
    folder = ImageFolder(root, train)
    order = shuffled(len(folder), limit)
    images = torch.empty(len(order), size, size, 3, dtype=torch.uint8)
    for k, index in enumerate(progress(order, "reading images", len(order))):
        image = torch.as_tensor(np.array(folder[index][0]))
        images[k] = resize(image[None], size)[0]
    return images, torch.tensor(folder.targets)[order], folder.classes


def open_imagenet(args, train, device, spec, augmented):
    """Transforms: quark0/darts, cnn/train_imagenet.py."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.2)
    crop = [v2.Resize(spec.size * 8 // 7), v2.CenterCrop(spec.size)]            # 256 and 224
    if augmented:
        crop = [v2.RandomResizedCrop(spec.size), v2.RandomHorizontalFlip(), jitter]
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, True)]
    transform = v2.Compose([*crop, *to_float, v2.Normalize(spec.mean, spec.std)])
    folder = ImageFolder(Path(args.data), train, transform)
    kept = shuffled(len(folder), args.limit if train else None)
    files = [(str(Path(path).relative_to(folder.root)), label) for path, label in folder.samples]
    name = (f"{len(kept)} images of {len(folder.classes)} classes, checksum "
            f"{zlib.crc32(repr(files).encode()):08x} of the names")
    labels = torch.tensor(folder.targets)[kept]
    return Split(kept, labels, folder.classes, spec, name, device, folder, args.workers)


def read_proxy(args, split):
    """The halves that --proxy chose, for w and for alpha."""
    proxy = read_json(args.proxy)
    if proxy.get("split") != split.name:
        raise SystemExit(f"{args.proxy} chooses from {proxy.get('split', 'nothing')}, not from the "
                         f"{split.name} of --dataset {args.dataset} in {args.data}")
    chosen = [proxy["w"], proxy["alpha"]]
    name = f"{split.name}; of them those chosen by {zlib.crc32(repr(chosen).encode()):08x}"
    return [split.take(torch.tensor(half))._replace(name=name) for half in chosen]


# ---------------------------------------------------------------- augmentation

def augment(images, uniform, spec, cutout=0):
    """Augmented, normalized copies of uint8 images (B, S, S, 3): float (B, 3, S, S).

    uniform: (B, 5) numbers in [0, 1), each image's own. In order: crop from the image padded by an
    eighth of its side (4 pixels for 32, as in DARTS), flip, normalize, cut out a square of `cutout`
    pixels.
    """
    B, S = images.shape[:2]
    pad, pixels = (S + 4) // 8, torch.arange(S, device=images.device)
    start = (uniform[:, :2] * (2 * pad + 1)).long()
    rows, columns = (start[:, :, None] + pixels).unbind(1)                      # (B, S) each
    if spec.flip:
        columns = torch.where(uniform[:, 2:3] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (0, 0) + (pad,) * 4)
    batch = torch.arange(B, device=images.device)[:, None, None]
    crop = normalize(padded[batch, rows[:, :, None], columns[:, None]], spec)
    if cutout:
        near = pixels - (uniform[:, 3:] * S).long()[:, :, None] + cutout // 2   # (B, 2, S)
        rows, columns = ((near >= 0) & (near < cutout)).unbind(1)
        crop = crop.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)
    return crop


@functools.cache
def constants(spec, device):                                # once: a copy to a GPU waits for it
    return torch.tensor([spec.mean, spec.std], dtype=torch.float32, device=device)[..., None, None]


def normalize(images, spec):
    """uint8 (B, H, W, 3) to float (B, 3, H, W), contiguous: the weights set the layout."""
    mean, std = constants(spec, images.device)
    return (images.permute(0, 3, 1, 2).contiguous() / 255 - mean) / std


# ---------------------------------------------------------------- batches

def make_seed(*parts):
    """A seed from numbers and words, such as (seed, "epoch", 3). Other parts give other seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def share(order, batch_size):
    """Of an order of images, this process's part of every batch, as index tensors.

    All images train: the parts differ by one image at most, and what is left at the end and too
    small for batch norm, two images in each process, joins the batch before.
    """
    *batches, last = order.split(batch_size)
    if batches and len(last) < 2 * WORLD:
        last = torch.cat([batches.pop(), last])
    batches.append(last)
    if len(batches[0]) < 2 * WORLD:
        raise SystemExit(f"{len(batches[0])} images in a batch are too few: each of {WORLD} "
                         f"process(es) needs two")
    return [batch[RANK::WORLD] for batch in batches]


class Batches:
    """Batches of a split on its device: `for images, labels in batches.epoch(e)`.

    images: float (B, 3, H, W), labels: (B,). An epoch is a function of the seed and its number. To
    train: in random order and augmented, each image alike whatever the batch size and the number of
    processes. Otherwise every image once, as it is. Each process gets its part.
    """

    def __init__(self, split, batch_size, seed=None, cutout=0, train=True):
        self.split, self.batch_size, self.seed, self.cutout = split, batch_size, seed, cutout
        self.train, self.count = train, len(split.labels)
        self.steps = len(self.indices(torch.arange(self.count)))

    def indices(self, order):
        if self.train:
            return share(order, self.batch_size)
        part = order[RANK::WORLD]
        return part.split(max(1, self.batch_size // WORLD)) if len(part) else ()

    def draw(self, epoch):
        """(order of the images, generator) of an epoch."""
        generator = torch.Generator().manual_seed(make_seed(self.seed, "epoch", epoch))
        order = torch.randperm(self.count, generator=generator)
        return order if self.train else torch.arange(self.count), generator

    def epoch(self, epoch):
        """The batches of an epoch. The loop never waits for a GPU."""
        images, labels, spec = self.split.images, self.split.labels, self.split.spec
        order, generator = self.draw(epoch)
        uniform = torch.rand(self.count, 5, generator=generator).to(labels.device)  # of each image
        for batch in self.indices(order.to(labels.device)):
            if self.train:
                yield augment(images[batch], uniform[batch], spec, self.cutout), labels[batch]
            else:
                yield normalize(images[batch], spec), labels[batch]

    def shown(self, epoch, what):
        """An epoch's batches, with progress: of `what`."""
        return progress(self.epoch(epoch), what, self.steps, self.batch_size)

    def stream(self, epoch):
        """The batches of an epoch, and then, in other orders, more without end."""
        while True:
            yield from self.epoch(epoch)
            epoch = epoch, "again"                          # it only makes a seed


class DiskBatches(Batches):
    """Batches of images on disk, read by worker processes."""

    def __getitem__(self, key):
        """For the loader: an image. Its random numbers are its own, whatever process reads it."""
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(make_seed(self.seed, "image", epoch, index))
            return self.split.folder[self.split.images[index].item()]

    def epoch(self, epoch):
        order, generator = self.draw(epoch)
        keys = ([(epoch, index) for index in batch.tolist()] for batch in self.indices(order))
        device = self.split.device
        loader = DataLoader(self, batch_sampler=keys, num_workers=self.split.workers,
                            generator=generator, pin_memory=device.type == "cuda")
        for images, labels in read(loader):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def read(loader):
    """A loader's batches. Its workers keep SIGINT blocked: Ctrl-C is for us, and we end them."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield from batches
    except (ImageError, RuntimeError) as error:
        if "DataLoader worker" not in str(error):           # of the device, or read by no worker
            raise
        line = str(error).strip().splitlines()[-1]
        raise SystemExit(line.removeprefix("data.ImageError: ")) from None


def make_batches(split, *given, **options):
    """The Batches of a split, in memory or on disk."""
    return (DiskBatches if split.folder else Batches)(split, *given, **options)


def progress(items, what, total, images=0):
    """Yields the items, and says on stderr how many are done, and how long the rest will take.

    Every ten seconds on a terminal, every minute in a file. images: in an item, for their rate.
    """
    pause = 10 if sys.stderr.isatty() else 60
    first = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done == 1:
            first = now                                     # the first item takes longer: left out
        elif done > 1 and now - said > pause:
            said, each = now, (now - first) / (done - 1)    # seconds an item
            speed = f", {images / each:.0f} images/s" if images else ""
            say(f"{what}: {done} of {total}, {each * (total - done):.0f} s left{speed}", sys.stderr)
        yield item
