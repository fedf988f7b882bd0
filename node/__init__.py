"""The process: command line, configuration, and the loop that joins learning to the network."""
