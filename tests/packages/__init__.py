"""What is installed: source distribution, wheel, Debian package and image; how it is released."""
