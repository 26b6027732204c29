"""``plan``: the dry run."""

from __future__ import annotations

from compressor.cli.output import facts, stdout_json, table
from compressor.cli.session import Request, Session, open_session
from compressor.errors import TargetUnavailable


def plan_command(request: Request, *, as_json: bool) -> int:
    """Print what would happen; exit code 4 when a wanted target is missing here."""
    session = open_session(request)
    plan = session.plan
    missing = [item for item in plan.per_profile if item.missing]
    code = TargetUnavailable.exit_code if missing else 0
    if as_json:
        stdout_json(
            {
                "name": plan.recipe.name,
                "model": dict(plan.model),
                "data": dict(plan.data),
                "steps": list(plan.steps),
                "profiles": [vars(item) for item in plan.per_profile],
                "channel_multiple": plan.channel_multiple,
                "banks": list(plan.banks),
                "accept": plan.recipe.accept.model_dump(mode="json"),
                "warnings": list(plan.warnings),
                "exit_code": code,
            }
        )
        return code
    print(f"plan of `{plan.recipe.name}` (nothing is computed)\n\nmodel")
    facts(plan.model)
    print("\ndata")
    facts({name: f"{count:,} samples" for name, count in plan.data.items()})
    print("\nstages")
    for number, step in enumerate(plan.steps, 1):
        print(f"  {number}. {step}")
    for line in plan.banks:
        print(f"  {line}")
    if plan.channel_multiple > 1:
        print(f"  pruned channel counts are multiples of {plan.channel_multiple} (widest wish of the profiles)")
    print()
    rows = [
        [item.profile, item.target, item.accuracy, item.latency, ", ".join(item.variants) or "fp32 only"]
        for item in plan.per_profile
    ]
    table(["profile", "target", "accuracy will be", "latency will be", "candidates besides fp32"], rows)
    for item in plan.per_profile:
        for name, reason in item.rejected.items():
            print(f"{item.profile}: no {name}: {reason}")
        if item.missing:
            print(f"{item.profile}: target is missing here: {item.missing}")
    _propose(session)
    print(f"accept: {plan.recipe.accept.model_dump(exclude_none=True)}")
    for warning in plan.warnings:
        print(f"note: {warning}")
    return code


def _propose(session: Session) -> None:
    """What the rules would choose for this task, data and device, with the reasons."""
    from compressor.recommend import facts_of, recommend

    splits, model = session.data.splits, session.model
    layers = _attention_layers(session)
    kind = "onnx" if model.module is None else "transformer" if layers else "cnn"
    labelled = len(splits["train"]) if splits["train"].labels is not None else 0
    unlabelled = (len(splits["transfer"]) if "transfer" in splits else 0) + (0 if labelled else len(splits["train"]))
    given = facts_of(model.task, max(2, len(model.labels)), labelled, unlabelled, kind, session.recipe.profiles, layers)
    print("the rules would choose (`compress-for-device recommend` prints the recipe):")
    for reason in recommend(given).reasons:
        print(f"  {reason}")


def _attention_layers(session: Session) -> int:
    from compressor.models.signals import available

    return available(session.model.module).get("qkv", 0) if session.model.module is not None else 0
