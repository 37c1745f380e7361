"""Proxy data: the few training images that a search sees, chosen by the entropy of a trained classifier.

    python proxy.py --dataset imagenet --data DIR --out proxy.json      with torchvision's ResNet-50
    python proxy.py --dataset cifar10 --classifier runs/.../weights.pt  with a network that retrain.py trained
    python proxy.py --show proxy.json                                   the histogram of a file made so

"VS-DARTS + Proxy" of Table 2 searches ImageNet on such images. They are chosen as by Na et al., Accelerating
Neural Architecture Search via Proxy Data, IJCAI 2021: sampler.py of nabk89/NAS-with-Proxy-data f98b345.
"""
import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models import ResNet50_Weights, resnet50

from data import DATASETS, Batches, ImageNet, imagenet_folder, load
from retrain import load_network
from run import Parser, differing, find_device, number, place, progress, read_json, reason, start, write

BIN_WIDTHS = {"cifar10": 0.5, "cifar100": 0.25, "svhn": 0.2, "imagenet": 0.25}          # others: ours, 0.5


# ---------------------------------------------------------------- the choice

@torch.no_grad()
def entropies(classify, batches):
    """-sum of p ln p over the classes, for every image in order: float64 (N,)."""
    found = []
    for images, _ in progress(batches.epoch(0), "entropy, in batches", batches.steps):
        log_p = classify(images).cpu().double().log_softmax(1)              # (B, classes)
        found.append((log_p.exp() * -log_p).sum(1))
    entropy = torch.cat(found).numpy()
    if not 0 < entropy.max() < np.inf:
        raise SystemExit(f"the largest entropy is {entropy.max()}: this classifier cannot rank images")
    return entropy


def histogram(entropy, width):
    """(edges, the bin of each image) of log10 entropy.

    The source crashes on two kinds of values. Here a value on an edge goes into the bin above, or the last
    one; and an entropy of 0 counts as the smallest positive one.
    """
    h = np.log10(np.maximum(entropy, entropy[entropy > 0].min()))
    low, high = np.round(h.min()), np.round(h.max())
    while low > h.min():
        low -= width
    while high < h.max() or high == low:
        high += width
    edges = low + width * np.arange(round((high - low) / width) + 1)
    bins = np.searchsorted(edges, h, side="right") - 1
    return edges, np.minimum(bins, len(edges) - 2)


def bin_weights(counts, scheme):
    """How likely a bin is drawn from. p1, the one proposed, favours bins of few images."""
    weights = {"p1": counts.max() - counts + 1, "p2": 1, "p3": 1 / np.maximum(counts, 1), "random": counts}
    weights = weights[scheme] * (counts > 0)
    return weights / weights.sum()


def draw(bins, scheme, size, seed):
    """`size` different images. They are shuffled, as those drawn first come from the likelier bins."""
    counts = np.bincount(bins)
    probabilities = (bin_weights(counts, scheme) / np.maximum(counts, 1))[bins]
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(bins), size, replace=False, p=probabilities)
    return generator.permutation(drawn)


# ---------------------------------------------------------------- classifier and images

def pretrained(args, device):
    """(images -> logits, None, its file) of torchvision's ResNet-50, the one there was in 2021."""
    weights = ResNet50_Weights.IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return place(resnet50(weights=weights), device).eval(), None, file
    except (OSError, RuntimeError) as error:                # no network, or another file
        raise SystemExit(f"ResNet-50 cannot be downloaded or read ({reason(error)}): put {weights.url} at "
                         f"{file}, or give --classifier") from None


def retrained(args, device):
    """(images -> logits, names of its classes, its file) of --classifier. Sets the side of the images."""
    file = Path(args.classifier)
    flags = argparse.Namespace(**{"dataset": None, **read_json(file.with_name("config.json")), "amp": False})
    if flags.dataset != args.dataset:
        raise SystemExit(f"{file} was trained on {flags.dataset}, not on {args.dataset}")
    net, classes = load_network(file, flags, device)
    net.eval()
    args.image_size = flags.image_size
    return lambda images: net(images)[0], classes, file


def read_images(args, device):
    """Every training image once, in order and not augmented."""
    if args.dataset == "imagenet":
        folder = imagenet_folder(args, True, augmented=False)
        return ImageNet(args, False, None, device, folder=folder, kept=torch.arange(len(folder)))
    split = load(args.dataset, args.data, True, args.image_size).to(device)
    return Batches(split, args.batch_size, train=False)


# ---------------------------------------------------------------- the file

def make_proxy(args):
    """The content of the file, as a dict."""
    device = find_device(args.device)
    classify, classes, file = (retrained if args.classifier else pretrained)(args, device)
    batches = read_images(args, device)
    if classes is not None and classes != list(batches.classes):
        raise SystemExit(f"{file} and {args.data}: {differing(classes, batches.classes)}")
    size = int(args.fraction * batches.count)
    if args.dataset == "imagenet" and size >= 1000:
        size = size // 1000 * 1000                          # as the source: 128,000 of 1,281,167
    if size < 4:
        raise SystemExit(f"--fraction {args.fraction} of {batches.count} images is too little")
    entropy = entropies(classify, batches)
    edges, bins = histogram(entropy, BIN_WIDTHS.get(args.dataset, 0.5))
    counts = np.bincount(bins, minlength=len(edges) - 1)
    drawn = draw(bins, args.scheme, size, args.seed)
    return {"program": "proxy.py", "dataset": args.dataset, "images": batches.count,
            "fraction": args.fraction, "scheme": args.scheme, "seed": args.seed,
            "classifier": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "mean": entropy.mean(), "min": entropy.min(), "max": entropy.max(),
            "bins": edges.round(6).tolist(), "counts": counts.tolist(),
            "weights": bin_weights(counts, args.scheme).tolist(),
            "chosen": np.bincount(bins[drawn], minlength=len(counts)).tolist(),
            "w": drawn[:size // 2].tolist(), "alpha": drawn[size // 2:].tolist()}


def read_file(path):
    proxy = read_json(path)
    if proxy.get("program") != "proxy.py":
        raise SystemExit(f"{path} was not written by proxy.py")
    return proxy


def show(path):
    """Prints the histogram in a file: for each bin its images, its weight, and those chosen."""
    proxy = read_file(path)
    print(f"{path}: {len(proxy['w'])} images for w, {len(proxy['alpha'])} for alpha, of ", end="")
    print("{images} of {dataset}; {scheme}, seed {seed}; entropy {min:.3g} to {max:.3g}, mean {mean:.3g}\n"
          "  log10 entropy    images   weight   chosen".format(**proxy))
    for k, count in enumerate(proxy["counts"]):
        low, high = proxy["bins"][k:k + 2]
        print(f"{low:6.2f} to {high:6.2f} {count:8} {proxy['weights'][k]:8.4f} {proxy['chosen'][k]:8} "
              + "#" * round(40 * count / max(proxy["counts"])))


def read_proxy(args, images):
    """The halves in --proxy, as indices of training images. A search has its own copy of the file."""
    copy = Path(args.out, "proxy.json")
    path = copy if copy.exists() else args.proxy
    proxy = read_file(path)
    if (proxy["dataset"], proxy["images"]) != (args.dataset, images):
        raise SystemExit(f"{path} is about {proxy['images']} images of {proxy['dataset']}, not about the "
                         f"{images} of {args.dataset} in {args.data}")
    chosen = proxy["w"] + proxy["alpha"]
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(images)):
        raise SystemExit(f"{path} names an image twice, or one that is not there")
    return [torch.tensor(proxy[half], dtype=torch.long) for half in ("w", "alpha")]


# ---------------------------------------------------------------- the command

def parse(arguments):
    parser = Parser("proxy.py", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="imagenet", choices=DATASETS, help="whose training images")
    add("--data", default="data", help="folder of the data sets; for imagenet and folder, of train/")
    add("--classifier", metavar="FILE", help="weights.pt of retrain.py (default, for imagenet: ResNet-50)")
    add("--fraction", type=number(float, 0, 1, above=True), default=0.1,
        help="part of the images that is drawn; the source's scripts: 0.1")
    add("--scheme", default="p1", choices=("p1", "p2", "p3", "random"),
        help="weight of a bin of n images: p1 max(n) - n + 1, p2 1, p3 1/n; random: all images alike")
    add("--seed", type=number(int, 0), default=777, help="of the draw; the source's script: 777")
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--workers", type=number(int, 0), default=4, help="processes that read ImageNet")
    add("--out", metavar="FILE", default="proxy.json", help="file to write")
    add("--show", metavar="FILE", help="print the histogram in such a file, and end")
    return parser.parse_args(arguments)


def main(arguments):
    args = parse(arguments)
    if args.show is not None:
        return show(args.show)
    if args.classifier is None and args.dataset != "imagenet":
        raise SystemExit(f"--classifier is needed: for {args.dataset} there is none to download")
    if Path(args.out).exists():
        raise SystemExit(f"--out {args.out} exists: choose another name")
    if not Path(args.out).parent.is_dir():
        raise SystemExit(f"--out {args.out}: there is no such folder")
    args.image_size, args.batch_size = None, 256
    write(args.out, json.dumps(make_proxy(args)))
    show(args.out)


if __name__ == "__main__":
    start(main)
