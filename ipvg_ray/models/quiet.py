"""diffusers and transformers without the bars and advice that they print while models are loaded and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars() -> Iterator[None]:
    """Let the two libraries draw no progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    drawing = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in drawing:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()


@contextmanager
def only_errors() -> Iterator[None]:
    """Let the two libraries report nothing below an error, and draw no bars.

    What would be worth a warning, such as weights that a checkpoint lacks, the loaders that use this look for
    themselves.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        for library, level in before:
            library.set_verbosity(level)
