"""Check the sample programs of a package beyond `verify --build`: the Kotlin compiled and its pre-processing run.

python -m tools.check_samples PACKAGE_FOLDER [--texts FILE] [--count 500] [--kotlin JARS]

JARS is a folder with a Kotlin compiler (for example the jars of Python's kotlin-jupyter-kernel); ONNX Runtime's
Java classes come from the tool chain `samples`. Swift is parsed with tree-sitter-swift where that is installed. What is
not here is said to be not here.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from targets import toolchain
from targets.package import infer
from targets.package.app_data import _escaped
from targets.package.builds import TOOLCHAIN, check_apps
from targets.package.verify import Check, Verdict, read_manifest

SOURCES = "app/src/main/java/compress/sample"
PORTABLE = ("PackageData", "Pictures", "Tokenizer", "PackagedModel", "ModelRunner", "OnnxRunner")
AAR = "node_modules/com.github.asus4.onnxruntime/Plugins/Android/onnxruntime.aar"
Inputs = dict[str, np.ndarray]


def jobs_of(
    package: infer.Package, texts: list[str], count: int, scratch: Path
) -> tuple[list[list[str]], list[Inputs]]:
    """Lines for the program, and the inputs that infer.py makes of the same."""
    if package.manifest["preprocess"]["kind"] == "text":
        chosen = [text for text in texts if text.strip()][:count]
        return [["text", text] for text in chosen], [package.tokens(text) for text in chosen]
    draw, jobs, wanted = np.random.default_rng(0), [], []
    converts = package.manifest["preprocess"]["settings"].get(
        "channels"
    )  # otherwise pictures must have the model's own
    axis = 1 if package.manifest["preprocess"]["settings"]["layout"] == "NCHW" else 3
    own = package.manifest["inputs"][0]["shape"][axis]
    for index in range(count):
        height, width = (int(size) for size in draw.integers(1, 200, 2))
        pixels = draw.integers(0, 256, (height, width, (3 if index % 3 else 1) if converts else own), np.uint8)
        path = scratch / f"{index}.bin"
        path.write_bytes(pixels.tobytes())
        jobs.append(["picture", *map(str, pixels.shape), str(path)])
        wanted.append(package.picture(pixels))
    return jobs, wanted


def compile_kotlin(folder: Path, jars: Path, scratch: Path) -> str:
    """Compile the Kotlin that needs no Android against ONNX Runtime's Java classes; its class path"""
    with zipfile.ZipFile(toolchain.find(TOOLCHAIN).folder / AAR) as archive:
        (scratch / "ort.jar").write_bytes(archive.read("classes.jar"))
    compiler = ":".join(map(str, sorted(jars.glob("*.jar"))))
    libraries = f"{next(jars.glob('kotlin-stdlib-[0-9]*.jar'))}:{scratch / 'ort.jar'}"
    sources = [str(folder / "android" / SOURCES / f"{item}.kt") for item in PORTABLE]
    sources.append(str(Path(__file__).parent / "samples" / "CheckInputs.kt"))
    command = ["java", "-Xss4m", "-cp", compiler, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib"]
    command += ["-no-reflect", "-cp", libraries, "-d", str(scratch / "app.jar"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return f"{scratch / 'app.jar'}:{libraries}"


def compare_inputs(folder: Path, classes: str, texts: list[str], count: int, scratch: Path) -> Check:
    """The compiled program and infer.py make inputs of the same texts, or of random pictures."""
    jobs, wanted = jobs_of(infer.Package(folder), texts, count, scratch)
    lines = ["\t".join(map(_escaped, job)) + "\n" for job in jobs]
    (scratch / "jobs.tsv").write_text("".join(lines), encoding="utf-8", newline="\n")
    command = ["java", "-cp", classes, "compress.sample.CheckInputsKt"]
    command += [str(folder / "android/app/src/main/assets"), str(scratch / "jobs.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected, found = [line_of(inputs) for inputs in wanted], done.stdout.splitlines()
    same = sum(one == other for one, other in zip(found, expected, strict=False))
    text = f"stored samples and {same} of {len(expected)} further inputs are infer.py's, byte for byte"
    verdict = Verdict.PASSED if found == expected else Verdict.FAILED
    return Check("Android sample, compiled", verdict, f"{text} {done.stderr[-300:]}".strip())


def check_compiled(folder: Path, jars: Path, texts: list[str], count: int) -> Check:
    """Compile, then compare."""
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        try:
            return compare_inputs(folder, compile_kotlin(folder, jars, scratch), texts, count, scratch)
        except RuntimeError as error:
            return Check("Android sample, compiled", Verdict.FAILED, str(error))


def line_of(inputs: Inputs) -> str:
    """As CheckInputs.kt prints it."""
    return "\t".join(f"{name}={hashlib.sha256(inputs[name].tobytes()).hexdigest()}" for name in sorted(inputs))


def check_swift(folder: Path) -> Check:
    """Every Swift file has a syntax tree without an error node. Types are not checked."""
    name = "iOS sample, parsed"
    try:
        import tree_sitter
        import tree_sitter_swift
    except ImportError as error:
        return Check(name, Verdict.NOT_HERE, f"{error.name} is not installed")
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    files = sorted((folder / "ios").rglob("*.swift"))
    broken = [path.name for path in files if parser.parse(path.read_bytes()).root_node.has_error]
    if broken:
        return Check(name, Verdict.FAILED, f"syntax errors in {', '.join(broken)}")
    return Check(
        name, Verdict.PASSED, f"{len(files)} files, no syntax error; types are not checked and nothing is built"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="an unpacked package with sample programs")
    parser.add_argument("--texts", type=Path, help="a file of sentences, one a line, for a model of texts")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--kotlin", type=Path, help="folder of jars with a Kotlin compiler")
    options = parser.parse_args()
    manifest = read_manifest(options.package)
    texts = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else []
    checks = [*check_apps(options.package, manifest)]
    if "android" in manifest.platforms and options.kotlin:
        checks.append(check_compiled(options.package, options.kotlin, texts, options.count))
    if "ios" in manifest.platforms:
        checks.append(check_swift(options.package))
    for check in checks:
        print(f"| {manifest.profile} | {check.name} | {check.verdict.value} | {check.text} |")
    return 1 if any(check.verdict is Verdict.FAILED for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
