"""Windows of a long text: nothing is lost or repeated, and no window exceeds its size."""

from hypothesis import given
from hypothesis import strategies as st

from lit_gpt_scratch.text.windows import Windows

START = -1


@given(ids=st.lists(st.integers(0, 99), max_size=200), size=st.integers(2, 30), most=st.integers(1, 9))
def test_windows_cover_the_text_once(ids: list[int], size: int, most: int) -> None:
    windows = Windows(size, most)
    parts = windows.split(ids, START)
    room = (size - 1) * most
    assert [token for part in parts for token in part[1:]] == ids[:room]
    assert {part[0] for part in parts} == {START}
    assert windows.truncates(len(ids)) == (len(ids) > room)
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(parts) == next(n for n in range(1, most + 1) if n * (size - 1) >= min(len(ids), room))
