"""Carrying a plan out: intent, look again, do, outcome; and finishing what a kill left undone."""
