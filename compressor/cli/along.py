"""The processes that `accelerate launch` starts beside the first one."""

from __future__ import annotations

from dataclasses import replace

from compressor.cli.session import Session
from compressor.ledger import Ledger
from compressor.pipeline import Pipeline
from compressor.rules import trained_rules
from compressor.stages.training import follow


def train_along(session: Session, ledger: Ledger) -> int:
    """Train with the first process and write nothing."""
    channels, rules = session.plan.channel_multiple, trained_rules(session.recipe, session.profiles)
    run = Pipeline(session.recipe, session.model, session.data, ledger, round_to=channels, panel=session.panel).run
    follow(replace(run, rules=rules))
    return 0
