"""Sample programs per platform, put beside the model: a complete small project with the model and its rules in it.

The sources of the programs are the same in every package (``targets/package/apps``); what differs are data files, made
here from the manifest: :mod:`targets.package.app_data`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from compressor.errors import ConfigError
from compressor.profile import Platform
from targets.package.app_data import ML_PACKAGE, write_data
from targets.package.manifest import Manifest

APPS = Path(__file__).parent / "apps"
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
DEVICE_ONLY: Mapping[str, str] = {"web": "web", "micro": "tflite-micro"}  # made by a back end, from its own files
# Coordinates and versions that the samples are written for; they go into the bill of materials.
MAVEN = {
    "onnxruntime": ("com.microsoft.onnxruntime:onnxruntime-android", "1.29.0", "MIT"),
    "litert": ("com.google.ai.edge.litert:litert", "2.1.5", "Apache-2.0"),
}
SWIFT = "https://github.com/microsoft/onnxruntime-swift-package-manager"
SWIFT_VERSION = "1.24.2"
_DATA = {"cpp": "data", "android": "app/src/main/assets", "ios": "Sources/PackagedModel/Resources"}
_SOURCES = "app/src/main/java/compress/sample"
_RUNNERS = {"onnxruntime": "LiteRtRunner.kt", "litert": "OnnxRunner.kt"}  # what the other runtime does not need


def choose(words: Iterable[str], target: str) -> tuple[Platform, ...]:
    """Platforms by name, each once, in the order of the catalogue. ``python`` is in every package.

    Raises :class:`ConfigError` for an unknown word, and for ``web`` and ``micro`` where the package's target does not
    make them.
    """
    wanted = set(words)
    for word in sorted(wanted):
        if word not in PLATFORMS:
            hint = f"Known: {', '.join(PLATFORMS)}."
            raise ConfigError.single("the package", "platform", f"`{word}` is unknown", hint=hint)
        if word in DEVICE_ONLY and target != DEVICE_ONLY[word]:
            what = f"`{word}` is made by the target {DEVICE_ONLY[word]}, and this package is for {target}"
            raise ConfigError.single("the package", "platform", what, hint=f"Use a profile of {DEVICE_ONLY[word]}.")
    if target in DEVICE_ONLY.values():
        wanted |= {name for name, maker in DEVICE_ONLY.items() if maker == target}
    return tuple(name for name in PLATFORMS if name in wanted | {"python"})


def write_apps(folder: Path, manifest: Manifest, platforms: Sequence[Platform]) -> None:
    """A folder per platform in the package ``folder``: sources, model, rules, samples."""
    for platform in platforms:
        if platform not in _DATA:
            continue
        app = folder / platform
        shutil.copytree(APPS / platform, app, ignore=shutil.ignore_patterns("build", ".*"))
        runtime = runtime_of(manifest, platform)
        data = app / _DATA[platform]
        data.mkdir(parents=True, exist_ok=True)
        write_data(folder, data, manifest, runtime, copy=platform != "cpp")
        if platform == "android":
            _fit_android(app, runtime)
        elif platform == "ios":
            _fit_ios(app, runtime)


def runtime_of(manifest: Manifest, platform: str) -> str:
    """What runs the model in that platform's sample: LiteRT for a ``.tflite`` on Android, Core ML for its package on
    iOS, otherwise ONNX Runtime."""
    if platform == "android" and manifest.model.file.endswith(".tflite"):
        return "litert"
    return "coreml" if platform == "ios" and manifest.model.file.endswith(ML_PACKAGE) else "onnxruntime"


def _fit_android(app: Path, runtime: str) -> None:
    """One runtime in the project: its coordinate in Gradle, its class in the sources."""
    (app / _SOURCES / _RUNNERS[runtime]).unlink()
    name, version, _ = MAVEN[runtime]
    _replace(app / "app/build.gradle.kts", "@RUNTIME@", f"{name}:{version}")
    if runtime == "litert":
        _replace(app / _SOURCES / "ModelRunner.kt", "OnnxRunner(", "LiteRtRunner(")


def _fit_ios(app: Path, runtime: str) -> None:
    """One runtime in the project: its class in the sources, and the package's file that asks for it, or for none."""
    sources, coreml = app / "Sources" / "PackagedModel", app / "Package-coreml.swift"
    if runtime != "coreml":
        coreml.unlink()
        (sources / "CoreMlRunner.swift").unlink()
        return
    coreml.replace(app / "Package.swift")
    (sources / "OnnxRunner.swift").unlink()
    _replace(sources / "ModelRunner.swift", "OnnxRunner(", "CoreMlRunner(")


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8", newline="\n")
