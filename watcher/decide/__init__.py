"""Judging and planning: pure functions of what was seen. No I/O, no clock."""
