"""First-party plugins, found through the entry-point group `qcore` like anyone's."""
