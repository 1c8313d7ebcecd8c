"""Speed of a run."""

from types import SimpleNamespace

import torch

from lit_gpt_scratch.callbacks.throughput import Throughput


def test_ranks_that_share_their_batch_count_it_once() -> None:
    watch = Throughput()
    ranks = SimpleNamespace(
        global_step=0, log_every_n_steps=0, world_size=4, distributed_sampler_kwargs={"num_replicas": 2, "rank": 1}
    )
    batch = {"input_ids": torch.zeros(3, 5, dtype=torch.int64)}
    watch.on_train_batch_end(ranks, None, None, batch, 0)  # type: ignore[arg-type]
    assert watch.tokens == 2 * 3 * 5
