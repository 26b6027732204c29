"""Archives: the same bytes for the same content, and unpacking that trusts nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from compressor.errors import PackageError, Problem
from compressor.types import file_digest

SUMS = "SHA256SUMS"
AGAIN = "Get the package from its source again."
MAX_BYTES = 8 << 30  # of an unpacked package: no edge model is larger, a zip bomb is
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: archives must not differ by when they were made


def write_sums(folder: Path) -> None:
    """``SHA256SUMS`` over every other file of the folder, in the format of ``sha256sum --check``."""
    lines = [f"{file_digest(path).removeprefix('sha256:')}  {name}" for name, path in files_of(folder).items()]
    (folder / SUMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def files_of(folder: Path) -> dict[str, Path]:
    """Every file but the sums, by its POSIX path inside the folder, sorted."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != SUMS}


def write_zip(folder: Path, archive: Path) -> None:
    """Pack the folder under its own name: sorted entries, fixed times and modes. Atomic."""
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as stream:
            for name, path in [*files_of(folder).items(), (SUMS, folder / SUMS)]:
                entry = zipfile.ZipInfo(f"{folder.name}/{name}", _EPOCH)
                entry.create_system, entry.compress_type = 3, zipfile.ZIP_DEFLATED
                entry.external_attr = (stat.S_IFREG | (0o755 if name == "infer.py" else 0o644)) << 16
                with path.open("rb") as source, stream.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        with temporary.open("rb") as done:
            os.fsync(done.fileno())
        temporary.replace(archive)
    finally:
        temporary.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a package into ``folder`` and return the package's own folder in it.

    Refuses, with :class:`PackageError` and before anything is visible in ``folder``: entries that would leave it
    (absolute paths, ``..``, drive letters), links, duplicates, more bytes than a package has,
    and any file whose SHA-256 is not in the package's ``SHA256SUMS``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder))
    try:
        with zipfile.ZipFile(archive) as stream:
            top = _check_entries(stream, archive)
            for entry in stream.infolist():
                if not entry.is_dir():
                    _extract(stream, entry, scratch / entry.filename)
        _check_sums(scratch / top, archive)
        target = folder / top
        if target.exists():
            raise _refused(archive, top, "is already there", hint="Unpack into an empty folder.")
        (scratch / top).replace(target)
        return target
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise _refused(archive, "archive", f"cannot be read: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_entries(stream: zipfile.ZipFile, archive: Path) -> str:
    """Every name is harmless and lies in one top folder, whose name is returned."""
    seen: set[str] = set()
    tops: set[str] = set()
    for entry in stream.infolist():
        name = entry.filename
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ":" in name or "\0" in name or {"..", "."} & set(parts):
            raise _refused(archive, name, "would be written outside the folder")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(archive, name, "is a link or a device, not a file")
        if name.casefold() in seen:
            raise _refused(archive, name, "stands there twice")
        if len(parts) < 2 and not entry.is_dir():
            raise _refused(archive, name, "does not lie in the package's folder")
        seen.add(name.casefold())
        tops.add(parts[0])
    if sum(entry.file_size for entry in stream.infolist()) > MAX_BYTES:
        raise _refused(archive, "archive", f"unpacks to more than {MAX_BYTES >> 30} GiB")
    if len(tops) != 1:
        raise _refused(archive, "archive", f"has {len(tops)} top folders instead of one")
    return tops.pop()


def _extract(stream: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """One file, never more bytes than its entry declares (checked above)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with stream.open(entry) as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _check_sums(folder: Path, archive: Path) -> None:
    if problems := sum_problems(folder):
        raise PackageError(f"`{archive.name}`", problems, hint=AGAIN)


def sum_problems(folder: Path) -> list[Problem]:
    """Every file that is missing, was changed, or was not packed, against the folder's ``SHA256SUMS``."""
    sums = folder / SUMS
    if not sums.is_file():
        return [Problem(SUMS, "is missing, so that nothing can be verified")]
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    found = files_of(folder)
    problems = [Problem(name, "is missing") for name in sorted(wanted.keys() - found.keys())]
    problems += [Problem(name, "was not packed (SHA256SUMS does not list it)") for name in found.keys() - wanted.keys()]
    for name in sorted(found.keys() & wanted.keys()):
        with found[name].open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != wanted[name]:
                problems.append(Problem(name, "is not the file that was packed (its SHA-256 differs)"))
    return problems


def _refused(archive: Path, where: str, what: str, hint: str = "") -> PackageError:
    return PackageError(f"`{archive.name}`", [Problem(where, what)], hint=hint or AGAIN)
