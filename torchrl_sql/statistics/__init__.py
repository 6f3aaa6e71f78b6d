"""Arrays of returns in, intervals and verdicts out."""
