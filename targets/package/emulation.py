"""The packaged runner on an emulated Arm processor: what only Arm's kernels would show. Simulated, not timed.

qemu-user runs the very aarch64 wheels that a board installs. ``infer.py`` repeats the stored samples there, and answers
further inputs there and here. A ``.tflite`` file runs in LiteRT there and here. Docs: docs/package.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import ConfigError, RunError, TargetUnavailable
from compressor.types import Array
from targets import toolchain, toolchain_arm64
from targets.package import infer
from targets.package.manifest import Manifest
from targets.package.verify import Check, Verdict, device_session

ARCHITECTURES = ("arm64",)
TOOLCHAIN = "arm64"
_SECONDS = 1800.0  # emulation takes seconds a run of a transformer
# Runs a .tflite on arrays of exactly its shapes: number.input.name in, number.output.name out.
_LITERT = """
import sys, numpy as np
from ai_edge_litert.interpreter import Interpreter
model, source, target = sys.argv[1:]
interpreter = Interpreter(model_path=model, num_threads=1)
interpreter.allocate_tensors()
details = {item["name"]: item for item in interpreter.get_input_details()}
places = interpreter.get_signature_runner("serving_default").get_output_details()
made, given = {}, np.load(source, allow_pickle=False)
samples = {}
for key in given.files:
    number, name = key.split(".", 1)
    samples.setdefault(number, {})[name] = given[key]
for number, inputs in samples.items():
    for name, array in inputs.items():
        interpreter.set_tensor(details[name]["index"], array.astype(details[name]["dtype"]))
    interpreter.invoke()
    made.update({number + "." + name: interpreter.get_tensor(item["index"]) for name, item in places.items()})
np.savez(target, **made)
"""


def check_emulated(
    folder: Path, manifest: Manifest, architecture: str, cpu: str, inputs: Sequence[Path]
) -> tuple[Check, ...]:
    """Every check on the emulated processor. What is missing is one check that is ``not here``.

    Raises :class:`ConfigError` for an architecture or a processor that is not emulated.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError.single("--arch", "architecture", f"`{architecture}` is unknown", hint="Known: arm64.")
    if cpu not in toolchain_arm64.CPUS:
        hint = f"Known: {', '.join(toolchain_arm64.CPUS)}."
        raise ConfigError.single("--cpu", "processor", f"`{cpu}` is not emulated here", hint=hint)
    if not toolchain.is_ready(TOOLCHAIN):
        reason = f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}: {toolchain.hint(TOOLCHAIN)}"
        return (Check(f"emulated {cpu}", Verdict.NOT_HERE, reason),)
    return tuple(_checks(folder, manifest, cpu, inputs))


def _checks(folder: Path, manifest: Manifest, cpu: str, inputs: Sequence[Path]) -> Iterator[Check]:
    flags = [] if manifest.model.format in ("onnx", "ort") else ["--portable"]
    yield _guarded(f"infer.py on an emulated {cpu}", lambda: _self_check(folder, cpu, flags))
    for path in inputs:
        yield _guarded(f"{path.name} on an emulated {cpu}", lambda path=path: _compare(folder, cpu, flags, path))
    if manifest.model.file.endswith(".tflite"):
        yield _guarded(f"LiteRT on an emulated {cpu}", lambda: _compare_litert(folder, manifest, cpu, inputs))


def _guarded(name: str, work: Any) -> Check:
    try:
        verdict, text = work()
    except TargetUnavailable as error:
        return Check(name, Verdict.NOT_HERE, f"{error} ({error.hint})")
    except (RunError, infer.RefusalError) as error:
        return Check(name, Verdict.FAILED, str(error))
    return Check(name, verdict, f"simulated: {text}")


def run_emulated(cpu: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The emulated Python with these arguments. Raises :class:`RunError` when it crashes or does not end."""
    command, environment = toolchain_arm64.command(toolchain.find(TOOLCHAIN).folder, cpu, *words)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"the emulated {cpu} did not end within {_SECONDS:g} s") from error
    if done.returncode not in (0, 1):
        raise RunError(
            f"the emulated {cpu} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    return done


def _self_check(folder: Path, cpu: str, flags: Sequence[str]) -> tuple[Verdict, str]:
    done = run_emulated(cpu, str(folder / "infer.py"), "--self-check", "--json", *flags)
    with suppress(ValueError):
        found = json.loads(done.stdout)
        text = f"{found['samples']} stored samples, worst relative difference {found['worst']:.3g}"
        text += f" (accepted {found['tolerance']:g})"
        return Verdict.PASSED if found["passed"] else Verdict.FAILED, "; ".join([text, *found["problems"]])
    raise RunError(f"infer.py said no JSON: {(done.stdout + done.stderr).strip()[-500:]}")


def _compare(folder: Path, cpu: str, flags: Sequence[str], path: Path) -> tuple[Verdict, str]:
    """The same inputs through the packaged runner there and here."""
    with tempfile.TemporaryDirectory() as place:
        there, here = Path(place) / "there.npz", Path(place) / "here.npz"
        words = [str(folder / "infer.py"), str(path.resolve()), "--json", *flags, "--out"]
        emulated = run_emulated(cpu, *words, str(there))
        native = subprocess.run([sys.executable, "-I", *words, str(here)], capture_output=True, text=True, check=False)
        for done, file in ((emulated, there), (native, here)):
            if not file.is_file():
                raise RunError(f"infer.py made no outputs: {done.stderr.strip()[-500:]}")
        return compared(dict(np.load(there)), dict(np.load(here)))


def compared(there: Mapping[str, Array], here: Mapping[str, Array]) -> tuple[Verdict, str]:
    """Equal largest outputs pass; how far the numbers are is said."""
    first = next(iter(here))
    same = np.argmax(there[first], -1) == np.argmax(here[first], -1)
    worst = max(infer.relative_difference(there[name], array) for name, array in here.items())
    text = f"same largest output in {int(same.sum())} of {same.size}, "
    text += f"worst relative difference to this machine {worst:.3g}"
    return Verdict.PASSED if bool(same.all()) else Verdict.FAILED, text


def _compare_litert(folder: Path, manifest: Manifest, cpu: str, paths: Sequence[Path]) -> tuple[Verdict, str]:
    """The stored samples and the inputs through LiteRT here; what its file was fed, through LiteRT there."""
    package = infer.Package(folder)
    given = [sample["input"] for sample in package.stored()]
    given += [made for path in paths for _, made in package.inputs_of(str(path))]
    fed: list[tuple[Mapping[str, Array], Mapping[str, Array]]] = []
    with device_session(folder, manifest) as session:
        call = session._call  # type: ignore[attr-defined]

        def recording(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            outputs = call(inputs)
            fed.append((dict(inputs), {name: np.array(array) for name, array in outputs.items()}))
            found: Mapping[str, Array] = outputs
            return found

        session._call = recording  # type: ignore[attr-defined]
        for sample in given:
            session.run(sample)
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "fed.npz", Path(place) / "made.npz"
        arrays: dict[str, Any] = {
            f"{number}.{name}": array for number, (asked, _) in enumerate(fed) for name, array in asked.items()
        }
        np.savez(source, **arrays)
        done = run_emulated(cpu, "-c", _LITERT, str(folder / manifest.model.file), str(source), str(target))
        if not target.is_file():
            raise RunError(f"LiteRT made no outputs: {done.stderr.strip()[-500:]}")
        found = np.load(target)
        name = manifest.outputs[0].name
        there = np.stack([found[f"{number}.{name}"] for number in range(len(fed))])
    return compared({name: there}, {name: np.stack([made[name] for _, made in fed])})
