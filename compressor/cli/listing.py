"""``targets``, ``profiles`` and ``methods``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from compressor.cli.output import facts, stdout_json, table
from compressor.errors import ConfigError
from compressor.profile import load_profile, profile_names

if TYPE_CHECKING:
    from compressor.distil.catalogue import Row
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


def methods_rows_command(*, as_json: bool) -> int:
    """Every row of the catalogue: built, a recipe, or not offered and why."""
    from compressor.distil.catalogue import rows

    if as_json:
        stdout_json([{**vars(row), "recipe": row.text} for row in rows()])
        return 0
    found = [
        [row.id, row.title, row.status, ", ".join(row.built) or row.reason or row.part or row.note] for row in rows()
    ]
    table(["id", "method", "status", "by, or why not"], found)
    print("`compress-for-device methods show ID` prints one with its recipe.")
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
    """An objective, a catalogue id or a paper: what it is, needs, defaults, when to use it, a recipe to paste."""
    from compressor.distil.catalogue import find, known_names
    from compressor.distil.objectives.registry import names

    if name in names():
        return _show_objective(name, as_json=as_json)
    found = find(name)
    if not found:
        near = get_close_matches(name, known_names(), n=1)
        what = "neither an objective nor a paper of the catalogue" + (f"; did you mean `{near[0]}`?" if near else "")
        raise ConfigError.single("the command line", "NAME", what, hint="See `compress-for-device methods list`.")
    if len(found) > 1:
        if as_json:
            stdout_json([vars(row) for row in found])
            return 0
        print(f"`{name}` may be one of these; show one by its id")
        table(["id", "method", "status"], [[row.id, row.title, row.status] for row in found])
        return 0
    return _show_row(found[0], as_json=as_json)


def _show_row(row: Row, *, as_json: bool) -> int:
    from compressor.distil.catalogue import parts_of, when_of
    from compressor.distil.objectives.registry import describe

    used, keys = parts_of(row.text)
    used = tuple(dict.fromkeys([*row.built, *used]))
    described = [describe(item) for item in used]
    when = row.when or "; ".join(filter(None, (when_of(item.text) for item in described[:1])))
    online = {"teacher's outputs": "online: the teacher judges what the student writes"} if "rollouts" in keys else {}
    needs = {item: _reads(item) | online for item in used}
    defaults = {d.name: ", ".join(f"{option} = {value}" for option, _, value in d.options) for d in described}
    if as_json:
        more = {"recipe": row.text, "when": when, "objectives": used, "needs": needs, "defaults": defaults}
        stdout_json({**vars(row), **more})
        return 0
    print(f"{row.id}: {row.title} ({row.status})\n")
    what = row.what or (described[0].summary if described else row.part)
    facts({name: text for name, text in {
        "what": what, "paper": row.paper or "title not known here", "when": when, "note": row.note, "part": row.part,
        "not offered": row.reason, "objectives": ", ".join(used), "stage keys": ", ".join(keys),
    }.items() if text})  # fmt: skip
    for item in used:
        print(f"\n{item}: needs")
        facts(needs[item])
        if defaults[item]:
            facts({"defaults": defaults[item]})
    if row.text:
        print(f"\nrecipe to paste\n\n{row.text}")
    return 0


def _show_objective(name: str, *, as_json: bool) -> int:
    """One objective: what it is, what it needs, defaults, paper, when to use it, and a recipe to paste."""
    from compressor.distil.catalogue import family, ids_of, recipe_of, when_of
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
    print(f"\nrecipe to paste\n\n{recipe_of(name)}")
    return 0


def _reads(name: str) -> dict[str, str]:
    """What an objective reads, in words."""
    from compressor.distil.catalogue import asks_for, needs_of
    from compressor.errors import StageError

    try:
        needs = needs_of(name)
    except StageError as error:
        return {"unknown": f"{error} {error.hint}"}
    if needs is None:
        return {"signals": "as its `match` says"}
    asked = {"asks for": "; ".join(asks_for(name))} if asks_for(name) else {}
    return asked | {
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
