"""Stand-ins for code that other people published, under its own names."""
