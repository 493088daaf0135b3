"""The command line: each command parses, calls one public function, prints the answer; progress goes to stderr."""

from hydradeploy.cli.exits import main

__all__ = ["main"]
