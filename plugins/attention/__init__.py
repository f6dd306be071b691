"""First-party plugins of this kind; one file each."""
