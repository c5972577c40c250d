"""One experiment a file: `get_config(argument)` returns it as a ConfigDict."""
