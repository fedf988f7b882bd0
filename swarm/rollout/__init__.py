"""How groups of completions are collected."""
