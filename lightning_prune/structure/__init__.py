"""Which channels hang together, which go, and the proof that it made no difference."""
