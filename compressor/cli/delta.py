"""``compress-for-device delta``: ship an update of a model as the compressed difference to what a device has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.output import facts, stdout_json, table

if TYPE_CHECKING:
    from compressor.quantize.delta import Report, Target

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Base = Annotated[
    Path, typer.Argument(metavar="BASE", help="What the device has: .onnx, .safetensors, checkpoint or package folder.")
]
New = Annotated[Path, typer.Argument(metavar="NEW", help="The update: the same model with other weights.")]
DeltaFile = Annotated[Path, typer.Argument(metavar="DELTA", help="A delta that `delta make` wrote.")]
Size = Annotated[str | None, typer.Option("--size", help="At most 10% of NEW, or 2.5MiB, 300KiB, 40000 (bytes).")]
delta_app = typer.Typer(help="Updates as compressed differences: make, apply, show.", no_args_is_help=True)
SHOWN = 12  # rows of the table
SIZES = {"B": 1, "KB": 1000, "MB": 1000**2, "KIB": 1 << 10, "MIB": 1 << 20}


@delta_app.command("make")
def make_command(
    base: Base,
    new: New,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("build/update.delta"),
    size: Size = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Accepted error of each tensor's change, e.g. 0.1 of it.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Bit for bit, however large.")] = False,
    json: Json = False,
) -> None:
    """Write the difference between two models of one topology, as small as asked (default: 10 % of NEW)."""
    from compressor.quantize.delta import make_delta, tensors_file

    target = _target(size, max_error, exact)
    file = tensors_file(base)
    made = make_delta(file, tensors_file(new), out, target, answers=_answers(base))
    if json:
        from dataclasses import asdict

        stdout_json(
            {**asdict(made), "delta": str(out), "target": str(target), "share": made.file_bytes / made.new_bytes}
        )
        return
    _show(made, out, target)


@delta_app.command("apply")
def apply_command(
    base: Base,
    delta: DeltaFile,
    out: Annotated[Path, typer.Option("--out", help="The updated .onnx or .safetensors file.")],
    json: Json = False,
) -> None:
    """Write the updated model. Exit code 2: BASE is not the one that the delta was made against."""
    from compressor.quantize.delta import apply_delta, tensors_file
    from compressor.types import file_digest

    apply_delta(tensors_file(base), delta, out)
    if json:
        stdout_json({"file": str(out), "bytes": out.stat().st_size, "digest": file_digest(out)})
        return
    print(f"{out}: {_bytes(out.stat().st_size)}, as packed ({file_digest(out)[:23]}...)")


@delta_app.command("show")
def show_command(delta: DeltaFile, json: Json = False) -> None:
    """Say what a delta holds, and which base it needs."""
    from compressor.delta_file import DeltaError, read_delta
    from compressor.errors import ConfigError
    from compressor.quantize.delta import form

    try:
        found = read_delta(delta)
    except DeltaError as error:
        hint = "Give a file that `delta make` wrote."
        raise ConfigError.single(f"`{delta}`", "delta", str(error), hint=hint) from error
    entries = found.header["tensors"]
    if json:
        stdout_json({**found.header, "file_bytes": delta.stat().st_size, "answers": len(found.answers)})
        return
    facts({"base": _side(found.header["base"]), "result": _side(found.header["result"]),
           "size": _bytes(delta.stat().st_size), "stored answers": len(found.answers)})  # fmt: skip
    table(["tensor", "stored as", "size"], [[item["name"], form(item), _bytes(item["packed"])] for item in entries])


def _side(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('name', '')} {_bytes(entry['bytes'])}, sha256:{entry['sha256']}".strip()


def _target(size: str | None, max_error: float | None, exact: bool) -> Target:
    from compressor.errors import ConfigError
    from compressor.quantize.delta import Target

    if sum((size is not None, max_error is not None, exact)) > 1:
        hint = "Give one of --size, --max-error and --exact."
        raise ConfigError.single("the command line", "--size", "is one of several aims", hint=hint)
    if exact:
        return Target()
    if max_error is not None:
        if not 0 < max_error < 1:
            what = f"{max_error:g} is not between 0 and 1"
            raise ConfigError.single(
                "the command line", "--max-error", what, hint="0.1 accepts a tenth of each change."
            )
        return Target(error=max_error)
    return _size("10%" if size is None else size)


def _size(text: str) -> Target:
    from compressor.errors import ConfigError
    from compressor.quantize.delta import Target

    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if share and 0 < float(share[1]) <= 100:
        return Target(share=float(share[1]) / 100)
    absolute = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmM][iI]?)?[bB]?", text)
    if absolute and float(absolute[1]) > 0 and not share:
        return Target(bytes=int(float(absolute[1]) * SIZES[f"{absolute[2] or ''}B".upper()]))
    hint = "Write 10%, 2.5MiB, 300KiB or a number of bytes."
    raise ConfigError.single("the command line", "--size", f"`{text}` is no size", hint=hint)


def _answers(base: Path) -> Callable[[bytes], Sequence[Mapping[str, Any]]] | None:
    """Outputs of an updated package for its own stored samples, through the session that its infer.py opens."""
    if not (base / "manifest.json").is_file():
        return None
    from compressor.errors import ConfigError
    from targets.package.infer import Package, RefusalError, open_session

    try:
        package = Package(base)
    except RefusalError as error:
        hint = "Give the .onnx file in it instead."
        raise ConfigError.single(f"`{base}`", "package", str(error), hint=hint) from error
    samples = package.stored()

    def run(model: bytes) -> list[dict[str, Any]]:
        session = open_session(model, package.manifest["runtime"])
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(None, sample["input"]), strict=True)) for sample in samples]

    return run if samples else None


def _show(made: Report, out: Path, target: Target) -> None:
    share = made.file_bytes / made.new_bytes
    print(f"{out}: {_bytes(made.file_bytes)}, {100 * share:.1f} % of the new model ({_bytes(made.new_bytes)})")
    kinds = Counter(row.form.split(":")[0].split(" ")[0] for row in made.rows)
    words = {"rank": "low rank", "bit": "bit for bit", "left": "left as in the base"}
    told = ", ".join(f"{count} {words.get(kind, 'largest entries')}" for kind, count in sorted(kinds.items()))
    wrong = (
        "none: every tensor is bit for bit the new one" if made.identical else f"{100 * made.error:.1f} % of the change"
    )
    facts(
        {
            "aim": target,
            "tensors": f"{len(made.rows)} changed ({told or 'none'}), {made.unchanged} unchanged",
            "change": f"{100 * made.change:.2f} % of the weights (Frobenius norm)",
            "error": wrong,
            "base": made.base_digest,
            "result": made.result_digest,
        }
    )
    largest = sorted(made.rows, key=lambda row: -row.elements)[:SHOWN]
    rows = [[row.name, f"{row.elements:,}", row.form, f"{100 * row.error:.1f} %"] for row in largest]
    table(["tensor", "elements", "stored as", "error of its change"], rows, f"largest {len(rows)} of {len(made.rows)}")


def _bytes(count: int) -> str:
    return f"{count / (1 << 20):.2f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"
