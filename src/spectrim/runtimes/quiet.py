"""Silencing what other packages print."""

import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Other people's noise

_WARNINGS = (
    r"The tensor attributes? .*_flat_weights",  # of every nn.LSTM and nn.GRU: their list of weights is no buffer
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # from torch's copies of programs
    r"This API is experimental and subject to change without notice",  # ExecuTorch
)


_LOGGERS = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes", "torch.export")


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop a few warnings of torch and the runtimes, by their text, and repeated messages of two loggers."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        try:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def quietly() -> Iterator[None]:
    """Run code of other packages without their warnings, log lines, output of ExecuTorch, and handlers added to the root logger."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    with warnings.catch_warnings(), _quiet_stderr():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what is written to stderr; write it afterwards without the lines of C++, ``[cpuinfo_utils.cpp:71] ...``."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not re.match(rb"\[\w+\.cpp:\d+\] ", line):
                    os.write(2, line)
