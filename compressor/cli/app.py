"""The commands and their options. Heavy imports stand inside the commands: ``--help`` must not load torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.delta import delta_app
from compressor.cli.toolchain import toolchain_app

app = typer.Typer(
    name="compress-for-device",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
profiles_app = typer.Typer(help="Hardware profiles: list them, show one.", no_args_is_help=True)
methods_app = typer.Typer(help="Distillation objectives: list them, show one.", no_args_is_help=True)
app.add_typer(profiles_app, name="profiles")
app.add_typer(methods_app, name="methods")
app.add_typer(delta_app, name="delta")
app.add_typer(toolchain_app, name="toolchain")


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"compress-for-device {version('compress-for-device')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and stop.")
    ] = False,
) -> None:
    """Make a trained network small, fast and still accurate on the device it must run on."""


Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the store, the runs and the packages.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint folder, hub id, model.gguf or .onnx, or pkg.mod:factory (your own code)."),
]
Data = Annotated[
    str | None, typer.Option("--data", help="Folder, csv/json/parquet/npz file, hub id, or pkg.mod:loader.")
]
Profiles = Annotated[
    list[str] | None, typer.Option("--profile", help="Device profile, or `all`; may be given several times.")
]
MaxDrop = Annotated[
    str | None, typer.Option("--max-drop", help="Accepted loss of accuracy against the teacher, e.g. 1%.")
]
Task = Annotated[
    str | None, typer.Option("--task", help="What the model is for, where its files do not say; see docs/tasks.md.")
]
RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe file (TOML). Left out: --model, --data, --profile.")]
Teachers = Annotated[
    list[str] | None,
    typer.Option("--teacher", help="A further teacher, NAME=pkg.mod:factory (your own code); may be repeated."),
]
Seeds = Annotated[
    int,
    typer.Option("--seeds", min=1, max=31, help="Train student and null twin with so many seeds, and compare them."),
]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="An attached device: PROFILE=ssh://user@host or PROFILE=adb://SERIAL; repeatable."),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that a hub model brings.")]


@app.command()
def run(
    recipe: RecipeFile = None,
    model: Model = None,
    data: Data = None,
    profile: Profiles = None,
    max_drop: MaxDrop = None,
    task: Task = None,
    out: Out = Path("build"),
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again even if nothing changed.")] = False,
    trust_remote_code: RemoteCode = False,
    teacher: Teachers = None,
    seeds: Seeds = 1,
    device: Devices = None,
    tracker: Annotated[
        str | None, typer.Option("--tracker", help="tensorboard or mlflow: curves, under the run folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Compress a model for devices: distil, prune, quantize, export, compile, measure, report, package."""
    from compressor.cli.run import run_command
    from compressor.cli.session import Request

    request = Request(
        recipe, model, data, tuple(profile or ()), max_drop, task, out, trust_remote_code, tuple(teacher or ()), seeds,
        tuple(device or ()),
    )  # fmt: skip
    raise typer.Exit(run_command(request, remeasure=remeasure, as_json=json, tracker=tracker))


@app.command()
def plan(
    recipe: RecipeFile = None,
    model: Model = None,
    data: Data = None,
    profile: Profiles = None,
    max_drop: MaxDrop = None,
    task: Task = None,
    out: Out = Path("build"),
    trust_remote_code: RemoteCode = False,
    teacher: Teachers = None,
    seeds: Seeds = 1,
    json: Json = False,
) -> None:
    """Say what `run` would do for each profile, and every problem, without computing anything."""
    from compressor.cli.plan import plan_command
    from compressor.cli.session import Request

    request = Request(
        recipe, model, data, tuple(profile or ()), max_drop, task, out, trust_remote_code, tuple(teacher or ()), seeds
    )
    raise typer.Exit(plan_command(request, as_json=json))


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="model.onnx")],
    profile: Profiles = None,
    device: Devices = None,
    json: Json = False,
) -> None:
    """Measure the latency and memory of an ONNX file on a profile. No data needed, nothing is changed."""
    from compressor.cli.latency import profile_command

    raise typer.Exit(profile_command(model, tuple(profile or ("this-machine",)), tuple(device or ()), as_json=json))


@app.command()
def targets(json: Json = False) -> None:
    """List the back ends and what each can do on this machine."""
    from compressor.cli.listing import targets_command

    raise typer.Exit(targets_command(as_json=json))


@profiles_app.command("list")
def profiles_list(json: Json = False) -> None:
    """List the built-in device profiles."""
    from compressor.cli.listing import profiles_list_command

    raise typer.Exit(profiles_list_command(as_json=json))


@profiles_app.command("show")
def profiles_show(name: Annotated[str, typer.Argument(help="Profile name or TOML file.")], json: Json = False) -> None:
    """Show one profile with the source of each figure."""
    from compressor.cli.listing import profiles_show_command

    raise typer.Exit(profiles_show_command(name, as_json=json))


@methods_app.command("list")
def methods_list(
    papers: Annotated[bool, typer.Option("--papers", help="All papers of the catalogue instead, by id.")] = False,
    json: Json = False,
) -> None:
    """List the registered distillation objectives, or the papers of the catalogue."""
    from compressor.cli.listing import methods_list_command, methods_rows_command

    raise typer.Exit(methods_rows_command(as_json=json) if papers else methods_list_command(as_json=json))


@methods_app.command("show")
def methods_show(
    name: Annotated[str, typer.Argument(help="Objective, catalogue id or paper: kd, X1, GKD.")], json: Json = False
) -> None:
    """Show one objective, id or paper: what it is, signals it needs, options, paper, a recipe to paste."""
    from compressor.cli.listing import methods_show_command

    raise typer.Exit(methods_show_command(name, as_json=json))


@app.command()
def recommend(
    task: Annotated[str, typer.Option("--task", help="image-classification, text-classification, ...")],
    classes: Annotated[int, typer.Option("--classes", min=0, help="How many; 0 for embeddings.")] = 0,
    labelled: Annotated[int, typer.Option("--labelled", min=0, help="Training samples with a label.")] = 0,
    unlabelled: Annotated[int, typer.Option("--unlabelled", min=0, help="Further samples without one.")] = 0,
    teacher: Annotated[str, typer.Option("--teacher", help="cnn, transformer or onnx.")] = "cnn",
    layers: Annotated[int, typer.Option("--layers", min=0, help="Of a transformer teacher: half of them stay.")] = 0,
    profile: Profiles = None,
    json: Json = False,
) -> None:
    """Propose a recipe for a task, its data and a device, and say why."""
    from compressor.cli.listing import recommend_command
    from compressor.recommend import facts_of

    given = facts_of(task, classes, labelled, unlabelled, teacher, tuple(profile or ("this-machine",)), layers)
    raise typer.Exit(recommend_command(given, as_json=json))


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (build/runs/<digest>).")],
    json: Json = False,
) -> None:
    """Print a run's table and write its report files again from report.json."""
    from compressor.cli.report import report_command

    raise typer.Exit(report_command(run_folder, as_json=json))


@app.command()
def package(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (build/runs/<digest>).")],
    profile: Profiles = None,
    platform: Annotated[
        list[str] | None,
        typer.Option("--platform", help="Sample programs to put in: cpp, android, ios (default: the profile's)."),
    ] = None,
    json: Json = False,
) -> None:
    """Write the packages of a run again (all profiles, or those given)."""
    from compressor.cli.report import package_command

    raise typer.Exit(package_command(run_folder, tuple(profile or ()), tuple(platform or ()), as_json=json))


@app.command()
def verify(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package: its folder or its .zip.")],
    build: Annotated[
        bool,
        typer.Option("--build", help="Also build and run its C++ sample, lint its Kotlin: this runs what it brings."),
    ] = False,
    arch: Annotated[
        str | None, typer.Option("--arch", help="arm64: also run the packaged runner on an emulated processor.")
    ] = None,
    cpu: Annotated[str | None, typer.Option("--cpu", help="cortex-a72 or cortex-a76 (default), with --arch.")] = None,
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", help="Inputs to answer there and here: .npy, .npz, .txt, a picture.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a package: every file's digest, manifest, bill of materials, and its stored answers."""
    from compressor.cli.verify import emulation_of, verify_command

    emulation = emulation_of(arch, cpu, tuple(inputs or ()))
    raise typer.Exit(verify_command(package, emulation, build=build, as_json=json))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="model.onnx, checkpoint folder, or pkg.mod:factory.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another form of the same model, e.g. its int8 file.")],
    data: Data = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Recipe whose [data] prepares the samples.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Validation samples to compare on.")] = 64,
    threshold: Annotated[float, typer.Option("--threshold", help="A layer below this many dB is bad.")] = 20.0,
    page: Annotated[Path, typer.Option("--page", help="Where the HTML page goes.")] = Path("build/diff.html"),
    json: Json = False,
) -> None:
    """Show where two forms of a model part: signal-to-noise per layer, first bad layer, worst samples."""
    from compressor.cli.diff import DiffRequest, diff_command

    request = DiffRequest(first, second, data, recipe, samples, threshold, page)
    raise typer.Exit(diff_command(request, as_json=json))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, what each target could do here, and what to install."""
    from compressor.cli.doctor import doctor_command

    raise typer.Exit(doctor_command(as_json=json))
