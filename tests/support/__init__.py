"""What tests share: how they are run side by side."""
