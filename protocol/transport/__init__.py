"""How bytes get from one node to another: one contract, several transports."""
