"""The report's plots, from the analysis of its data."""
