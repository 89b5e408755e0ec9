"""Runs `fsdp_on_cpu.py SCRIPT …` under FSDP on processes without a GPU, where accelerate would train by DDP."""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialize = AcceleratorState.__init__


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = initialize_with_fsdp
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert AcceleratorState().distributed_type == DistributedType.FSDP
PartialState().destroy_process_group()
