"""csv, json, parquet, npz, loaders: what is found in them and how faults are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compressor.data import load_data, read_raw
from compressor.data.raw import ONLY
from compressor.errors import ConfigError, PlanError
from compressor.recipe import DataConfig
from tests.unit.data.conftest import array_model


def raw(source: Path, **data: object):
    return read_raw(DataConfig(source=str(source), **data))


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"review": "good, really\nyes", "stars": 2}, {"review": "bad", "stars": 0}]
    (tmp_path / "a.csv").write_text('review,stars\n"good, really\nyes",2\nbad,0\n')
    (tmp_path / "a.tsv").write_text('review\tstars\n"good, really\nyes"\t2\nbad\t0\n')
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "c.json").write_text(json.dumps({key: [row[key] for row in rows] for key in rows[0]}))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["a.csv", "a.tsv", "a.json", "b.json", "c.json", "a.jsonl"]
    if __import__("importlib").util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        names.append("a.parquet")
    for name in names:
        part = raw(tmp_path / name, label="stars").parts["train"]
        assert part.kind == "texts", name
        assert part.samples == ["good, really\nyes", "bad"]
        assert [int(label) for label in part.labels] == [2, 0]


def test_numbers_become_a_matrix(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c,target\n" + "".join(f"{i},{i / 2},-1,{i % 2}\n" for i in range(30)))
    config = DataConfig(source=str(tmp_path / "x.csv"), validation=5, calibration=5)
    bundle = load_data(config, array_model(), seed=0)
    got = bundle.splits["train"].batch(np.array([0]))["x"]
    assert got.dtype == np.float32
    assert got[0, 1] == got[0, 0] / 2
    assert set(bundle.splits["test"].labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.csv", "text,label\nhello,1,2\n", "line 2: has more or fewer than 2 fields"),
        ("x.csv", "text,label\nhello\n", "line 2"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2: is not JSON"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "row 2: has the keys txt, not text"),
        ("x.json", "3", "neither a list of objects"),
        ("x.xlsx", "x", r"known are \.conll, \.csv"),
        ("x.csv", "a,b\nx,1\ny z,2\n", "there is no column `sentence`"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    extra = {"text": "sentence"} if "no column" in match else {}
    with pytest.raises(ConfigError, match=match):
        raw(tmp_path / name, **extra)


def test_wrong_column_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("sentence,label\nhello,1\n")
    with pytest.raises(ConfigError, match="did you mean `label`"):
        raw(tmp_path / "x.csv", label="labl")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        raw(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="parquet"):
        raw(tmp_path / "x.parquet")


def test_npz(tmp_path: Path) -> None:
    x, y = np.arange(24.0).reshape(8, 3), np.arange(8) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2] + 100, y_test=y[:2])
    parts = raw(tmp_path / "a.npz").parts
    assert {name: len(part) for name, part in parts.items()} == {"train": 8, "test": 2}
    np.savez(tmp_path / "b.npz", left=x, right=x, y=y)
    part = raw(tmp_path / "b.npz").parts["train"]
    assert set(part.samples) == {"left", "right"}
    np.savez(tmp_path / "c.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ConfigError, match="cannot be read safely"):
        raw(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match="cannot be read safely"):
        raw(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such.csv", "gone.npz", "a/b/c"])
def test_missing_sources(name: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_raw(DataConfig(source=name))


def test_empty_folder_and_no_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no IDX files"):
        raw(tmp_path)
    with pytest.raises(ConfigError, match="is required"):
        read_raw(DataConfig())


def test_folder_of_tables_and_test_by_name(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("val", 3), ("test", 2)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{name} {i},0\n" for i in range(count)))
    assert {name: len(part) for name, part in raw(tmp_path).parts.items()} == {"train": 6, "validation": 3, "test": 2}
    chosen = raw(tmp_path, test="val").parts
    assert {name: len(part) for name, part in chosen.items()} == {"train": 6, "test": 3}
    with pytest.raises(PlanError, match="neither a part of the source nor a path; did you mean `test`"):
        raw(tmp_path, test="tset")


def test_saved_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "d"))
    got = raw(tmp_path / "d")
    assert got.names == ("no", "yes")
    assert got.parts["train"].labels == ["yes", "no", "yes"]
    assert len(got.parts["test"]) == 1


LOADERS = """
import numpy as np
X = np.random.default_rng(0).random((20, 3))
def arrays(): return {"train": (X, np.arange(20) % 2), "test": (X[:4] + 9, [0, 1, 0, 1])}
def pictures(): return {"train": (np.zeros((3, 8, 8), np.uint8), None)}
def named(): return {"train": ({"a": X, "b": X}, None)}
def wrong(): return [1, 2]
def uneven(): return {"train": (X, [1, 2])}
def part(): return {"trian": (X, None)}
def fails(): return 1 / 0
def empty(): return {"train": (X[:0], None)}
"""


def test_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loaders_under_test.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)

    def call(name: str):
        return read_raw(DataConfig(), loader=f"loaders_under_test:{name}")

    got = call("arrays")
    assert got.parts["train"].samples[ONLY].shape == (20, 3)
    assert got.sample.shape == (3,)
    bundle = load_data(
        DataConfig(validation=4, calibration=2), array_model(), loader="loaders_under_test:arrays", seed=0
    )
    assert {name: len(split) for name, split in bundle.splits.items()} == {
        "test": 4,
        "validation": 4,
        "calibration": 2,
        "train": 14,
    }
    assert call("pictures").sample.shape == (8, 8, 1)
    assert set(call("named").sample) == {"a", "b"}
    with pytest.raises(PlanError, match="has no array for the input x"):
        load_data(DataConfig(), array_model(), loader="loaders_under_test:named", seed=0)
    for name, match in [
        ("wrong", "not a mapping"),
        ("uneven", "20 inputs but 2 labels"),
        ("part", "did you mean `train`"),
        ("fails", "ZeroDivisionError"),
    ]:
        with pytest.raises(ConfigError, match=match):
            call(name)
    with pytest.raises(PlanError, match="is empty"):
        call("empty")


def test_tables_need_no_training_packages(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c,y\n" + "".join(f"{i},1,2,0\n" for i in range(9)))
    code = (
        "import sys; from compressor.data import read_raw; from compressor.recipe import DataConfig\n"
        "read_raw(DataConfig(source=sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'PIL', 'pyarrow', 'tokenizers', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
