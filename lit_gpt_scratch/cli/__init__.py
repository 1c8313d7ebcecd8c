"""Command-line interface: commands, argument parsing, help, config files, resuming and error messages."""
