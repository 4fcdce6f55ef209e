"""What runs for long: the daemon, what wakes it, its metrics, and the files that install it."""
