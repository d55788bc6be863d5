"""The table of backends, and one file or folder each."""
