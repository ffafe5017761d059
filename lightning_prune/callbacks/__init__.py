"""The library's place in Lightning: when to penalise, when to cut."""
