"""What the build adds to the pages."""
