"""What pruning did, measured: looks at models, never changes them."""

from lightning_prune.reports.cost import Cost, count_cost
from lightning_prune.reports.export import export
from lightning_prune.reports.exported import Export
from lightning_prune.reports.files import read_report, write_report
from lightning_prune.reports.history import Moment, Validation
from lightning_prune.reports.html import report_html, write_html
from lightning_prune.reports.latency import Latency, compare_latency, measure_latency
from lightning_prune.reports.report import PruningReport, Speed
from lightning_prune.reports.tables import surgery_table
from lightning_prune.reports.trainability import mean_jacobian_singular_value

__all__ = [
    "Cost",
    "Export",
    "Latency",
    "Moment",
    "PruningReport",
    "Speed",
    "Validation",
    "compare_latency",
    "count_cost",
    "export",
    "mean_jacobian_singular_value",
    "measure_latency",
    "read_report",
    "report_html",
    "surgery_table",
    "write_html",
    "write_report",
]
