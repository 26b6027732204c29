"""The last line of a run lists the targets that were never exercised."""

from __future__ import annotations

import pytest

from targets import registry

EXERCISED = pytest.StashKey[set[str]]()
SEEN = pytest.StashKey[bool]()


@pytest.fixture
def exercised(request: pytest.FixtureRequest) -> set[str]:
    """Add a target's name once it really compiled something."""
    return request.config.stash.setdefault(EXERCISED, set())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SEEN] = any(item.path.name == "test_targets.py" for item in items)


def pytest_unconfigure(config: pytest.Config) -> None:
    """After the summary: nothing is printed below this."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not config.stash.get(SEEN, False) or config.option.collectonly:
        return
    never = [name for name in registry.names() if name not in config.stash.get(EXERCISED, set())]
    reporter.write_line(f"targets never exercised: {', '.join(never) or 'none'}")
