"""Entry points of the group ``compress_for_device.targets`` -> one back end, imported only when it is asked for."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from compressor.config import suggestion
from compressor.errors import CompressError, ConfigError, TargetUnavailable, sdk_errors
from targets.base import Missing, Ready, TargetBackend

GROUP = "compress_for_device.targets"


def _found() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> tuple[str, ...]:
    """Names of all registered targets, ours and strangers', sorted. Imports none of them."""
    return tuple(sorted(_found()))


def get(name: str) -> TargetBackend:
    """The back end called ``name``.

    Raises :class:`ConfigError` for an unknown name and :class:`TargetUnavailable` for a plug-in that does not import.
    """
    found = _found()
    if name not in found:
        raise ConfigError.single(
            f"target `{name}`",
            "target",
            "unknown target" + suggestion(name, tuple(sorted(found))),
            hint="`compress-for-device targets` lists all; a plug-in registers itself by an entry point.",
        )
    point = found[name]
    with sdk_errors(TargetUnavailable, f"load target `{name}` ({point.value})", hint="Reinstall the plug-in."):
        backend = point.load()()
    if not isinstance(backend, TargetBackend):
        raise TargetUnavailable(
            f"target `{name}` ({point.value}) is not a TargetBackend",
            hint="A target is a class derived from targets.base.TargetBackend.",
        )
    return backend


def probe(name: str) -> Ready | Missing:
    """What target ``name`` can do on this machine; a plug-in that breaks its promise not to raise is Missing."""
    try:
        backend = get(name)
        with sdk_errors(TargetUnavailable, f"probe target `{name}`"):
            return backend.probe()
    except CompressError as error:
        return Missing(reason=str(error), hint=error.hint)


def probe_all() -> dict[str, Ready | Missing]:
    """:func:`probe` for every registered target. Never raises."""
    return {name: probe(name) for name in names()}
