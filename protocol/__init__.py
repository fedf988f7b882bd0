"""What crosses the wire, and how it gets there. Never imports torch."""
