"""The table of all hand-written hard cases."""

from __future__ import annotations

from tests.structure import (
    cases_attention,
    cases_constants,
    cases_heads,
    cases_layers,
    cases_python,
    cases_standardised,
    cases_traps,
    cases_wiring,
)
from tests.structure.case_table import CASES, Case

ROOMS = (
    cases_attention,
    cases_constants,
    cases_heads,
    cases_layers,
    cases_python,
    cases_standardised,
    cases_traps,
    cases_wiring,
)

__all__ = ["CASES", "ROOMS", "Case"]
