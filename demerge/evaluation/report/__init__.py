"""The report of an evaluation: tables, plots, significance, verdict, page."""
