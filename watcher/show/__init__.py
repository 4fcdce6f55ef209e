"""What people and programs get to see. Nothing is decided here."""
