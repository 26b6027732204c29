"""Data: read a source, cut it into disjoint parts, preprocess it with the teacher's own settings. No torch."""

from compressor.data.load import cut_rows, load_data, make_calibration
from compressor.data.raw import RawData, RawPart
from compressor.data.read import read_raw
from compressor.data.split import split_indices
from compressor.data.types import DataBundle, Split

__all__ = [
    "DataBundle",
    "RawData",
    "RawPart",
    "Split",
    "cut_rows",
    "load_data",
    "make_calibration",
    "read_raw",
    "split_indices",
]
