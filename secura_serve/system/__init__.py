"""What the program needs of the machine: files that are whole or absent, memory, a compiler."""
