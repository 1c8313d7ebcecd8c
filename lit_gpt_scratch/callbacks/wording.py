"""Numbers as the terminal says them."""


def count(number: float) -> str:
    """A number of things in three digits: 2.16 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def many(number: float, thing: str) -> str:
    """1 step, 1,000 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size(n_bytes: float) -> str:
    """A number of bytes in three digits: 126 MB."""
    return f"{count(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes:.0f} B"


def clock(seconds: float) -> str:
    """1:24, or 2:03:04 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
