"""Pulls driven to their end over whatever breaks on the way."""
