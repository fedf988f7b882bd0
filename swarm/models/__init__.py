"""The built-in models and how they are made."""
