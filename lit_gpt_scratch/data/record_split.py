"""Random split of records into training, validation and test, with its own seed."""

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.data.sampler import Permutations
from lit_gpt_scratch.errors import UserError

RecordSplit = Literal["train", "validation", "test"]
RECORD_SPLITS: Final[tuple[RecordSplit, ...]] = get_args(RecordSplit)

RecordIndices = NDArray[np.int64]


def shuffled_indices(n: int, seed: int, purpose: int = 0) -> RecordIndices:
    """A permutation of 0 to ``n - 1`` that depends only on the seed, not on the version of any library."""
    return Permutations(max(n, 1), (seed, purpose)).at(0, np.arange(n))


def validate_shares(validation: float, test: float) -> dict[RecordSplit, float]:
    """The held-out splits and their shares; a test share of 0 means no test split.

    Raises:
        UserError: A share is out of range, or nothing is left for training.
    """
    if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise UserError(
            f"data.validation_share is {validation} and data.test_share {test}; they must be positive (the second may "
            "be 0) and leave a share for training"
        )
    return {"validation": validation, "test": test} if test else {"validation": validation}


def split_records(
    keys: Sequence[str], shares: dict[RecordSplit, float], seed: int, together: bool = False, name: str = "this"
) -> dict[RecordSplit, RecordIndices]:
    """Split records at random.

    Args:
        keys: The normalised content of each record; equal for duplicates.
        shares: Share of each held-out split; training gets the rest.
        seed: Seed of the split.
        together: Put duplicates into the same split. It may then exceed its share by fewer than the number of
            duplicates of one record.
        name: Name of the records, for error messages.

    Returns:
        Indices of each split's records, ascending.

    Raises:
        UserError: A split would be empty.
    """
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key if together else index, []).append(index)
    members = list(groups.values())
    remaining = [members[group] for group in shuffled_indices(len(members), seed)]
    splits: dict[RecordSplit, RecordIndices] = {}
    for split, share in shares.items():
        wanted, taken = round(share * len(keys)), list[int]()
        while remaining and len(taken) < wanted:
            taken += remaining.pop()
        splits[split] = np.array(sorted(taken), dtype=np.int64)
    splits["train"] = np.array(sorted(index for group in remaining for index in group), dtype=np.int64)
    for split, indices in splits.items():
        if not len(indices):
            raise UserError(
                f"{name} has too few records, {len(keys):,}, to leave any for {split}; name more, or other shares: "
                "--data.validation_share, --data.test_share"
            )
    return splits


def count_training_copies(keys: Sequence[str], splits: dict[RecordSplit, RecordIndices]) -> dict[RecordSplit, int]:
    """For each held-out split, the number of records that also occur in training."""
    training = {keys[index] for index in splits["train"]}
    return {split: sum(keys[index] in training for index in splits[split]) for split in splits if split != "train"}
