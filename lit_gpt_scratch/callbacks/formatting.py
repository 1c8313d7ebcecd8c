"""Numbers as the terminal says them."""

from collections.abc import Mapping

from torch import Tensor


def format_count(number: float) -> str:
    """A number of things in three digits: 2.16 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def pluralize(number: float, thing: str) -> str:
    """1 step, 1,000 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_bytes(n_bytes: float) -> str:
    """A number of bytes in three digits: 126 MB."""
    return f"{format_count(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """1:24, or 2:03:04 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_metrics(metrics: Mapping[str, Tensor], side: str) -> str:
    """What was measured on a side, the loss first: val/loss 1.234, val/accuracy 0.970."""
    names = sorted((n for n in metrics if n.startswith(f"{side}/")), key=lambda name: not name.endswith("/loss"))
    return ", ".join(f"{name} {metrics[name]:.{2 if name.endswith('perplexity') else 3}f}" for name in names)
