"""This process on its machine: who called it, whose rights it has, its end, the kernel's locks."""
