"""Language models as GGUF files: what they are, read without torch; transformers de-quantises their weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers knows some ten architectures of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError

FLOATS = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says of itself. ``formats``: how many tensors are stored in which format."""

    architecture: str
    licence: str | None
    layers: int | None
    parameters: int
    formats: tuple[tuple[str, int], ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """That the weights are not those that were trained, where they were quantized."""
        lossy = [f"{count} of {name}" for name, count in self.formats if name not in FLOATS]
        return (f"its weights are de-quantised, tensors: {', '.join(lossy)}",) if lossy else ()


def read_gguf(path: Path, name: str) -> GgufFacts:
    """Read the header of ``path``; ``name`` is what the user called it.

    Raises:
        ConfigError: the package ``gguf`` is missing, or the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError.single(
            f"`{name}`",
            "teacher.model",
            "GGUF files need the package `gguf`",
            hint="pip install 'compress-for-device[gguf]'",
        ) from error
    try:
        reader: Any = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if _single(field)}
        formats = Counter(str(tensor.tensor_type.name) for tensor in reader.tensors)
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        architecture = str(fields["general.architecture"])
    except (OSError, ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        what = f"is truncated or not a GGUF file: {type(error).__name__}: {error}"
        raise ConfigError.single(f"`{name}`", "teacher.model", what, hint="Fetch it again.") from error
    layers = fields.get(f"{architecture}.block_count")
    licence = fields.get("general.license")
    return GgufFacts(
        architecture=architecture,
        licence=None if licence is None else str(licence),
        layers=None if layers is None else int(layers),
        parameters=parameters,
        formats=tuple(sorted(formats.items())),
    )


def _single(field: Any) -> bool:
    """Not an array: vocabularies are long, and nothing here reads them."""
    return bool(field.types) and field.types[0].name != "ARRAY"
