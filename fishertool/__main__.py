"""`python -m fishertool` is the command `fishertool`."""

from fishertool.cli import run

if __name__ == "__main__":
    run()
