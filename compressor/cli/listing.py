"""``targets``, ``profiles`` and ``methods``."""

from __future__ import annotations

from compressor.cli.output import facts, stdout_json, table
from compressor.profile import load_profile, profile_names


def targets_command(*, as_json: bool) -> int:
    """Every registered back end with what it can do on this machine."""
    from compressor.cli.session import target_views
    from targets.registry import get

    views = target_views()
    if as_json:
        stdout_json([{**vars(view), "summary": get(name).summary} for name, view in views.items()])
        return 0
    rows = []
    for name, view in views.items():
        can = (
            "missing"
            if not view.ready
            else f"compiles and runs ({view.runs})"
            if view.runs
            else "compiles, does not run here"
        )
        rows.append([name, can, view.reason or get(name).summary, view.hint])
    table(["target", "on this machine", "", "hint"], rows)
    return 0


def profiles_list_command(*, as_json: bool) -> int:
    """Every built-in profile in one line."""
    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        stdout_json([profile.model_dump(mode="json") for profile in profiles])
        return 0
    rows = [
        [
            item.name,
            item.target,
            item.compute.processor,
            str(item.runtime.threads),
            ", ".join(item.constraints.precisions),
        ]
        for item in profiles
    ]
    table(["profile", "target", "processor", "threads", "precisions"], rows)
    return 0


def profiles_show_command(name: str, *, as_json: bool) -> int:
    """One profile, each group of figures with its source."""
    profile = load_profile(name)
    if as_json:
        stdout_json(profile.model_dump(mode="json"))
        return 0
    print(f"{profile.name}: {profile.title}")
    for section in ("compute", "memory", "runtime", "constraints", "quantization"):
        print(f"\n{section}")
        facts(getattr(profile, section).model_dump(mode="json", exclude_none=True))
    if profile.options:
        print("\noptions")
        facts(profile.options)
    print("\nsources")
    for source in profile.sources:
        print(f"  {', '.join(source.figures)}: {source.title} {source.url or source.command or ''}".rstrip())
    return 0


def methods_list_command(*, as_json: bool) -> int:
    """Every registered objective with its first line."""
    from compressor.distil.objectives.registry import describe, names

    found = [describe(name) for name in names()]
    if as_json:
        stdout_json([vars(item) for item in found])
        return 0
    table(["objective", "what it is"], [[item.name, item.summary] for item in found])
    return 0


def methods_show_command(name: str, *, as_json: bool) -> int:
    """One objective's whole documentation."""
    from compressor.distil.objectives.registry import describe

    found = describe(name)
    if as_json:
        stdout_json(vars(found))
        return 0
    print(f"{found.name}\n\n{found.text}")
    if found.options:
        print("\noptions")
        facts({option: f"{kind} = {default}" for option, kind, default in found.options})
    return 0
