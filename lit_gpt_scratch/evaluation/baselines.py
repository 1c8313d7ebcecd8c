"""What a text costs without a language model."""

import lzma


def xz_bits_per_byte(text: str) -> float:
    """Bits per byte of the text under ``xz -9``, the general-purpose compressor to beat."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
