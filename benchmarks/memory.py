"""The memory that a run was predicted to take, and what it took: in this process, on the CPU.

    python benchmarks/memory.py PRESET pretrain|sft [flags as in training]

The model in full size with random weights, and two optimizer steps (in the second one AdamW's
averages are there from the start) on rows that are --max_length long. Measured is the most memory
that the process ever held, less what it held before there was a model: Python and PyTorch.
"""

import json
import sys
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401, every optimizer imports it: it belongs to what was there before

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.batching import Batch  # noqa: E402, found through the line above
from extras.memory import as_trained, planned, predict, table  # noqa: E402
from train_pretrain import backward  # noqa: E402
from training.distributed import start_distributed  # noqa: E402
from training.optim import make_optimizer  # noqa: E402


def peak() -> int:
    """Linux's own record. getrusage's ru_maxrss would count the parent before exec as well."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def random_model(config, settings):
    model = as_trained(config, settings)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.train()


def longest_batch(config, settings, size, K: int) -> Batch:
    B, T = settings.batch_size, settings.max_length
    ids = torch.randint(1, config.language.vocab_size, (B, T))
    labels = ids.roll(-1, dims=1)
    ids[:, :K] = config.image_token_id
    labels[:, :K] = -100
    return Batch(ids, labels, torch.randn(B, 3, *size), ["random"] * B, [T] * B)


def measure(config, settings, size, K: int) -> int:
    """-> bytes."""
    with start_distributed() as ranks:
        before = peak()
        model = random_model(config, settings)
        optimizer = make_optimizer(model, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(2):
            for _ in range(settings.gradient_accumulation_steps):
                batch = longest_batch(config, settings, size, K)
                backward(model, batch, batch.supervised, settings, ranks)
            ranks.all_reduce_gradients(trained)
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return peak() - before


def main(arguments) -> None:
    preset, stage, *flags = arguments
    plan, _ = planned(preset, stage, flags, torch.device("cpu"))
    predicted = predict(*plan, torch.device("cpu"))
    measured = measure(*plan)
    print(table({"predicted": predicted}))
    print(json.dumps({"preset": preset, "stage": stage, "flags": flags,
                      "dtype": plan[1].dtype, "predicted": predicted.peak, "measured": measured,
                      "ratio": round(predicted.peak / measured, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
