"""What the processes of a gang have from their start, which is kept out of garbage collections."""

import gc
import os

import peft
import torch
import torch.distributed.fsdp

import mr1_fast.train
from tests.data.models import tiny_policy

os.environ.pop("LD_PRELOAD", None)  # that of faults.py is for this process and its forks alone
torch.set_num_threads(1)
for family in ("qwen2_vl", "qwen3"):  # imports transformers' modules and trains the tokenizers
    tiny_policy(family=family)
modules = [peft, mr1_fast.train]
gc.collect()
gc.freeze()
