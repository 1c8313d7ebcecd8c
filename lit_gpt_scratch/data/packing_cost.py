"""What laying documents into windows does to them."""

from dataclasses import astuple, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Cost:
    """What a policy does to documents; costs can be added.

    Attributes:
        windows: How many there are.
        positions: Tokens that they have room for.
        documents: Documents.
        padding: Positions without a token.
        discarded: Tokens that are in no window.
        cut: Documents that are not in one window alone.
        cut_needlessly: Those of them that would fit into one.
        crossing: Windows with tokens of more than one document.
    """

    windows: int = 0
    positions: int = 0
    documents: int = 0
    padding: int = 0
    discarded: int = 0
    cut: int = 0
    cut_needlessly: int = 0
    crossing: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def used(self) -> float:
        """The share of the positions that have a token."""
        return 1 - self.padding / max(self.positions, 1)

    HEAD: ClassVar = (
        "windows",
        "positions used",
        "tokens discarded",
        "documents cut",
        "needlessly",
        "windows crossing",
    )

    @property
    def row(self) -> list[str]:
        """For a table under ``HEAD``."""
        documents, windows = max(self.documents, 1), max(self.windows, 1)
        shares = self.cut / documents, self.cut_needlessly / documents, self.crossing / windows
        return [f"{self.windows:,}", f"{self.used:.2%}", f"{self.discarded:,}", *(f"{share:.1%}" for share in shares)]
