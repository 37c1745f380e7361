"""Proxy data: the few training images that a search sees, chosen by a trained classifier's entropy.

    python proxy.py --dataset imagenet --data DIR --out proxy.json      by torchvision's ResNet-50
    python proxy.py --dataset cifar10 --classifier runs/.../weights.pt  by a network of retrain.py
    python proxy.py --dataset cifar10 --scheme random                   the baseline: no classifier
    python proxy.py --show proxy.json                                   the histogram in such a file

"VS-DARTS + Proxy" of Table 2 searches ImageNet on such images. They are chosen as by Na et al.,
Accelerating Neural Architecture Search via Proxy Data, IJCAI 2021: sampler.py of
nabk89/NAS-with-Proxy-data f98b345.
"""
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models import ResNet50_Weights, resnet50

from data import DATASETS, make_batches, open_split
from model import place
from retrain import load_network
from run import (WORLD, Parser, check_facts, find_device, fraction, natural, read_json, reason,
                 start)

BIN_WIDTHS = {"cifar10": 0.5, "cifar100": 0.25, "svhn": 0.2, "imagenet": 0.25}  # others: ours, 0.5


# ---------------------------------------------------------------- the choice

@torch.no_grad()
def entropies(classify, batches):
    """-sum of p ln p over the classes, for every image in order: float64 (N,)."""
    found = []
    for images, _ in batches.shown(0, "entropy"):
        log_p = classify(images).cpu().double().log_softmax(1)              # (B, classes)
        found.append((log_p.exp() * -log_p).sum(1))
    return torch.cat(found).numpy()


def histogram(entropy, width):
    """(edges, the bin of each image) of log10 entropy.

    The source crashes on two kinds of values. Here a value on an edge goes into the bin above, or
    the last one; and an entropy of 0 counts as the smallest positive one.
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
    weights = {"p1": counts.max() - counts + 1, "p2": 1, "p3": 1 / np.maximum(counts, 1)}
    weights = weights.get(scheme, counts) * (counts > 0)    # random: as many as there are
    return weights / weights.sum()


def draw(bins, scheme, size, seed):
    """`size` different images, shuffled: those drawn first come from the likelier bins."""
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
        raise SystemExit(f"ResNet-50 cannot be downloaded or read ({reason(error)}): put "
                         f"{weights.url} at {file}, or give --classifier") from None


def retrained(args, device):
    """(images -> logits, what it was trained on, its file) of --classifier."""
    file = Path(args.classifier)
    net, facts = load_network(file, device)
    net.eval()
    return lambda images: net(images)[0], facts, file


# ---------------------------------------------------------------- the file

def ranked(args, device):
    """(the split, the bin of each image, what --show prints of them), by a classifier."""
    classify, facts, file = (retrained if args.classifier else pretrained)(args, device)
    split = open_split(args, True, device, facts and facts["spec"], augmented=False)
    if facts:
        check_facts(file, facts, {"classes": split.classes})
    entropy = entropies(classify, make_batches(split, args.batch_size, train=False))
    edges, bins = histogram(entropy, BIN_WIDTHS.get(args.dataset, 0.5))
    counts = np.bincount(bins, minlength=len(edges) - 1)
    return split, bins, {
        "classifier": str(file), "mean": entropy.mean(), "min": entropy.min(), "max": entropy.max(),
        "bins": edges.round(6).tolist(), "counts": counts.tolist(),
        "weights": bin_weights(counts, args.scheme).tolist()}


def make_proxy(args):
    """The content of the file, as a dict. w, alpha: images, by their place in open_split."""
    device = find_device(args.device)
    if args.scheme == "random":                             # all images are in one bin
        split = open_split(args, True, device, augmented=False)
        bins, shown = np.zeros(len(split.labels), int), {"counts": [len(split.labels)]}
    else:
        split, bins, shown = ranked(args, device)
    size = int(args.fraction * len(bins))
    if args.dataset == "imagenet" and size >= 1000:
        size = size // 1000 * 1000                          # as the source: 128,000 of 1,281,167
    drawn = draw(bins, args.scheme, size, args.seed)
    chosen = np.bincount(bins[drawn], minlength=len(shown["counts"]))
    return {"scheme": args.scheme, "fraction": args.fraction, "seed": args.seed,
            "split": split.name, **shown, "chosen": chosen.tolist(),
            "w": drawn[:size // 2].tolist(), "alpha": drawn[size // 2:].tolist()}


def show(path):
    """Prints the histogram in a file: for each bin its images, its weight, and those chosen."""
    proxy = read_json(path)
    if "alpha" not in proxy:
        raise SystemExit(f"{path} was not written by proxy.py")
    print(f"{path}: {len(proxy['w'])} images for w, {len(proxy['alpha'])} for alpha, of the "
          f"{proxy['split']}; {proxy['scheme']}, seed {proxy['seed']}")
    if proxy["scheme"] == "random":
        return
    print("entropy {min:.3g} to {max:.3g}, mean {mean:.3g}\n"
          "  log10 entropy    images   weight   chosen".format(**proxy))
    for k, count in enumerate(proxy["counts"]):
        low, high = proxy["bins"][k:k + 2]
        print(f"{low:6.2f} to {high:6.2f} {count:8} {proxy['weights'][k]:8.4f} "
              f"{proxy['chosen'][k]:8} " + "#" * round(40 * count / max(proxy["counts"])))


# ---------------------------------------------------------------- the command

def parse(arguments):
    parser = Parser("proxy.py", description=__doc__)
    parser.set_defaults(image_size=None, limit=None, batch_size=256)
    add = parser.add_argument
    add("--dataset", default="imagenet", choices=DATASETS, help="whose training images")
    add("--data", default="data",
        help="folder of the data sets; for imagenet and folder, of train/")
    add("--classifier", metavar="FILE",
        help="weights.pt of retrain.py (default, for imagenet: ResNet-50)")
    add("--fraction", type=fraction, default=0.1,
        help="part of the images that is drawn; the source's scripts: 0.1")
    add("--scheme", default="p1", choices=("p1", "p2", "p3", "random"),
        help="weight of a bin of n images: p1 max(n) - n + 1, p2 1, p3 1/n; random: images alike")
    add("--seed", type=natural, default=777, help="of the draw; the source's script: 777")
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--workers", type=natural, default=4, help="processes that read ImageNet")
    add("--out", metavar="FILE", default="proxy.json", help="file to write")
    add("--show", metavar="FILE", help="print the histogram in such a file, and end")
    return parser.parse_args(arguments)


def main(arguments):
    args = parse(arguments)
    if args.show is not None:
        return show(args.show)
    if WORLD > 1:
        raise SystemExit("proxy.py runs in one process: start it without torchrun")
    if args.classifier is None and args.dataset != "imagenet" and args.scheme != "random":
        raise SystemExit(f"--classifier is needed: for {args.dataset} there is none to download")
    try:
        file = open(args.out, "x")                          # claimed: of two at once, one goes on
    except OSError as error:
        raise SystemExit(f"--out {args.out}: {reason(error)}; choose another name") from None
    try:
        with file:
            json.dump(make_proxy(args), file)
    except BaseException:
        Path(args.out).unlink()
        raise
    show(args.out)


if __name__ == "__main__":
    start(main)
