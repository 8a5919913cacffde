import hourglass  # noqa: F401  (mends Detectron2 0.6 before a test imports it)

# isort: split
import logging

import pytest
from detectron2.utils.logger import setup_logger


@pytest.fixture
def handlers():
    """Training adds handlers to Detectron2's loggers that write to this test's captured output."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "detectron2.engine.train_loop")]
    before = [(list(logger.handlers), list(logger.filters)) for logger in loggers]
    setup_logger.cache_clear()
    yield
    for logger, (old_handlers, old_filters) in zip(loggers, before):
        logger.handlers, logger.filters = old_handlers, old_filters
