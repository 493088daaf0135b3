"""Runs the command line from a checkout: `python cli.py export --help`. Not part of the installed package."""

from hydradeploy.cli import main

if __name__ == "__main__":
    main()
