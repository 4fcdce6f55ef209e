"""Driving downloads: how fast they come, and which is next."""
