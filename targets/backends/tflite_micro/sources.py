"""The microcontroller's sources: the model as a C array, and a program that loads it with just the operators it uses.

The calls are those of TensorFlow Lite for Microcontrollers: ``MicroMutableOpResolver`` and ``MicroInterpreter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.errors import CompileError
from targets.tflite.interface import Interface, Port

_BYTES_A_LINE = 16
# Method of MicroMutableOpResolver by builtin operator (tensorflow/lite/micro/micro_mutable_op_resolver.h).
RESOLVER = {
    "ABS": "AddAbs",
    "ADD": "AddAdd",
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "CAST": "AddCast",
    "CONCATENATION": "AddConcatenation",
    "CONV_2D": "AddConv2D",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "DEQUANTIZE": "AddDequantize",
    "DIV": "AddDiv",
    "ELU": "AddElu",
    "EXP": "AddExp",
    "FULLY_CONNECTED": "AddFullyConnected",
    "GATHER": "AddGather",
    "GATHER_ND": "AddGatherNd",
    "HARD_SWISH": "AddHardSwish",
    "LEAKY_RELU": "AddLeakyRelu",
    "LOG": "AddLog",
    "LOGICAL_AND": "AddLogicalAnd",
    "LOGISTIC": "AddLogistic",
    "MAXIMUM": "AddMaximum",
    "MAX_POOL_2D": "AddMaxPool2D",
    "MEAN": "AddMean",
    "MINIMUM": "AddMinimum",
    "MUL": "AddMul",
    "NEG": "AddNeg",
    "PAD": "AddPad",
    "PADV2": "AddPadV2",
    "QUANTIZE": "AddQuantize",
    "REDUCE_MAX": "AddReduceMax",
    "RELU": "AddRelu",
    "RELU6": "AddRelu6",
    "RESHAPE": "AddReshape",
    "RESIZE_BILINEAR": "AddResizeBilinear",
    "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
    "RSQRT": "AddRsqrt",
    "SELECT_V2": "AddSelectV2",
    "SOFTMAX": "AddSoftmax",
    "SQRT": "AddSqrt",
    "STRIDED_SLICE": "AddStridedSlice",
    "SUB": "AddSub",
    "SUM": "AddSum",
    "TANH": "AddTanh",
    "TRANSPOSE": "AddTranspose",
    "TRANSPOSE_CONV": "AddTransposeConv",
}
_C_TYPES = {"int8": "int8_t", "int32": "int32_t", "int64": "int64_t", "float32": "float", "bool": "bool"}


def unresolved(operators: Sequence[str]) -> tuple[str, ...]:
    """Operators without a kernel in TensorFlow Lite for Microcontrollers."""
    return tuple(sorted(set(operators) - set(RESOLVER)))


def write_sources(
    folder: Path, model: bytes, operators: Sequence[str], interface: Interface, arena_bytes: int
) -> tuple[Path, ...]:
    """Write ``model_data.h``, ``model_data.cc`` and ``main.cc`` into ``folder``. Raises :class:`CompileError`."""
    if absent := unresolved(operators):
        raise CompileError(f"TensorFlow Lite for Microcontrollers has no {', '.join(absent)}")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "model_data.h": _header(len(model), interface, arena_bytes),
        "model_data.cc": _array(model),
        "main.cc": _program(sorted(set(operators)), interface),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tuple(folder / name for name in texts)


def _header(size: int, interface: Interface, arena_bytes: int) -> str:
    lines = [
        "// The model, and the numbers that a program needs to feed it and to read its answer.",
        "// int8: real = scale * (stored - zero point). Pictures are channels last (height, width, channels).",
        "#ifndef MODEL_DATA_H_",
        "#define MODEL_DATA_H_",
        "",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        f"constexpr std::size_t kModelSize = {size};",
        "extern const unsigned char kModel[kModelSize];",
        "",
        "// Recorded on a 64-bit machine with a margin; 32-bit pointers need less.",
        f"constexpr std::size_t kArenaSize = {arena_bytes};",
    ]
    for kind, ports in (("Input", interface.inputs), ("Output", interface.outputs)):
        for place, port in enumerate(ports):
            lines += ["", *_constants(f"k{kind}{place}", port)]
    return "\n".join([*lines, "", "#endif  // MODEL_DATA_H_", ""])


def _constants(prefix: str, port: Port) -> list[str]:
    shape, count = ", ".join(map(str, port.shape)), 1
    for size in port.shape:
        count *= size
    lines = [f"// {port.name}: {port.dtype} ({shape})", f"constexpr std::size_t {prefix}Count = {count};"]
    if port.scale:
        lines.append(f"constexpr float {prefix}Scale = {port.scale!r}f;")
        lines.append(f"constexpr int {prefix}ZeroPoint = {port.zero_point};")
    return lines


def _array(model: bytes) -> str:
    rows = (
        "    " + ", ".join(f"0x{byte:02x}" for byte in model[start : start + _BYTES_A_LINE]) + ","
        for start in range(0, len(model), _BYTES_A_LINE)
    )
    head = '#include "model_data.h"\n\n// Tensors in the file are aligned relative to its start.\n'
    return head + "alignas(16) const unsigned char kModel[kModelSize] = {\n" + "\n".join(rows) + "\n};\n"


_PROGRAM = """// Loads the model with just the operators it uses and runs it once. Give FillInput your sensor's values.
// Build it with TensorFlow Lite for Microcontrollers and model_data.cc.
#include <cstddef>
#include <cstdint>

#include "model_data.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_log.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/micro/system_setup.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {

alignas(16) uint8_t arena[kArenaSize];

tflite::MicroInterpreter* Load() {
  static tflite::MicroMutableOpResolver<@COUNT@> resolver;
@ADDED@
  static tflite::MicroInterpreter interpreter(tflite::GetModel(kModel), resolver, arena, kArenaSize);
  return interpreter.AllocateTensors() == kTfLiteOk ? &interpreter : nullptr;
}

@FILL@
}  // namespace

int main() {
  tflite::InitializeTarget();
  tflite::MicroInterpreter* interpreter = Load();
  if (interpreter == nullptr) {
    MicroPrintf("the model does not load: is the arena of %d bytes too small?", static_cast<int>(kArenaSize));
    return 1;
  }
  FillInput(interpreter);
  if (interpreter->Invoke() != kTfLiteOk) {
    MicroPrintf("the model does not run");
    return 1;
  }
  const @RESULT@* found = interpreter->typed_output_tensor<@RESULT@>(0);
  std::size_t best = 0;
  for (std::size_t place = 1; place < kOutput0Count; ++place) {
    if (found[place] > found[best]) best = place;
  }
  MicroPrintf("largest output: %d", static_cast<int>(best));
  return 0;
}
"""


def _program(operators: Sequence[str], interface: Interface) -> str:
    parts = {
        "@COUNT@": str(len(operators)),
        "@ADDED@": "\n".join(f"  if (resolver.{RESOLVER[name]}() != kTfLiteOk) return nullptr;" for name in operators),
        "@FILL@": _fill(interface),
        "@RESULT@": _C_TYPES[interface.outputs[0].dtype],
    }
    text = _PROGRAM
    for mark, value in parts.items():
        text = text.replace(mark, value)
    return text


def _fill(interface: Interface) -> str:
    body = []
    for place, port in enumerate(interface.inputs):
        kind = _C_TYPES[port.dtype]
        zero = f"static_cast<{kind}>(kInput{place}ZeroPoint)" if port.scale else f"static_cast<{kind}>(0)"
        body += [
            f"  {kind}* input{place} = interpreter->typed_input_tensor<{kind}>({place});",
            f"  for (std::size_t at = 0; at < kInput{place}Count; ++at) input{place}[at] = {zero};",
        ]
    return "\n".join(["void FillInput(tflite::MicroInterpreter* interpreter) {", *body, "}", ""])
