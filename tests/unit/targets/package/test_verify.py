"""`verify`: changed files, false descriptions, wrong answers; sample programs that give the answers of infer.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compressor.cli.app import app
from compressor.errors import ConfigError, PackageError, RunError, TargetUnavailable
from compressor.types import stand_in_path
from targets.package import infer, write_package
from targets.package.archive import write_sums
from targets.package.builds import build_cpp, find_sdk
from targets.package.platforms import APPS, MAVEN, SWIFT, SWIFT_VERSION, choose
from targets.package.verify import Verdict, opened, verify
from tests.unit.targets.package.conftest import save

Build = Callable[..., Path]


@pytest.fixture
def pack(tmp_path: Path) -> Build:
    def make(case, *platforms: str) -> Path:
        outcome, summary, info = case
        return write_package(outcome, summary, info, tmp_path / "run" / "packages", platforms=platforms)

    return make


def described_again(folder: Path) -> None:
    """Manifest and sums made true again after a change, so that the answers themselves have to tell."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry["sha256"] = infer.digest(folder / name)
        entry["bytes"] = (folder / name).stat().st_size
    bill = json.loads((folder / "sbom.cdx.json").read_text())
    for item in bill["components"]:
        name = manifest["model"]["file"] if item["bom-ref"] == "model" else item["name"]
        if "hashes" in item:
            item["hashes"][0]["content"] = manifest["files"][name]["sha256"]
    (folder / "sbom.cdx.json").write_text(json.dumps(bill))
    manifest["files"]["sbom.cdx.json"] = {
        "sha256": infer.digest(folder / "sbom.cdx.json"),
        "bytes": (folder / "sbom.cdx.json").stat().st_size,
    }
    path.write_text(json.dumps(manifest))
    write_sums(folder)


def test_a_true_package_passes_as_archive_and_as_folder(pictures, pack: Build) -> None:
    archive = pack(pictures, "cpp", "android", "ios")
    for place in (archive, archive.with_suffix("")):
        with opened(place) as folder:
            manifest, checks = verify(folder)
        assert {check.name: check.verdict for check in checks} == {
            "files": Verdict.PASSED,
            "manifest": Verdict.PASSED,
            "bill of materials": Verdict.PASSED,
            "answers of `model.onnx`": Verdict.PASSED,
        }
    assert manifest.platforms == ("python", "cpp", "android", "ios")
    bill = json.loads((archive.with_suffix("") / "sbom.cdx.json").read_text())
    linked = {item["name"] for item in bill["components"] if item["type"] == "library"}
    assert linked == {"onnxruntime", "numpy", "onnxruntime-android"}


def test_packages_with_sample_programs_are_the_same_bytes(sentences, pack: Build) -> None:
    first = pack(sentences, "cpp", "android", "ios").read_bytes()
    assert pack(sentences, "ios", "cpp", "android", "cpp").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"other"), "model.onnx: is not the file"),
        (lambda folder: (folder / "labels.txt").write_bytes(b"more"), "labels.txt: was not packed"),
        (lambda folder: (folder / "NOTICE").unlink(), "NOTICE: is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest_version: is None"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda folder: (folder / "cpp/src/main.cc").write_text("int main() {}"), "cpp/src/main.cc: is not the file"),
    ],
)
def test_a_changed_package_is_a_typed_error_that_names_the_file(pictures, pack: Build, change, words: str) -> None:
    folder = pack(pictures, "cpp").with_suffix("")
    change(folder)
    with pytest.raises(PackageError, match=words):
        verify(folder)


def test_a_bill_that_names_another_model_is_refused(pictures, pack: Build) -> None:
    folder = pack(pictures).with_suffix("")
    path = folder / "sbom.cdx.json"
    path.write_text(path.read_text().replace(infer.digest(folder / "model.onnx"), "0" * 64))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["sbom.cdx.json"] = {"sha256": infer.digest(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_sums(folder)
    with pytest.raises(PackageError, match=r"lists `model\.onnx` with another SHA-256"):
        verify(folder)


def test_other_weights_fail_the_answers_though_every_digest_is_true(pictures, pack: Build) -> None:
    folder = pack(pictures).with_suffix("")
    model = onnx.load(str(folder / "model.onnx"))
    weights = onnx.numpy_helper.to_array(model.graph.initializer[1]) * np.float32(1.01)
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, "v"))
    onnx.save(model, str(folder / "model.onnx"))
    described_again(folder)
    checks = {check.name: check for check in verify(folder)[1]}
    assert checks["answers of `model.onnx`"].verdict is Verdict.FAILED
    assert "differs by 0.01" in checks["answers of `model.onnx`"].text


def test_a_device_file_whose_runtime_is_elsewhere_is_said_to_be(engine, pack: Build) -> None:
    checks = {check.name: check for check in verify(pack(engine).with_suffix(""))[1]}
    assert checks["answers of `model.onnx`"].verdict is Verdict.PASSED
    assert checks["answers of `device/student.engine`"].verdict in (Verdict.NOT_HERE, Verdict.FAILED)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for make in (
        lambda path: None,
        lambda path: path.write_bytes(b"text"),
        lambda path: zipfile.ZipFile(path, "w").close(),
    ):
        path = tmp_path / "some.zip"
        make(path)
        with pytest.raises(PackageError), opened(path):
            pass


def test_the_command_prints_checks_and_ends_with_their_verdict(pictures, pack: Build) -> None:
    from typer.testing import CliRunner

    archive = pack(pictures)
    done = CliRunner().invoke(app, ["verify", str(archive), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["passed"]
    (archive.with_suffix("") / "NOTICE").write_text("other")
    refused = CliRunner().invoke(app, ["verify", str(archive.with_suffix(""))])
    assert isinstance(refused.exception, PackageError)
    assert refused.exception.exit_code == 2


def test_the_projects_pin_what_the_bill_of_materials_names(pictures, pack: Build) -> None:
    assert f'url: "{SWIFT}", exact: "{SWIFT_VERSION}"' in (APPS / "ios" / "Package.swift").read_text()
    folder = pack(pictures, "android").with_suffix("") / "android" / "app"
    name, version, _ = MAVEN["onnxruntime"]
    assert f'implementation("{name}:{version}")' in (folder / "build.gradle.kts").read_text()
    sources = {path.name for path in (folder / "src/main/java/compress/sample").iterdir()}
    assert "OnnxRunner.kt" in sources
    assert "LiteRtRunner.kt" not in sources
    assets = {path.name for path in (folder / "src/main/assets").iterdir()}
    assert assets == {"model.onnx", "settings.tsv", "samples.tsv", "samples.bin"}


def test_a_tflite_model_gives_an_android_project_with_litert(engine, pack: Build) -> None:
    outcome, summary, info = engine
    row = outcome.rows[0]
    path = row.compiled.path.with_suffix(".tflite")
    path.write_bytes(b"a file for LiteRT")
    row = dataclasses.replace(row, compiled=dataclasses.replace(row.compiled, path=path, extra_files=()))
    made = (dataclasses.replace(outcome, rows=(row,), target="litert"), summary, info)
    folder = pack(made, "android").with_suffix("") / "android" / "app"
    assert MAVEN["litert"][0] in (folder / "build.gradle.kts").read_text()
    assert "LiteRtRunner(source" in (folder / "src/main/java/compress/sample/ModelRunner.kt").read_text()
    assert (folder / "src/main/assets/student.tflite").read_bytes() == b"a file for LiteRT"


def test_a_core_ml_package_gives_an_ios_project_with_core_ml(engine, pack: Build, tmp_path: Path) -> None:
    outcome, summary, info = engine
    row, place = outcome.rows[0], tmp_path / "coreml"
    place.mkdir()
    with zipfile.ZipFile(place / "model.mlpackage.zip", "w") as archive:
        archive.writestr("model.mlpackage/Manifest.json", "{}")
        archive.writestr("model.mlpackage/Data/com.apple.CoreML/model.mlmodel", b"a program")
    (place / "mac.json").write_text('{"compute_units": "cpu-and-gpu"}')
    compiled = dataclasses.replace(
        row.compiled, path=place / "model.mlpackage.zip", extra_files=(), source_files=(place / "mac.json",)
    )
    outcome = dataclasses.replace(
        outcome, target="coreml", profile="iphone-15-pro", rows=(dataclasses.replace(row, compiled=compiled),)
    )
    folder = pack((outcome, summary, info), "ios").with_suffix("")
    sources, resources = folder / "ios/Sources/PackagedModel", folder / "ios/Sources/PackagedModel/Resources"
    assert (sources / "CoreMlRunner.swift").is_file()
    assert not (sources / "OnnxRunner.swift").exists()
    assert "CoreMlRunner(folder" in (sources / "ModelRunner.swift").read_text()
    assert "onnxruntime" not in (folder / "ios/Package.swift").read_text()
    assert not (folder / "ios/Package-coreml.swift").exists()
    assert (resources / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel").read_bytes() == b"a program"
    settings = dict(line.split("\t", 1) for line in (resources / "settings.tsv").read_text().splitlines())
    assert settings["model"] == "model.mlpackage"
    assert settings["compute_units"] == "cpu-and-gpu"
    assert float(settings["tolerance"]) == 0.02  # the last line of a key counts
    assert "swift:onnxruntime" not in (folder / "sbom.cdx.json").read_text()


def test_platforms_are_chosen_by_name_and_by_target() -> None:
    assert choose(["ios", "cpp", "cpp"], "onnxruntime-cpu") == ("python", "cpp", "ios")
    assert choose([], "web") == ("python", "web")
    with pytest.raises(ConfigError, match="unknown"):
        choose(["windows"], "onnxruntime-cpu")
    with pytest.raises(ConfigError, match="target web"):
        choose(["web"], "onnxruntime-cpu")


def test_the_sample_in_cpp_gives_the_answers_of_python(pictures, sentences, pack: Build, tmp_path: Path) -> None:
    """Built once; then pictures and sentences, stored ones and new ones, against infer.py."""
    try:
        find_sdk()
    except TargetUnavailable as error:
        pytest.skip(f"{error}: {error.hint}")
    folder = pack(pictures, "cpp").with_suffix("")
    program = build_cpp(folder, tmp_path / "cpp", build_type="Debug")

    def run(*words: str, package: Path) -> subprocess.CompletedProcess[str]:
        command = [str(program), "--data", str(package / "cpp" / "data"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("--self-check", package=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 samples, worst relative difference 0 " in done.stdout
    pixels = np.random.default_rng(9).integers(0, 256, (31, 17, 3), np.uint8)
    (tmp_path / "new.ppm").write_bytes(b"P6\n# made here\n17 31\n255\n" + pixels.tobytes())
    assert shares(run(str(tmp_path / "new.ppm"), package=folder).stdout) == python(folder, str(tmp_path / "new.ppm"))
    assert run("nothing.ppm", package=folder).returncode == 2
    texts = pack(sentences, "cpp").with_suffix("")
    done = run("--self-check", package=texts)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("Straße, ÉCOLE!? 中文", "[SEP] the film [MASK]", "한국 film ǅ İstanbul", "a" * 120 + " bad"):
        assert shares(run(text, package=texts).stdout) == python(texts, text)
    data = texts / "cpp" / "data" / "samples.bin"
    data.write_bytes(data.read_bytes()[:-8] + b"\x7f" * 8)
    assert run("--self-check", package=texts).returncode in (1, 2)


def shares(text: str) -> dict[str, str]:
    """Label to percentage from `  label 12.3 %  other 4.5 % ` on the second line."""
    words = [part.rsplit(" ", 1) for part in text.splitlines()[1].split(" % ") if part.strip()]
    return {label.strip(): share for label, share in words}


def python(folder: Path, given: str) -> dict[str, str]:
    """The same from infer.py's own code."""
    package = infer.Package(folder)
    session = package.session(None, False)
    _, inputs = next(package.inputs_of(given))
    names = [output.name for output in session.get_outputs()]
    found = infer.answer(dict(zip(names, session.run(None, inputs), strict=True)), package.manifest, 5)
    return {label: f"{100 * share:.1f}" for label, share in found["scores"].items()}


def test_a_format_that_this_runtime_lacks_is_not_tried_here_and_has_the_emulation_s_answers(
    pictures, pack: Build
) -> None:
    """bfloat16, which ONNX Runtime's CPU provider does not add; a device may."""
    outcome, summary, info = pictures
    row = outcome.rows[0]

    def model(path: Path, kind: int) -> Path:
        nodes = [
            helper.make_node("Cast", ["image"], ["narrow"], to=kind),
            helper.make_node("Add", ["narrow", "narrow"], ["twice"]),
            helper.make_node("Cast", ["twice"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["wide"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 12, 10])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
        return save(helper.make_graph(nodes, "sum", [image], [logits]), path)

    path = model(row.artifact.path.with_name("narrow.onnx"), TensorProto.BFLOAT16)
    narrow = dataclasses.replace(row, artifact=dataclasses.replace(row.artifact, path=path))
    made = dataclasses.replace(outcome, rows=(narrow,))
    with pytest.raises(RunError, match="NOT_IMPLEMENTED"):
        pack((made, summary, info))
    model(stand_in_path(path), TensorProto.FLOAT)
    checks = {check.name: check for check in verify(pack((made, summary, info)).with_suffix(""))[1]}
    check = checks["answers of `model.onnx`"]
    assert check.verdict is Verdict.NOT_HERE
    assert "NOT_IMPLEMENTED" in check.text
