"""The processes that share an evaluation: one alone, or those of `accelerate launch`."""

from datetime import timedelta

try:
    from accelerate import PartialState
except ImportError as error:
    raise ImportError("evaluation needs accelerate; pip install 'cm3leon_hf[eval]'") from error

PATIENCE = timedelta(days=7)  # a run that goes on may leave one process with nothing to draw and another with a day


def start_processes() -> PartialState:
    """This process among those that share the work; they wait for each other much longer than training would."""
    return PartialState(timeout=PATIENCE)


__all__ = ["start_processes"]
