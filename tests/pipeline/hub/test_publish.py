"""Publishing: what goes up and what stays here, and that a rerun finds its own work."""

from pathlib import Path

import pytest
from standin import Hub

from bitpress.pipeline.api import publish

REPO = "user/tiny-int4"


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-dynamic", "nf4"])
def test_it(hub: Hub, runs: Path, scheme: str) -> None:
    found = publish(runs / scheme, REPO)
    assert found.state == "published"
    print(hub.requests)
    print((runs / scheme / "card.md").read_text())
    print((runs / scheme / "publish.json").read_text())
    assert publish(runs / scheme, REPO).state == "already there"
    assert 0
