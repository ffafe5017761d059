"""Structural pruning for Lightning: from dense to slim inside one fit."""
