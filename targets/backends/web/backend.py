"""Browsers: the student in ONNX Runtime Web, executed in a real headless Chromium through WebAssembly.

The page runs on this machine, so latency is measured: by the page's own clock around each run, so that neither HTTP nor
the copying of tensors between processes is in it. Figures are those of this browser on this machine, not of a phone's.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import ClassVar

from compressor.errors import CompileError, RunError, TargetUnavailable, sdk_errors
from compressor.machine import detect, usable_cores
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets import toolchain
from targets.backends.web.options import options_of
from targets.backends.web.server import Browser, Page, browse, find_browser
from targets.base import Compiled, Missing, Ready, Session, TargetBackend, option_problems
from targets.coverage import coverage_of_run
from targets.plausible import random_inputs

TOOLCHAIN = "web"
PAGE = Path(__file__).parent / "page"
PACKAGED = ("package.html", "model.js", "npz.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class Web(TargetBackend):
    """ONNX Runtime Web in a headless Chromium."""

    name: ClassVar[str] = "web"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "browsers through ONNX Runtime Web (WebAssembly, SIMD, threads), run in Chromium here"
    memory_apart: ClassVar[str] = "the model lives in a process of the browser, whose memory is not told apart"

    def probe(self) -> Ready | Missing:
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        browser = find_browser()
        version = browser_version(browser) if browser else None
        if version is None:
            return Missing("no Chromium on the PATH", "Install Chromium (Debian: apt install chromium).")
        versions = {**toolchain.find(TOOLCHAIN).pins(), "chromium": version}
        return Ready(f"Chromium {version} on {detect().processor}", versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; an operator without a WebAssembly kernel shows when the page loads it."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """The ONNX file with the page and the runtime that load it; nothing is translated."""
        import onnx

        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started = time.perf_counter()
        folder = out / f"{artifact.name.replace('/', '-')}-web"
        folder.mkdir(parents=True, exist_ok=True)
        with sdk_errors(CompileError, f"read `{artifact.name}`", hint="Is the file a valid ONNX model?"):
            model = onnx.load(str(artifact.path))  # weights beside the file go into it: a page fetches one file
            onnx.save(model, str(folder / "model.onnx"))
        seconds = time.perf_counter() - started
        ran = nodes_that_ran(folder / "model.onnx", artifact, profile)
        return Compiled(
            path=folder / "model.onnx",
            artifact=artifact,
            placed=len(ran),
            coverage=coverage_of_run(ran, model),
            compile_seconds=seconds,
            source_files=_for_package(folder / "web"),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """The page in a headless browser, with the model loaded."""
        with _loaded(compiled.path, compiled.artifact, profile) as browser:
            yield WebSession(browser)


class WebSession:
    """Runs go to the page; their times come from the page's clock."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name."""
        return self._browser.ask({"count": 1, "outputs": True}, inputs)[1]

    def times_ns(self, inputs: Mapping[str, Array], count: int) -> Sequence[int]:
        """Time of each of ``count`` runs in the page, in ns; the clock of an isolated page ticks every 5 us."""
        facts, _ = self._browser.ask({"count": count, "outputs": False}, inputs)
        return [round(value * 1e6) for value in facts["times"]]


@contextmanager
def _loaded(model: Path, artifact: Artifact, profile: HardwareProfile, *, profiled: bool = False) -> Iterator[Browser]:
    """The page in a headless browser, with the model loaded."""
    executable = find_browser()
    if executable is None:
        raise TargetUnavailable("no Chromium on the PATH", hint="Install Chromium.")
    options, threads = options_of(profile), min(profile.runtime.threads, usable_cores())
    page = Page(page_files(model), {"threads": threads, "level": profile.runtime.graph_level, "profile": profiled})
    with browse(executable, page, options.timeout_s) as browser:
        facts, _ = browser.wait(f"load `{artifact.name}` in the browser")
        if not facts["isolated"] or facts["threads"] != threads:
            raise RunError(f"the page got {facts['threads']} threads instead of {threads}")
        yield browser


def nodes_that_ran(model: Path, artifact: Artifact, profile: HardwareProfile) -> tuple[tuple[str, str], ...]:
    """Name and operator of every node that ran on one plausible input, from the profiler of the browser's own runtime.

    Raises :class:`CompileError` where the page cannot load or run the file.
    """
    try:
        with _loaded(model, artifact, profile, profiled=True) as browser:
            facts, _ = browser.ask({"ran": True}, random_inputs(artifact.inputs, profile, seed=0))
    except RunError as error:
        raise CompileError(str(error), hint=error.hint) from error
    return tuple((str(name), str(operator)) for name, operator in facts["nodes"])


def runtime_files() -> dict[str, Path]:
    """ONNX Runtime Web's own files, by name."""
    folder = toolchain.find(TOOLCHAIN).folder / "node_modules" / "onnxruntime-web" / "dist"
    return {name: folder / name for name in RUNTIME}


def page_files(model: Path) -> dict[str, Path]:
    """What the measured page fetches, by name."""
    own = {name: PAGE / name for name in ("index.html", "runner.js")}
    return {**own, **runtime_files(), "model.onnx": model}


def _for_package(folder: Path) -> tuple[Path, ...]:
    """A page that loads the packaged model and repeats its stored answers, with the runtime: needs no network."""
    folder.mkdir(exist_ok=True)
    wanted = {**{name: PAGE / name for name in PACKAGED}, **runtime_files()}
    return tuple(
        Path(shutil.copyfile(path, folder / name.replace("package.html", "index.html")))
        for name, path in wanted.items()
    )


@cache
def browser_version(executable: str) -> str | None:
    """What ``--version`` says, without its name; None when it does not answer."""
    try:
        done = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    words = [word for word in done.stdout.split() if word[0].isdigit()]
    return words[0] if words else None
