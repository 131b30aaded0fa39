"""The command line: flags, help, printing, exit codes. Commands are imported when they run."""

from fishertool.cli.boundary import main, run

__all__ = ["main", "run"]
