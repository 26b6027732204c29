"""A package runs alone, says what it is, and notices when it was changed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from compressor.errors import CompileError, ConfigError
from compressor.types import Unavailable
from targets.outcome import ProfileOutcome, RunSummary
from targets.package import Manifest, PackageInfo, infer, load_info, unpack, write_package
from targets.package.sbom import licences

Case = tuple[ProfileOutcome, RunSummary, PackageInfo]
Build = Callable[[Case], Path]


def answers(case: Case, model: Path) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return [session.run(None, dict(sample))[0] for sample in case[2].samples]


def command(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """`infer.py` in a child process, isolated from this project and from the user's packages."""
    call = [python, "-I", str(folder / "infer.py"), *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, cwd=folder.parent)


def test_two_packages_of_one_run_are_the_same_bytes(pictures: Case, build: Build) -> None:
    first = build(pictures)
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    first.unlink()
    assert hashlib.sha256(build(pictures).read_bytes()).hexdigest() == digest
    assert not [path for path in first.parent.iterdir() if path.name.startswith(".this")]


def test_manifest_describes_every_file_and_figure(pictures: Case, build: Build) -> None:
    folder = build(pictures).with_suffix("")
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {*manifest.files, "manifest.json", "SHA256SUMS"}
    for name, entry in manifest.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry.sha256
    assert manifest.inputs[0].shape == ("batch", 3, 12, 10)
    assert manifest.postprocess.kind == "softmax"
    assert manifest.preprocess["settings"]["mean"] == [0.1, 0.2, 0.3]
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    assert figures["test"] == {
        "value": 0.9,
        "unit": "accuracy",
        "origin": "measured",
        "device": "a laptop",
        "detail": {},
    }
    assert figures["peak_memory"] == {"unavailable": "the process was too short to see", "hint": ""}
    subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=folder, check=True)


def test_readme_and_notice_say_what_was_measured_and_under_which_licence(pictures: Case, build: Build) -> None:
    folder = build(pictures).with_suffix("")
    page = (folder / "README.md").read_text()
    assert "<script>" not in page
    assert "90.00 %" in page
    assert "measured on a laptop" in page
    assert "unavailable: the process was too short to see" in page
    assert "python infer.py picture.png" in page
    assert "Its licence: apache-2.0" in (folder / "NOTICE").read_text()
    outcome, summary, info = pictures
    unknown = dataclasses.replace(summary, teacher={"source": "x", "licence": ""})
    folder = build((outcome, unknown, info)).with_suffix("")
    assert "NOT STATED" in (folder / "NOTICE").read_text()


def test_bill_of_materials_is_valid_cyclonedx(pictures: Case, sentences: Case, build: Build) -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib has the schema")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    for case in (pictures, sentences):
        text = (build(case).with_suffix("") / "sbom.cdx.json").read_text()
        assert validator.validate_str(text) is None
        kinds = [component["type"] for component in json.loads(text)["components"]]
        assert kinds.count("machine-learning-model") == 1
        assert kinds.count("library") == 2
    assert licences("a licence of our own") == [{"license": {"name": "a licence of our own"}}]
    assert licences(None) == []


@pytest.mark.parametrize("name", ["pictures", "sentences"])
def test_infer_gives_the_answers_of_the_runtime(name: str, build: Build, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    folder = build(case).with_suffix("")
    inputs = [str(value) for value in case[2].raw]
    if name == "pictures":
        np.save(folder.parent / "raw.npy", np.stack([np.asarray(value) for value in case[2].raw]))
        inputs = [str(folder.parent / "raw.npy")]
    out = folder.parent / "out.npz"
    done = command(folder, *inputs, "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    wanted = np.concatenate(answers(case, folder / "model.onnx"))
    np.testing.assert_array_equal(np.load(out)["logits"], wanted)
    named = [case[2].labels[index] for index in wanted.argmax(1)]
    assert [item["label"] for item in json.loads(done.stdout)] == named
    assert all(sum(item["scores"].values()) == pytest.approx(1) for item in json.loads(done.stdout))


def test_text_files_are_read_line_by_line(sentences: Case, build: Build) -> None:
    folder = build(sentences).with_suffix("")
    lines = folder.parent / "lines.txt"
    lines.write_text("the film is bad\n\ngood film\n", encoding="utf-8")
    done = command(folder, str(lines), "--json")
    assert [item["input"] for item in json.loads(done.stdout)] == ["the film is bad", "good film"]


def test_self_check_and_benchmark(pictures: Case, build: Build) -> None:
    folder = build(pictures).with_suffix("")
    done = json.loads(command(folder, "--self-check", "--json").stdout)
    assert done == {"passed": True, "samples": 3, "worst": 0.0, "tolerance": 1e-4, "problems": []}
    timed = json.loads(command(folder, "--benchmark", "--json").stdout)
    assert 0 < timed["p50_ms"] <= timed["p95_ms"]
    assert timed["runs"] >= 50


def test_a_changed_file_is_noticed(pictures: Case, build: Build) -> None:
    folder = build(pictures).with_suffix("")
    model = onnx.load(str(folder / "model.onnx"))
    model.doc_string = "tampered"
    onnx.save(model, str(folder / "model.onnx"))
    done = command(folder, "--self-check")
    assert done.returncode == 1
    assert "model.onnx: missing or changed" in done.stdout
    assert "FAILED" in done.stdout


def test_other_weights_or_other_preprocessing_fail_the_self_check(
    pictures: Case, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    """With matching digests, so that the answers themselves have to tell."""
    from targets.package.archive import write_sums

    folder = build(pictures).with_suffix("")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["preprocess"]["settings"]["mean"] = [0.1, 0.2, 0.31]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_sums(folder)
    assert infer.main(["--self-check"], folder) == 1
    assert "image: pre-processing gives another input" in capsys.readouterr().out
    build(pictures)
    model = onnx.load(str(folder / "model.onnx"))
    weights = onnx.numpy_helper.to_array(model.graph.initializer[1]) * np.float32(1.01)
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, "v"))
    onnx.save(model, str(folder / "model.onnx"))
    write_sums(folder)
    assert infer.main(["--self-check"], folder) == 1
    assert "logits: differs by 0.01" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nothing.png"], ["nothing.npy"]])
def test_what_is_not_there_is_an_error_without_a_traceback(
    pictures: Case, build: Build, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(pictures).with_suffix("")
    assert infer.main(arguments, folder) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_device_format_is_refused_politely_and_has_a_portable_twin(engine: Case, build: Build) -> None:
    archive = build(engine)
    folder = archive.with_suffix("")
    assert (folder / "device" / "student.engine").read_bytes() == b"an engine's bytes"
    assert (folder / "device" / "manifest.json").read_text() == '{"engine": 1}'
    assert (folder / "device" / "build_engine.py").is_file()
    assert json.loads((folder / "manifest.json").read_text())["model"]["file"] == "device/student.engine"
    refused = command(folder, "--self-check")
    assert refused.returncode == 2
    assert "does not drive" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert json.loads(command(folder, "--self-check", "--portable", "--json").stdout)["passed"]
    assert "--portable" in (folder / "README.md").read_text()
    assert unpack(archive, folder.parent / "elsewhere").name == "geforce-rtx-4070"


def test_a_build_kit_keeps_its_own_names(engine: Case, build: Build) -> None:
    outcome, summary, info = engine
    compiled = outcome.rows[0].compiled
    assert compiled is not None
    model = compiled.path.with_name("model.onnx")
    model.write_bytes(outcome.rows[0].artifact.path.read_bytes())
    row = dataclasses.replace(outcome.rows[0], compiled=dataclasses.replace(compiled, path=model))
    folder = build((dataclasses.replace(outcome, rows=(row,)), summary, info)).with_suffix("")
    kit = {path.name for path in (folder / "device").iterdir()}
    assert kit == {"model.onnx", "manifest.json", "build_engine.py"}
    assert command(folder, "--self-check").returncode == 2
    assert command(folder, "--self-check", "--portable").returncode == 0


def test_a_context_binary_in_an_onnx_envelope_is_a_devices_file(engine: Case, build: Build) -> None:
    outcome, summary, info = engine
    compiled = outcome.rows[0].compiled
    assert compiled is not None
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    node = onnx.helper.make_node("EPContext", ["x"], ["y"], "context", domain="com.microsoft", source="QNN")
    model = compiled.path.with_name("model_ctx.onnx")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])), model)
    made = dataclasses.replace(compiled, path=model, extra_files=(), source_files=())
    row = dataclasses.replace(outcome.rows[0], compiled=made)
    folder = build((dataclasses.replace(outcome, rows=(row,)), summary, info)).with_suffix("")
    assert json.loads((folder / "manifest.json").read_text())["model"]["file"] == "device/model_ctx.onnx"
    assert command(folder, "--self-check", "--portable").returncode == 0


def test_information_for_packing_again_is_kept(sentences: Case, build: Build) -> None:
    archive = build(sentences)
    before = archive.read_bytes()
    info = load_info(archive.parents[1])
    assert info.files == sentences[2].files
    assert list(info.raw) == list(sentences[2].raw)
    assert build((sentences[0], sentences[1], info)).read_bytes() == before
    with pytest.raises(ConfigError, match="cannot be read"):
        load_info(archive.parent)


def test_weights_beside_the_model_come_along(pictures: Case, build: Build) -> None:
    outcome, summary, info = pictures
    source = outcome.rows[0].artifact.path
    outside = source.parent / "external"
    outside.mkdir()
    onnx.save(
        onnx.load(str(source)), str(outside / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    artifact = dataclasses.replace(outcome.rows[0].artifact, path=outside / "m.onnx")
    moved = dataclasses.replace(outcome, rows=(dataclasses.replace(outcome.rows[0], artifact=artifact),))
    folder = build((moved, summary, info)).with_suffix("")
    assert (folder / "w.bin").is_file()
    assert json.loads(command(folder, "--self-check", "--json").stdout)["passed"]
    model = onnx.load(str(outside / "m.onnx"), load_external_data=False)
    for item in model.graph.initializer:
        item.external_data[0].value = "../secret.bin"
    (outside / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompileError, match="outside its folder"):
        build((moved, summary, info))


def test_nothing_is_packed_when_nothing_ships_and_the_old_package_stays(pictures: Case, build: Build) -> None:
    archive = build(pictures)
    before = archive.read_bytes()
    outcome, summary, info = pictures
    none = dataclasses.replace(outcome, rows=(), missing="no compiler")
    with pytest.raises(ConfigError, match="no compiler"):
        build((none, summary, info))
    broken = dataclasses.replace(info, files={"../escape": b""})
    with pytest.raises(ConfigError, match="not a name"):
        build((outcome, summary, broken))
    with pytest.raises(ConfigError, match="file name"):
        write_package(dataclasses.replace(outcome, profile="../up"), summary, info, archive.parent)
    assert archive.read_bytes() == before
    assert sorted(path.name for path in archive.parent.iterdir()) == [
        ".package-info",
        "this-machine",
        "this-machine.zip",
    ]


def test_a_softmax_at_the_end_is_not_applied_twice(pictures: Case, build: Build) -> None:
    outcome, summary, info = pictures
    path = outcome.rows[0].artifact.path
    model = onnx.load(str(path))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["before"], ["logits"]))
    onnx.save(model, str(path))
    folder = build((outcome, summary, info)).with_suffix("")
    np.save(folder.parent / "raw.npy", info.raw[0])
    found = json.loads(command(folder, str(folder.parent / "raw.npy"), "--json").stdout)[0]
    wanted = answers((outcome, summary, info), folder / "model.onnx")[0][0]
    assert found["scores"][found["label"]] == pytest.approx(float(wanted.max()), rel=1e-6)


def test_raw_inputs_and_embeddings(pictures: Case, build: Build) -> None:
    outcome, summary, info = pictures
    plain = PackageInfo(preprocess={"kind": "raw"}, samples=info.samples)
    folder = build((outcome, dataclasses.replace(summary, task="sentence-embedding"), plain)).with_suffix("")
    np.savez(folder.parent / "in.npz", **{name: value for name, value in info.samples[0].items()})  # type: ignore[arg-type]
    found = json.loads(command(folder, str(folder.parent / "in.npz"), "--json").stdout)[0]
    np.testing.assert_allclose(found["embedding"], answers(pictures, folder / "model.onnx")[0][0], rtol=1e-6)


def test_an_unavailable_latency_still_packs(pictures: Case, build: Build) -> None:
    outcome, summary, info = pictures
    row = dataclasses.replace(outcome.rows[0], latency=Unavailable("no board", "Attach one."))
    folder = build((dataclasses.replace(outcome, rows=(row,)), summary, info)).with_suffix("")
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert manifest["figures"]["latency"] == {"unavailable": "no board", "hint": "Attach one."}
    assert manifest["runtime"] == {"threads": 1, "graph_level": "all", "arena": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pictures", "sentences"])
def test_an_empty_environment_with_only_onnxruntime_and_numpy_is_enough(
    name: str, build: Build, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(name)
    python = bare_environment(tmp_path_factory)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {item["name"].lower() for item in json.loads(listed.stdout)}
    assert not installed & {"torch", "pillow", "tokenizers", "transformers", "onnx", "compress-for-device", "pydantic"}
    folder = unpack(build(case), tmp_path_factory.mktemp("unpacked"))
    checked = command(folder, "--self-check", "--json", python=python)
    assert json.loads(checked.stdout)["passed"], checked.stdout + checked.stderr
    inputs = [str(value) for value in case[2].raw]
    if name == "pictures":
        inputs = []
        for index, pixels in enumerate(case[2].raw):
            path = folder.parent / f"{index}.ppm"
            array = np.asarray(pixels)
            path.write_bytes(b"P6\n%d %d\n255\n" % (array.shape[1], array.shape[0]) + array.tobytes())
            inputs.append(str(path))
    out = folder.parent / "out.npz"
    done = command(folder, *inputs, "--out", str(out), python=python)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(out)["logits"], np.concatenate(answers(case, folder / "model.onnx")))


_BARE: list[str] = []


def bare_environment(factory: pytest.TempPathFactory) -> str:
    """A fresh venv with onnxruntime and numpy of this environment's versions; made once."""
    if not _BARE:
        folder = factory.mktemp("bare") / "venv"
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        wanted = [f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, capture_output=True, timeout=600)
        _BARE.append(python)
    return _BARE[0]


def test_npz_of_samples_needs_no_pickle(sentences: Case, build: Build) -> None:
    folder = build(sentences).with_suffix("")
    with np.load(io.BytesIO((folder / "samples.npz").read_bytes()), allow_pickle=False) as stored:
        assert str(stored["1.raw.value"]) == "a café, 你好 🙂"
        assert stored["0.output.logits"].shape == (1, 2)
