"""A Trainer that says how close it comes to the hardware."""

import time

import torch
from torch.utils.benchmark import Timer
from transformers import Trainer


def matmul_tflops(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Rate of a square matrix product on this machine in TFLOP/s, the ceiling for training."""
    factors = {name: torch.randn(size, size, dtype=dtype, device=device) for name in "ab"}
    threads = torch.get_num_threads()
    seconds = Timer("a @ b", globals=factors, num_threads=threads).blocked_autorange(min_run_time=0.5).median
    return 2 * size**3 / seconds / 1e12


class ThroughputTrainer(Trainer):
    """
    The stock Trainer, logging tokens per second, TFLOP/s, the fraction of the machine's matrix product rate, and the
    share of time in which it waited for data; `total_flos` of its state counts the same operations.

    A token costs six operations for each weight, and the attention's products on top; padding does not count.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config, weights = self.model.config, self.model.num_parameters(exclude_embeddings=True)
        head = config.vocab_size * config.hidden_size
        self.flops_per_token = 6 * (weights + head)
        self.attention_flops = (
            12 * config.num_hidden_layers * config.hidden_size
        )  # for each pair of positions, causal half
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        self.peak_tflops = matmul_tflops(dtype, self.args.device)
        self._mark()

    def _mark(self) -> None:
        self.tokens, self.flops, self.waited, self.since = 0, 0.0, 0.0, time.perf_counter()

    def get_batch_samples(self, *args, **kwargs):
        begin = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.waited += time.perf_counter() - begin
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens += int((inputs["labels"] != -100).sum())
        self.flops += self.floating_point_ops(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> float:
        lengths = (inputs["labels"] != -100).sum(1)
        return self.flops_per_token * int(lengths.sum()) + self.attention_flops * int(lengths.square().sum()) / 2

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self._mark()  # evaluation is not training time
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds = time.perf_counter() - self.since
            tflops = self.flops / seconds / 1e12
            logs |= {"tokens_per_second": round(self.tokens / seconds), "tflops": round(tflops, 3)}
            logs |= {"fraction_of_matmul_rate": round(tflops / self.peak_tflops, 3)}
            logs |= {"data_wait_share": round(self.waited / seconds, 4)}
            self._mark()
        super().log(logs, start_time)
