"""How long an answer takes: what is measured, kept as JSON, compared and drawn. See `report.py` for the words."""
