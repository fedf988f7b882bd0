"""Drafts for speculative decoding (TLT, arXiv 2511.16665): who makes them, and when they pay."""
