"""What the machine is, read from files below a root that tests can replace."""
