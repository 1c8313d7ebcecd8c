"""Which records are for training, for validation and for a test: chance decides, by a seed of its own."""

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
    """The numbers below ``n`` in an order that follows from the seed, whatever version of whatever library is here."""
    return Permutations(max(n, 1), (seed, purpose)).at(0, np.arange(n))


def validate_shares(validation: float, test: float) -> dict[RecordSplit, float]:
    """The shares of the sides that are held out; there need be no test.

    Raises:
        UserError: They are no shares, or leave nothing to learn from.
    """
    if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise UserError(
            f"data.validation_share is {validation} and data.test_share {test}; they must be positive (the second may "
            "be 0) and leave something to learn from"
        )
    return {"validation": validation, "test": test} if test else {"validation": validation}


def split_records(
    keys: Sequence[str], shares: dict[RecordSplit, float], seed: int, together: bool = False, name: str = "this"
) -> dict[RecordSplit, RecordIndices]:
    """Deal records out to the sides.

    Args:
        keys: What each record says; the same for copies.
        shares: Of the sides that are held out; training has the rest.
        seed: Another seed, another split.
        together: Put copies on one side. That one may then have more than its share, by fewer than there are copies.
        name: Of the records, for a message.

    Returns:
        The places of each side's records, in their order.

    Raises:
        UserError: A side would have none.
    """
    groups: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key if together else place, []).append(place)
    members = list(groups.values())
    left = [members[group] for group in shuffled_indices(len(members), seed)]
    sides: dict[RecordSplit, RecordIndices] = {}
    for side, share in shares.items():
        wanted, taken = round(share * len(keys)), list[int]()
        while left and len(taken) < wanted:
            taken += left.pop()
        sides[side] = np.array(sorted(taken), dtype=np.int64)
    sides["train"] = np.array(sorted(place for group in left for place in group), dtype=np.int64)
    for side, places in sides.items():
        if not len(places):
            raise UserError(
                f"{name} has too few records, {len(keys):,}, to leave any for {side}; name more, or other shares: "
                "--data.validation_share, --data.test_share"
            )
    return sides


def count_training_copies(keys: Sequence[str], sides: dict[RecordSplit, RecordIndices]) -> dict[RecordSplit, int]:
    """How many records of each side that is held out say what one of the training says, too."""
    learned = {keys[place] for place in sides["train"]}
    return {side: sum(keys[place] in learned for place in sides[side]) for side in sides if side != "train"}
