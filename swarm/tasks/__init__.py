"""Verifiable tasks by reference."""
