"""Split records at random into training, validation and test sets, with a seed independent of the run's seed."""

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.data.sampler import Permutations
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.split import SHARE_TOLERANCE

RecordSplit = Literal["train", "validation", "test"]
RECORD_SPLITS: Final[tuple[RecordSplit, ...]] = get_args(RecordSplit)

RecordIndices = NDArray[np.int64]


def shuffled_indices(n: int, seed: int, purpose: int = 0) -> RecordIndices:
    """Return a permutation of 0 to ``n - 1`` that depends only on the arguments, not on the version of any library.

    With the same seed, different values of ``purpose`` yield independent permutations.
    """
    return Permutations(max(n, 1), (seed, purpose)).at(0, np.arange(n))


def validate_shares(validation: float, test: float) -> dict[RecordSplit, float]:
    """Validate the held-out fractions and return them keyed by split, omitting a test fraction of 0.

    Raises:
        UserError: A fraction is out of range, or no records remain for training.
    """
    if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise UserError(
            f"data.validation_share is {validation} and data.test_share is {test}; they must be positive "
            "(data.test_share may be 0) and sum to less than 1"
        )
    return {"validation": validation, "test": test} if test else {"validation": validation}


def split_records(
    keys: Sequence[str], shares: dict[RecordSplit, float], seed: int, together: bool = False, name: str = "this"
) -> dict[RecordSplit, RecordIndices]:
    """Split records at random.

    Args:
        keys: Normalized text of each record; duplicates have equal keys.
        shares: Fraction of records in each held-out split; the remaining records form the training split.
        seed: Seed for the split.
        together: Whether to put duplicates into the same split. The size of a held-out split may then differ from its
            fraction. A group of duplicates that is larger than a held-out split is used for training; if all groups are
            larger, the smallest group is held out.
        name: Name of the data source, used in error messages.

    Returns:
        Record indices of each split, in ascending order.

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
        taken, remaining = _take_groups(remaining, round(share * len(keys)))
        splits[split] = np.array(sorted(taken), dtype=np.int64)
    splits["train"] = np.array(sorted(index for group in remaining for index in group), dtype=np.int64)
    for split, indices in splits.items():
        if not len(indices):
            raise UserError(
                f"{name} has only {len(keys):,} records, which leaves none for the {split} split; add records, or "
                "change --data.validation_share or --data.test_share"
            )
    return splits


def _take_groups(groups: list[list[int]], wanted: int) -> tuple[list[int], list[list[int]]]:
    """Take whole groups from the end until they have about ``wanted`` records; return these and the other groups."""
    taken: list[int] = []
    rest: list[list[int]] = []
    for group in reversed(groups):
        fits = len(group) <= wanted and len(taken) + len(group) <= wanted * SHARE_TOLERANCE
        if len(taken) < wanted and fits:
            taken += group
        else:
            rest.append(group)
    if wanted and rest and not taken:
        taken = rest.pop(min(range(len(rest)), key=lambda index: len(rest[index])))
    return taken, rest[::-1]


def count_training_copies(keys: Sequence[str], splits: dict[RecordSplit, RecordIndices]) -> dict[RecordSplit, int]:
    """Count the records in each held-out split that also occur in the training split."""
    training = {keys[index] for index in splits["train"]}
    return {split: sum(keys[index] in training for index in splits[split]) for split in splits if split != "train"}
