"""MobileNetV2 on natural pictures: the photos and drawings of Debian's ``tuxpaint-stamps-default`` (796 PNG files).

    compress-for-device run recipes/mobilenet-v2.toml --model examples.mobilenet_v2.model:teacher \\
        --data examples.mobilenet_v2:load

The pictures have no ImageNet labels. The loader gives each the teacher's own top-1 class, so that the "accuracy" of a
student is its top-1 agreement with the teacher, and the teacher's is 100 % by construction.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("TUXPAINT_STAMPS", "/usr/share/tuxpaint/stamps"))
SIZE = 160  # pixels: a third of the cost of 224
CROPS = 3  # of each training picture
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's ImageNet normalisation

Part = tuple[np.ndarray, np.ndarray]


def pictures() -> list[np.ndarray]:
    """All stamps on white, uint8 (H, W, 3), in the order of their paths; mirrored copies are left out."""
    from PIL import Image

    paths = sorted(path for path in FOLDER.rglob("*.png") if "_mirror" not in path.stem and "_flip" not in path.stem)
    if not paths:
        raise FileNotFoundError(f"no pictures in {FOLDER}: apt install tuxpaint-stamps-default")
    made = []
    for path in paths:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        made.append(np.asarray(white.convert("RGB")))
    return made


def square(picture: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """The whole picture, or a box of it, as uint8 (SIZE, SIZE, 3)."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def crops(picture: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """The whole picture and random boxes of 60 to 100 % of its sides."""
    height, width = picture.shape[:2]
    found = [square(picture)]
    for _ in range(CROPS - 1):
        share = random.uniform(0.6, 1.0)
        left, top = random.uniform(0, width * (1 - share)), random.uniform(0, height * (1 - share))
        found.append(square(picture, (int(left), int(top), int(left + width * share), int(top + height * share))))
    return found


def load() -> dict[str, Part]:
    """The loader for ``--data examples.mobilenet_v2:load``: a quarter is test, whole; the rest is cropped."""
    random = np.random.default_rng(0)
    all_pictures = pictures()
    order = random.permutation(len(all_pictures))
    cut = len(order) // 4
    test = np.stack([square(all_pictures[i]) for i in order[:cut]])
    validation = np.stack([square(all_pictures[i]) for i in order[cut : cut + cut // 2]])
    train = np.stack([crop for i in order[cut + cut // 2 :] for crop in crops(all_pictures[i], random)])
    return {name: (part, top_1(part)) for name, part in (("train", train), ("validation", validation), ("test", test))}


def top_1(images: np.ndarray) -> np.ndarray:
    """The teacher's class for each picture, int64 (N,)."""
    import torch

    from examples.mobilenet_v2.model import teacher

    module = teacher()
    found = []
    with torch.inference_mode():
        for part in torch.from_numpy(images).split(32):
            x = part.permute(0, 3, 1, 2).float() / 255
            found.append(module((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).argmax(1))
    return torch.cat(found).numpy()
