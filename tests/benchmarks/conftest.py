from collections.abc import Iterator

import pytest

from tests.benchmarks.fake_endpoint import FakeEndpoint, serving, stand_for_servers


@pytest.fixture
def endpoint(asked) -> Iterator[FakeEndpoint]:
    """One that knows the answers about what the module's fixture `asked` has."""
    with serving(FakeEndpoint(asked)) as fake:
        yield fake


@pytest.fixture
def launched(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the servers for which the endpoint has stood."""
    return stand_for_servers(endpoint, monkeypatch)
