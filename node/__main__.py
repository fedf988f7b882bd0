"""`python -m node` is `swarm-node`: for a program that starts nodes with its own interpreter."""

from node.cli import main

__all__: list[str] = []

main()
