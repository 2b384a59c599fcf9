"""What reports are made of: one appearance for figures and pages."""
