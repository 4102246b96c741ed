"""Messages of the operators in mmengine's log."""

import logging

from mmengine.logging import print_log


class CurrentLoggerHandler(logging.Handler):
    """Handler that passes messages to mmengine's current logger.

    The operators in :mod:`mmvvt.ops` depend on PyTorch only. They log with
    Python's logger ``mmvvt``.
    """

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), 'current', record.levelno)


def connect_logger() -> None:
    """Pass the messages of the logger ``mmvvt`` to mmengine, and only there.

    The level of mmengine's logger decides what is printed. Calling this
    function again has no effect.
    """
    logger = logging.getLogger('mmvvt')
    if not any(type(h) is CurrentLoggerHandler for h in logger.handlers):
        logger.addHandler(CurrentLoggerHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
