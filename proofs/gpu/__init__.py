"""What a machine with an NVIDIA GPU shows: `make gpu`."""
