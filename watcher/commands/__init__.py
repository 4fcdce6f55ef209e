"""The body of each command: it reads options, calls the rooms below, prints, and exits."""
