"""Which rank the others wait for, and PyTorch's private record, on which the answer is based."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from lit_gpt_scratch.distributed.flight_record import (
    Collective,
    find_absent_ranks,
    latest_collectives,
    read_flight_record,
    save_flight_record,
)


def test_latest_operation_of_each_group_is_described(tmp_path: Path) -> None:
    """With one process and Gloo; fails if PyTorch's record changes."""
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        before = len(read_flight_record())
        dist.all_reduce(torch.ones(2, 3))
        dist.broadcast(torch.ones(5), 0)
        group = dist.new_group([0], backend="gloo")
        dist.all_reduce(torch.tensor(1.0), group=group)
        record = read_flight_record()[before:]
    finally:
        dist.destroy_process_group()
    *_, (number, name), (other_number, other_name) = latest_collectives(record).values()
    assert name == "broadcast of 5"
    assert other_name == "all_reduce of 1"
    assert number > other_number
    file = tmp_path / "flight_record" / "rank_0.json"
    save_flight_record(record, file)
    assert json.loads(file.read_text()) == record


def test_absent_rank_has_entered_fewer_operations() -> None:
    behind, ahead = {"all": Collective(7, "broadcast of 1")}, {"all": Collective(8, "all_reduce of 4")}
    assert find_absent_ranks({0: ahead, 1: ahead, 2: behind}) == ([2], "all_reduce of 4")
    assert find_absent_ranks({0: behind, 1: ahead, 2: behind}) == ([0, 2], "all_reduce of 4")
    assert find_absent_ranks({0: ahead, 1: ahead}) is None
    assert find_absent_ranks({0: ahead, 1: {}}) is None  # it is unknown in which groups rank 1 is
    assert find_absent_ranks({}) is None


def test_rank_that_waits_for_another_is_not_the_cause() -> None:
    """HSDP on four ranks: rank 3 hangs, rank 2 waits for it within its group, and rank 0 waits for rank 2."""
    gather, reduce = Collective(5, "all_gather of 10"), Collective(3, "all_reduce of 5")
    latest = {
        0: {"shards of 0 and 1": gather, "replicas of 0 and 2": reduce},
        1: {"replicas of 1 and 3": reduce._replace(number=2), "shards of 0 and 1": gather._replace(number=6)},
        2: {"replicas of 0 and 2": reduce._replace(number=2), "shards of 2 and 3": gather},
        3: {"shards of 2 and 3": gather._replace(number=4), "replicas of 1 and 3": reduce._replace(number=2)},
    }
    assert find_absent_ranks({rank: latest[rank] for rank in (0, 2, 3)}) == ([3], "all_gather of 10")
