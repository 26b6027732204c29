"""Facts of an ONNX file, for users of the export package (they are defined beside the graph reader)."""

from compressor.models.onnx_facts import ModelFacts, WeightedNode, describe

__all__ = ["ModelFacts", "WeightedNode", "describe"]
