"""The client app of worker processes that know the term of :mod:`tests.server.drift`."""

import pytest

from fedft.clients.app import app as app
from tests.server import drift

drift.at_clients(pytest.MonkeyPatch())
