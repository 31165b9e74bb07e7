"""The command line: one Typer app, its lists, and what all commands share."""
