"""Text generation: sampling, the cached decoding loop, and streaming."""
