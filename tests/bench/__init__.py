"""Measures what the project promises of speed and memory: ``python -m tests.bench [NAME]...``."""
