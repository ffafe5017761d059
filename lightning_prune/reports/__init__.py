"""What pruning did, measured: looks at models, never changes them."""
