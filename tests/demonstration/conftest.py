import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def no_progress_bars():
    """They start a thread that outlives the test."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
