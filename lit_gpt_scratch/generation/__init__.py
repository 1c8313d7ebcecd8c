"""Text generation: sampling, decoding with a KV cache, and streaming."""
