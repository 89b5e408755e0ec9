"""The processes that share an evaluation: one alone, or those of `accelerate launch`."""

from datetime import timedelta

import torch

try:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
except ImportError as error:
    raise ImportError("evaluation needs accelerate; pip install 'cm3leon_hf[eval]'") from error

PATIENCE = timedelta(days=7)  # a run that goes on may leave one process with nothing to draw and another with a day


def start_processes() -> PartialState:
    """This process among those that share the work; they wait for each other much longer than training would."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()  # unsaid, each is alone
    return PartialState(cpu=cpu, timeout=PATIENCE)


__all__ = ["start_processes"]
