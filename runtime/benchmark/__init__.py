"""The benchmark: measured times of an answer, as JSON, tables, comparisons and plots. `report.py` defines the terms."""
