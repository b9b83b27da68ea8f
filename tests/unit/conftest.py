"""A studio over the tiny model, which draws as the little suite says."""

import pytest

from fmn.studio import open_studio

from .tiny import TinyModel
from .worlds import SUITE


@pytest.fixture
def studio():
    with open_studio(TinyModel(), SUITE.sampling, batch=3) as opened:
        yield opened
