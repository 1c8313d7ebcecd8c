"""The command line: flags, and a user's mistake as one line."""
