"""Pages that are made from the program: options, papers, commands, the Python API."""
