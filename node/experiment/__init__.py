"""Compares ways of sharing rollouts: the same nodes, seeds and tasks under several settings, measured alike."""
