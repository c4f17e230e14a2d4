"""The command line's parts: commands, option types, what they print."""
