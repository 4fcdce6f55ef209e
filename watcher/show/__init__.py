"""What people and programs read: text and JSON documents. Nothing is decided here."""
