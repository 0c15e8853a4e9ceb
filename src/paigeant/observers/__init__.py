"""The observers, one file each."""
