"""Build one TensorRT engine: the single code path of both flavours.

The module needs only the standard library and the vendor's bindings, because a build kit carries a copy of it to the
device as ``build_engine.py``. What TensorRT-RTX runs here is therefore, byte for byte, what enterprise TensorRT runs
there. Python 3.8 syntax: Jetson boards ship old interpreters.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Mapping  # noqa: UP035 - old interpreters

# A fixed table: a module's name never comes from a file.
MODULES = {"rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"), "enterprise": ("tensorrt",)}
# Written by the builder when it looks for a GPU that is not there; they say nothing about the model.
NOISE = ("catchCudaError", "--- Begin node ---", "--- End node ---", "Network must have at least one output")
KEPT_PREFIXES = (
    "Total Weights Memory",
    "Total Activation Memory",
    "Total Host Persistent",
    "Total Device Persistent",
    "Max Scratch",
)


class RefusalError(Exception):
    """TensorRT refused the request at ``stage``; ``nodes`` are the parser's findings, one mapping a node."""

    def __init__(self, stage: str, message: str, nodes: tuple[Mapping[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.stage = stage
        self.nodes = nodes


def load_module(flavour: str) -> Any:
    """Import the bindings of a flavour; ImportError when none of its modules is here."""
    failures = []
    for name in MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            failures.append(f"{name}: {error}")
    raise ImportError("; ".join(failures))


def clean(message: str) -> str:
    """One log message without the lines that only complain about the missing GPU."""
    lines = [line for line in message.splitlines() if line.strip() and not any(noise in line for noise in NOISE)]
    return " ".join(line.strip() for line in lines)


class Journal:
    """What is worth keeping of the builder's log: errors, warnings, memory lines and the layer table."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.memory: list[str] = []
        self.layers = ""

    def add(self, severity: str, message: str) -> None:
        """File one message.

        ``severity`` is the name of an ILogger.Severity: VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR.
        """
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if clean(message):
                self.errors.append(clean(message))
        elif severity == "WARNING":
            self.warnings.append(clean(message))
        elif message.startswith("Layers:"):
            self.layers = message
        elif message.startswith(KEPT_PREFIXES):
            self.memory.append(message)


def make_logger(trt: Any, journal: Journal) -> Any:
    """An ILogger that writes into ``journal``. The class is made here because its base comes from the bindings."""

    class JournalLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            journal.add(severity.name, message)

    return JournalLogger()


def parse_onnx(trt: Any, network: Any, logger: Any, onnx_path: str) -> None:
    """Fill ``network`` from the file. Raises RefusalError("parse") naming the nodes."""
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(onnx_path)
    nodes = []
    for index in range(parser.num_errors):
        parser_error = parser.get_error(index)
        nodes.append(
            {
                "name": parser_error.node_name(),
                "operator": parser_error.node_operator(),
                "what": clean(parser_error.desc()) or "unsupported",
            }
        )
    if not parsed or nodes:
        words = [f"{node['operator'] or 'node'} `{node['name']}`: {node['what']}" for node in nodes]
        raise RefusalError("parse", "the parser refused " + ("; ".join(words) or "the file"), tuple(nodes))
    if network.num_outputs == 0:  # garbage bytes parse "successfully" into an empty network
        raise RefusalError("parse", "the file holds no network (no output): it is not a valid ONNX model")


def add_shapes(builder: Any, config: Any, network: Any, shapes: Mapping[str, Any]) -> None:
    """One optimisation profile over all inputs; ``shapes`` maps a name to [minimum, optimum, maximum]."""
    shape_profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tuple(tensor.shape):
            continue
        dynamic = True
        if tensor.name not in shapes:
            raise RefusalError("shapes", f"input `{tensor.name}` has dynamic dimensions but no shape range")
        low, best, high = (tuple(shape) for shape in shapes[tensor.name])
        shape_profile.set_shape(tensor.name, low, best, high)
    if dynamic and config.add_optimization_profile(shape_profile) < 0:
        raise RefusalError("shapes", f"the shape ranges {dict(shapes)} do not fit the inputs")


def configure(trt: Any, builder: Any, request: Mapping[str, Any]) -> Any:
    """Explicit workspace (the default without a GPU is 64 GiB), detailed layer names, RTX's GPU generations."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request["workspace_mib"]) << 20)
    if request.get("sparse_weights"):
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    capabilities = request.get("compute_capabilities") or []
    if request["flavour"] == "rtx" and capabilities:
        members = trt.ComputeCapability.__members__
        config.num_compute_capabilities = len(capabilities)
        for position, name in enumerate(capabilities):
            if name not in members:
                raise RefusalError("target", f"{name} is not one of {', '.join(sorted(members))}")
            config.set_compute_capability(members[name], position)
    return config


def build(trt: Any, request: Mapping[str, Any], journal: Journal) -> dict[str, Any]:
    """Parse, build and write the engine.

    ``request``: flavour, onnx, engine (output path, or "" to stop after parsing), workspace_mib, sparse_weights, shapes
    {input: [min, opt, max]}, compute_capabilities (RTX only). Returns what the builder said about the engine. Raises
    RefusalError.
    """
    logger = make_logger(trt, journal)
    builder = trt.Builder(logger)
    # Strong typing is the only mode of TensorRT 11 and RTX, and a choice in 10: precision stands in the graph
    # everywhere.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse_onnx(trt, network, logger, str(request["onnx"]))
    reply = {
        "version": trt.__version__,
        "layers": "",
        "memory": [],
        "warnings": journal.warnings,
        "network_layers": network.num_layers,
    }
    if not request["engine"]:
        return reply
    config = configure(trt, builder, request)
    add_shapes(builder, config, network, request["shapes"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusalError("build", "; ".join(journal.errors) or "the builder gave no engine and no reason")
    target = Path(request["engine"])
    temporary = target.with_name("." + target.name + ".tmp")
    temporary.write_bytes(memoryview(plan))
    temporary.replace(target)
    reply.update(layers=journal.layers, memory=journal.memory)
    return reply


def main() -> int:
    """Build from the ``manifest.json`` that lies beside this file in a build kit."""
    arguments = argparse.ArgumentParser(description="Build the TensorRT engine of this kit on the device it is for.")
    arguments.add_argument("--flavour", choices=sorted(MODULES), default="enterprise")
    arguments.add_argument("--capability", action="append", default=[], help="TensorRT-RTX only: SM86, SM89 ...")
    options = arguments.parse_args()
    kit = Path(__file__).resolve().parent
    manifest = json.loads((kit / "manifest.json").read_text(encoding="utf-8"))
    onnx_path = kit / manifest["onnx"]
    if "sha256:" + hashlib.sha256(onnx_path.read_bytes()).hexdigest() != manifest["onnx_digest"]:
        sys.stderr.write(f"{onnx_path.name} is not the file the manifest describes\n")
        return 1
    request = dict(
        manifest["request"], onnx=str(onnx_path), engine=str(kit / manifest["engine"]), flavour=options.flavour
    )
    request["compute_capabilities"] = options.capability
    journal = Journal()
    try:
        reply = build(load_module(options.flavour), request, journal)
    except (RefusalError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    (kit / "layers.txt").write_text(reply["layers"], encoding="utf-8")
    sys.stdout.write("{}\n".format(request["engine"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
