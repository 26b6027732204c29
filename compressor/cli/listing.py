"""``targets``, ``profiles`` and ``methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.cli.output import facts, stdout_json, table
from compressor.profile import load_profile, profile_names

if TYPE_CHECKING:
    from compressor.recommend import Facts


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
    """Every registered objective with its first line, by family."""
    from compressor.distil.catalogue import family, ids_of
    from compressor.distil.objectives.registry import describe, names

    found = sorted(((family(name), describe(name)) for name in names()), key=lambda pair: (pair[0], pair[1].name))
    if as_json:
        stdout_json([{**vars(item), "family": group, "rows": ids_of(item.name)} for group, item in found])
        return 0
    rows, before = [], ""
    for group, item in found:
        rows.append([group if group != before else "", item.name, ", ".join(ids_of(item.name)), item.summary])
        before = group
    table(["family", "objective", "rows", "what it is"], rows)
    return 0


def methods_show_command(name: str, *, as_json: bool) -> int:
    """One objective: what it is, what it needs, defaults, paper, when to use it, and a recipe to paste."""
    from compressor.distil.catalogue import family, ids_of, recipe_of, waits_for, when_of
    from compressor.distil.objectives.registry import describe

    found = describe(name)
    reads = _reads(name)
    if as_json:
        more = {"family": family(name), "rows": ids_of(name), "needs": reads, "when": when_of(found.text)}
        stdout_json({**vars(found), **more, "recipe": recipe_of(name)})
        return 0
    print(f"{found.name} ({family(name)}; rows {', '.join(ids_of(name)) or 'none'})\n\n{found.text}\n\nneeds")
    facts(reads)
    if found.options:
        print("\noptions")
        facts({option: f"{kind} = {default}" for option, kind, default in found.options})
    if waits_for(name):
        print(f"\nwaits for data with {waits_for(name)}: `plan` refuses it until then")
    print(f"\nrecipe to paste\n\n{recipe_of(name)}")
    return 0


def _reads(name: str) -> dict[str, str]:
    """What an objective reads, in words."""
    from compressor.distil.catalogue import needs_of
    from compressor.errors import StageError

    try:
        needs = needs_of(name)
    except StageError as error:
        return {"unknown": f"{error} {error.hint}"}
    if needs is None:
        return {"signals": "as its `match` says"}
    return {
        "student": ", ".join(sorted(needs.student)) or "nothing",
        "teacher": ", ".join(sorted(needs.teacher)) or "nothing",
        "batch": ", ".join(sorted(needs.batch)) or "nothing",
        "teacher's outputs": "online: nothing is cached" if needs.online_teacher else "can be cached",
        "batch-wise": "yes: the value depends on the other samples" if needs.batch_wise else "no",
    }


def recommend_command(facts_given: Facts, *, as_json: bool) -> int:
    """A proposed recipe and why."""
    from compressor.recommend import recommend

    found = recommend(facts_given)
    if as_json:
        stdout_json({"recipe": found.text, "reasons": list(found.reasons), "alternatives": list(found.alternatives)})
        return 0
    for reason in found.reasons:
        print(f"# {reason}")
    for alternative in found.alternatives:
        print(f"# also try: {alternative}")
    print(f"\n{found.text}")
    return 0
