"""A sharded training step on two processes; the first writes down what it has allocated at once.

Not collected by name: test_memory.py runs it under torchrun.
"""

import json
import sys
from pathlib import Path


def main(folder: str) -> None:
    import torch
    import torch.distributed as dist
    from test_memory import LLAMA, most_allocated
    from transformers import AutoModelForCausalLM

    from heddle.options import TrainingOptions
    from heddle.torch.train import clip, make_optimizer, shard, summed_loss

    dist.init_process_group("gloo")
    model = shard(AutoModelForCausalLM.from_config(LLAMA, attn_implementation="heddle").train(), False)
    optimizer = make_optimizer(TrainingOptions(), model.parameters())
    rows = torch.zeros(2, 256, dtype=torch.int64)

    def step() -> None:
        summed_loss(model, rows, rows, torch.arange(256).expand_as(rows), None).backward()
        clip(model.parameters(), 1.0)
        optimizer.step()

    held = [*(p.to_local() for p in model.parameters()), *model.buffers(), rows]
    held += [
        x.to_local() if hasattr(x, "to_local") else x for state in optimizer.state.values() for x in state.values()
    ]
    total = sum(x.nbytes for x in held) + most_allocated(step)
    if dist.get_rank() == 0:
        Path(folder, "allocated.json").write_text(json.dumps(total))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
