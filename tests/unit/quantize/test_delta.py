"""Delta packages (Q4): exact where they promise it, smaller errors for more ranks and bits, never a wrong model."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.delta_file import DeltaError, Reader, apply, find_tensors, read_delta, updated
from compressor.errors import ConfigError
from compressor.quantize.delta import Target, apply_delta, make_delta
from compressor.quantize.delta.factors import (
    BITS,
    EXACT_BITS,
    NOISE,
    STORED_BITS,
    deflated,
    gap_bytes,
    low_rank,
    packed_vectors,
    round_vector,
    sparse,
    spectrum,
)
from compressor.types import Array
from tests.onnx_models import Builder


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    """Singular values that fall off like those of a fine-tuning."""
    draw = np.random.default_rng(seed)
    rank = min(rows, columns)
    left, right = np.linalg.qr(draw.normal(size=(rows, rank)))[0], np.linalg.qr(draw.normal(size=(columns, rank)))[0]
    return ((left * np.exp(-np.arange(rank) / 4)) @ right.T).astype(np.float32)


def rebuilt(delta: Array, parts: tuple[tuple[int, int], ...]) -> Array:
    """float64: what a device adds to a base of zeros."""
    stored = low_rank("w", delta, spectrum(delta), parts)
    return updated(stored.entry, Reader(stored.data), np.zeros(delta.shape))


def error(delta: Array, parts: tuple[tuple[int, int], ...]) -> float:
    return float(np.linalg.norm(delta - rebuilt(delta, parts)) / np.linalg.norm(delta))


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("bits", [*BITS, EXACT_BITS])
def test_error_never_grows_with_the_rank(shape: tuple[int, int], bits: int) -> None:
    delta = matrix(*shape)
    errors = [error(delta, ((bits, rank),)) for rank in range(1, 21)]
    assert all(after <= before + 1e-7 for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_error_never_grows_with_the_bits(rank: int) -> None:
    delta = matrix(48, 20)
    errors = [error(delta, ((bits, rank),)) for bits in (*BITS, EXACT_BITS)]
    assert errors == sorted(errors, reverse=True)


def test_full_rank_in_float_is_the_new_tensor_but_for_the_last_places() -> None:
    for shape in ((48, 20), (20, 48), (24, 24)):
        assert error(matrix(*shape), ((EXACT_BITS, min(shape)),)) < 1e-6


def test_rounding_costs_the_errors_and_bits_that_are_counted_on() -> None:
    draw = np.random.default_rng(0)
    for bits in BITS:
        vector = draw.standard_normal(20_000).astype(np.float32)
        codes = round_vector(vector, bits)
        lost = 1 - float(vector @ codes) ** 2 / float((codes @ codes) * (vector @ vector))
        assert lost == pytest.approx(NOISE[bits], rel=0.35)
        assert 8 * len(deflated(packed_vectors(codes, bits))) / len(vector) == pytest.approx(
            STORED_BITS[bits], rel=0.06
        )


def test_sparse_keeps_the_largest_entries_and_long_gaps() -> None:
    delta = np.zeros((4, 1000), np.float32)
    delta[0, 3], delta[0, 4], delta[2, 999], delta[3, 998] = 4.0, -2.0, 1.0, 3.0
    stored = sparse("w", delta, 4, 8)
    made = updated(stored.entry, Reader(stored.data), np.ones(delta.shape, np.float32))
    assert np.abs(made - 1 - delta).max() < 4 / 127
    assert np.flatnonzero(made != 1).tolist() == np.flatnonzero(delta).tolist()
    assert gap_bytes(np.array([0, 1, 256, 513])).tolist() == [0, 0, 254, 255, 1]


# ------------------------------------------------------------------------------------------------ whole files

Change = Callable[[str, Array], Array]


def tuned(name: str, array: Array) -> Array:
    """A fine-tuning: a change of few directions in each matrix; the biases move a little."""
    if array.dtype.kind != "f":
        return array
    draw = np.random.default_rng(len(name))
    if array.ndim < 2:
        return (array + 0.01 * draw.normal(size=array.shape)).astype(array.dtype)
    return (array + 0.05 * matrix(len(array), array[0].size, len(name)).reshape(array.shape)).astype(array.dtype)


def network(path: Path, change: Change = lambda _, array: array, activation: str = "Relu") -> Path:
    """A table, matrices, int8 weights behind DequantizeLinear, a constant, and a part that stays."""
    b = Builder(0)

    def weight(name: str, array: Array, **how: bool) -> str:
        value = array if "frozen" in name else change(name, array)
        if how.get("typed"):
            b.weights.append(helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.ravel().tolist()))
            return name
        return b.weight(name, value)

    draw = np.random.default_rng(1)
    x = b.op("Gather", [weight("table", draw.normal(size=(90, 48)).astype(np.float32)), "ids"], "e")
    x = b.op("MatMul", [x, weight("first", draw.normal(size=(48, 64)).astype(np.float32))], "m1")
    x = b.op("Add", [x, weight("bias", draw.normal(size=64).astype(np.float32), typed=True)], "a1")
    x = b.op(activation, [x], "r1")
    x = b.op("MatMul", [x, weight("frozen", draw.normal(size=(64, 64)).astype(np.float32))], "m2")
    b.weight("codes", draw.integers(-90, 90, (64, 32)).astype(np.int8))
    if change is tuned:
        codes = numpy_helper.to_array(b.weights[-1]).astype(np.int64)
        b.weights[-1].CopyFrom(numpy_helper.from_array((codes + np.rint(9 * matrix(64, 32))).astype(np.int8), "codes"))
    b.weight("scale", np.array(0.02, np.float32))
    x = b.op("MatMul", [x, b.op("DequantizeLinear", ["codes", "scale"], "w3")], "m3")
    b.nodes.append(helper.make_node("Constant", [], ["shift"], value=numpy_helper.from_array(np.float32(0.5), "shift")))
    b.op("Add", [x, "shift"], "logits")
    model = b.model([("ids", TensorProto.INT64, ["n"])], [("logits", TensorProto.FLOAT, ["n", 32])])
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return network(folder / "base.onnx"), network(folder / "new.onnx", tuned)


def weights_of(path: Path) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_places_are_where_onnx_says_they_are(pair: tuple[Path, Path]) -> None:
    content = pair[0].read_bytes()
    places = find_tensors(content)
    for name, wanted in weights_of(pair[0]).items():
        assert np.array_equal(places[name].read(content), wanted), name
    assert places["shift"].read(content) == np.float32(0.5)


def test_places_in_nested_graphs(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["k"], ["y"])], "then", [], [helper.make_tensor_value_info("y", 1, [2])],
        [numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "k")],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["out"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("c", 9, [])], [helper.make_tensor_value_info("out", 1, [2])]
    )
    content = helper.make_model(graph).SerializeToString()
    assert find_tensors(content)["out/k"].read(content).tolist() == [1.0, 2.0]


def test_bit_for_bit_and_what_is_equal_costs_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = make_delta(*pair, tmp_path / "d", Target())
    apply_delta(pair[0], tmp_path / "d", tmp_path / "out.onnx")
    assert made.identical
    assert made.error == 0.0
    assert {row.name for row in made.rows} == {"table", "first", "bias", "codes"}
    for name, wanted in weights_of(pair[1]).items():
        assert np.array_equal(weights_of(tmp_path / "out.onnx")[name], wanted), name
    nothing = make_delta(pair[0], pair[0], tmp_path / "same", Target())
    assert not nothing.rows
    assert nothing.file_bytes < 700


def test_a_budget_is_kept_and_buys_accuracy(pair: tuple[Path, Path], tmp_path: Path) -> None:
    errors = []
    for share in (0.05, 0.1, 0.2, 0.4):
        made = make_delta(*pair, tmp_path / "d", Target(share=share))
        assert made.file_bytes <= share * pair[1].stat().st_size
        errors.append(made.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4
    make_delta(*pair, tmp_path / "d", Target(share=0.1))
    ranks = next(entry for entry in read_delta(tmp_path / "d").header["tensors"] if entry["name"] == "first")["parts"]
    assert [bits for bits, _ in ranks] == sorted({bits for bits, _ in ranks}, reverse=True)  # leading ones get more
    assert len(ranks) > 1


def test_an_error_target_holds_for_every_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sizes = []
    for limit in (0.5, 0.1, 0.01):
        made = make_delta(*pair, tmp_path / "d", Target(error=limit))
        assert all(row.error <= limit for row in made.rows), made.rows
        sizes.append(made.file_bytes)
    assert sizes == sorted(sizes)


def test_small_whole_numbers_stay_whole_and_others_exact(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_delta(*pair, tmp_path / "d", Target(share=0.2))
    apply_delta(pair[0], tmp_path / "d", tmp_path / "out.onnx")
    made, wanted = weights_of(tmp_path / "out.onnx"), weights_of(pair[1])
    assert made["codes"].dtype == np.int8
    assert np.abs(made["codes"].astype(int) - wanted["codes"].astype(int)).max() <= 3
    assert np.array_equal(made["bias"], wanted["bias"])  # short tensors are never approximated
    assert np.array_equal(made["frozen"], wanted["frozen"])


def test_checkpoints(pair: tuple[Path, Path], tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    for name, path in zip(("base", "new"), pair, strict=True):
        numpy_files.save_file(weights_of(path), tmp_path / f"{name}.safetensors")
    base, new = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    made = make_delta(base, new, tmp_path / "d", Target(share=0.25))
    apply_delta(base, tmp_path / "d", tmp_path / "out.safetensors")
    found, wanted = numpy_files.load_file(tmp_path / "out.safetensors"), numpy_files.load_file(new)
    assert made.file_bytes <= 0.25 * new.stat().st_size
    assert np.linalg.norm(found["first"] - wanted["first"]) < 0.2 * np.linalg.norm(
        wanted["first"] - weights_of(pair[0])["first"]
    )


# ------------------------------------------------------------------------------------------------ what is refused


def test_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_delta(*pair, tmp_path / "d", Target(share=0.2))
    with pytest.raises(ConfigError, match="not the file that this delta was made against") as found:
        apply_delta(pair[1], tmp_path / "d", tmp_path / "out.onnx")
    assert found.value.exit_code == 2
    assert not (tmp_path / "out.onnx").exists()


def test_another_topology_is_refused_by_the_name_of_its_node(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = network(tmp_path / "other.onnx", tuned, activation="Tanh")
    with pytest.raises(ConfigError, match=r"node 3 `r1_Tanh`.*Relu"):
        make_delta(pair[0], other, tmp_path / "d", Target(share=0.2))
    wider = network(
        tmp_path / "wider.onnx", lambda name, array: np.pad(array, ((0, 3), (0, 0))) if name == "table" else array
    )
    with pytest.raises(ConfigError, match=r"tensor `table`.*93x48.*90x48"):
        make_delta(pair[0], wider, tmp_path / "d", Target(share=0.2))


def test_an_impossible_budget_names_what_must_stay_exact(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must stay exact.*`bias`"):
        make_delta(*pair, tmp_path / "d", Target(bytes=100))
    with pytest.raises(ConfigError, match="would replace"):
        make_delta(*pair, pair[0], Target(share=0.2))


def test_damage_is_seen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_delta(*pair, tmp_path / "d", Target(share=0.2))
    base, content = pair[0].read_bytes(), (tmp_path / "d").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as stream:
        header, data = json.loads(stream.read("delta.json")), stream.read("data.bin")

    def file(header: object, data: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "bad", "w") as stream:
            stream.writestr("delta.json", json.dumps(header))
            stream.writestr("data.bin", data)
        return tmp_path / "bad"

    def refused(header: object, data: bytes, what: str) -> None:
        with pytest.raises(DeltaError, match=what):
            apply(base, read_delta(file(header, data)))

    first = header["tensors"][0]
    refused(header, data[:-9], "is damaged")
    refused({**header, "tensors": header["tensors"][1:]}, data, "damaged")
    refused({**header, "tensors": [{**first, "name": "nowhere"}]}, data, "no tensor `nowhere`")
    refused({**header, "tensors": [{**first, "kind": "magic"}]}, data, "does not know")
    refused({**header, "tensors": [{**first, "packed": "many"}]}, data, "is damaged")
    refused({**header, "delta_version": "2.0"}, data, "version 2.0")
    refused([], data, "version")
    for noise in (b"", content[: len(content) // 2], b"PK\x03\x04"):
        (tmp_path / "bad").write_bytes(noise)
        with pytest.raises(DeltaError):
            read_delta(tmp_path / "bad")
    with pytest.raises(DeltaError, match="complete"):
        find_tensors(base[:-40])


# ------------------------------------------------------------------------------------------------ the command


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    from compressor.cli import main

    monkeypatch.setattr(sys, "argv", ["compress-for-device", "delta", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delta, out = tmp_path / "update.delta", tmp_path / "out.onnx"
    assert run(monkeypatch, "make", *pair, "--out", delta, "--size", "20%") == 0
    assert "at most 20 % of the new model" in capsys.readouterr().out
    assert run(monkeypatch, "show", delta) == 0
    assert "rank" in capsys.readouterr().out
    assert run(monkeypatch, "apply", pair[0], delta, "--out", out) == 0
    assert out.stat().st_size == pair[0].stat().st_size
    assert run(monkeypatch, "apply", pair[1], delta, "--out", out) == 2
    assert "hint: Take the base" in capsys.readouterr().err
    assert run(monkeypatch, "make", *pair, "--out", delta, "--size", "a lot") == 2
    assert run(monkeypatch, "make", *pair, "--out", delta, "--exact", "--size", "9KiB") == 2
    assert run(monkeypatch, "make", tmp_path / "nothing", pair[1], "--out", delta) == 2
